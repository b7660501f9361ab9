//! The spec that a guest is started with: the VirtualMachine's, with the texts that it takes from Secrets.
//!
//! The operator may read a Secret only where its ServiceAccount was granted that. The texts go to the node and
//! nowhere else: not to a status, a pod, an event or a log.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bascule_crds::names::reason;
use bascule_crds::{CloudInit, SecretKeyRef};
use bascule_ipc::vm::VmState;
use bascule_node_api::cloud_init::inline_texts;
use bascule_node_api::command::{Command, Outcome, VmSpec};
use bascule_types::Epoch;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use crate::execute::execution::{Execution, Refused};
use crate::vm_intent::vm_spec;

/// The data of each Secret by its name, or why it cannot be had.
type Found = BTreeMap<String, Result<BTreeMap<String, ByteString>, String>>;

impl Execution<'_> {
    /// A guest that is restored has its cloud-init disk in use: it gets the texts that it was started with, as
    /// long as the node that saved it responds.
    pub(super) async fn spec_to_start(&mut self, epoch: Epoch, restore: bool) -> Result<VmSpec> {
        let mut spec = vm_spec(self.vm)?;
        let asked = self.vm.spec.cloud_init.as_ref();
        let Some(asked) = asked.filter(|asked| asked.secrets().next().is_some()) else {
            return Ok(spec);
        };
        if restore
            && let Some(saved) = self.saved_spec(epoch).await?
            && spec.take_secret_texts(saved)
        {
            return Ok(spec);
        }
        let found = self.read_secrets(asked).await?;
        match asked.resolve(|secret| text(&found, secret)) {
            Ok(inline) => {
                spec.cloud_init = Some(inline_texts(&inline));
                Ok(spec)
            }
            Err(error) => {
                let message = error.to_string();
                self.memory.error = Some((reason::SECRET_UNAVAILABLE, message.clone()));
                Err(Refused(message).into())
            }
        }
    }

    /// The spec of the process that saved the guest for `epoch`, from its node; none when no node that responds
    /// has it.
    async fn saved_spec(&self, epoch: Epoch) -> Result<Option<VmSpec>> {
        let vm = self.intent.uid;
        let source = self.context.nodes.reporting(|process| {
            let status = &process.status;
            let departed = status.state == VmState::Departed;
            status.uid == vm && status.epoch.next() == epoch && departed
        });
        let Some(node) = source else {
            return Ok(None);
        };
        let command = Command::ReadSpec { vm };
        match self.context.nodes.execute(&node, &command).await? {
            Outcome::Spec(spec) if spec.uid == vm => Ok(Some(*spec)),
            // It has removed the process in the meantime.
            _ => Ok(None),
        }
    }

    async fn read_secrets(&self, asked: &CloudInit) -> Result<Found> {
        let operator = &self.context.args.namespace;
        let mut found = Found::new();
        for (_, SecretKeyRef { name, .. }) in asked.secrets() {
            if found.contains_key(name) {
                continue;
            }
            let data = if self.intent.namespace == *operator {
                Err(OWN_NAMESPACE.to_owned())
            } else {
                let api: Api<Secret> = self.namespaced();
                match api.get(name).await {
                    Ok(secret) => Ok(secret.data.unwrap_or_default()),
                    Err(error) => match unavailable(&error, name, operator) {
                        Some(message) => Err(message),
                        None => return Err(error).context("read a Secret"),
                    },
                }
            };
            found.insert(name.clone(), data);
        }
        Ok(found)
    }
}

/// Why the Secret cannot be had until it is changed or granted; none for failures that pass by themselves.
fn unavailable(error: &kube::Error, name: &str, operator: &str) -> Option<String> {
    let kube::Error::Api(status) = error else {
        return None;
    };
    match status.code {
        403 => Some(format!(
            "the operator may not read Secret {name:?}: grant get on it to ServiceAccount bascule-operator of \
             namespace {operator}, as docs/cloud-init.md shows"
        )),
        404 => Some(format!("Secret {name:?} does not exist")),
        _ => None,
    }
}

fn text(found: &Found, secret: &SecretKeyRef) -> Result<String, String> {
    let SecretKeyRef { name, key } = secret;
    let data = match found.get(name) {
        Some(Ok(data)) => data,
        Some(Err(message)) => return Err(message.clone()),
        None => return Err(format!("Secret {name:?} was not read")),
    };
    let bytes = data
        .get(key)
        .ok_or_else(|| format!("Secret {name:?} has no key {key:?}"))?;
    String::from_utf8(bytes.0.clone())
        .map_err(|_| format!("key {key:?} of Secret {name:?} is not UTF-8 text"))
}

/// There the operator may read the Secret with the key of the certificate authority.
const OWN_NAMESPACE: &str =
    "a VirtualMachine in the operator's own namespace can take nothing from Secrets";

#[cfg(test)]
mod tests {
    use super::*;

    fn error(code: u16) -> kube::Error {
        let status = serde_json::json!({"status": "Failure", "code": code, "message": "no"});
        kube::Error::Api(serde_json::from_value(status).unwrap())
    }

    #[test]
    fn a_secret_that_is_missing_or_not_granted_is_named_and_other_failures_pass() {
        let said = |code| unavailable(&error(code), "seed", "bascule-system");
        assert_eq!(said(404).unwrap(), "Secret \"seed\" does not exist");
        let denied = said(403).unwrap();
        assert!(
            denied.contains("\"seed\"") && denied.contains("bascule-system"),
            "{denied}"
        );
        for code in [401, 409, 429, 500, 503] {
            assert_eq!(said(code), None, "{code}");
        }
    }

    #[test]
    fn a_text_is_the_value_of_its_key_and_errors_do_not_quote_it() {
        let data = BTreeMap::from([
            ("user".to_owned(), ByteString(b"#cloud-config".to_vec())),
            ("binary".to_owned(), ByteString(b"hunter2\xff".to_vec())),
        ]);
        let found = Found::from([
            ("seed".to_owned(), Ok(data)),
            (
                "gone".to_owned(),
                Err("Secret \"gone\" does not exist".to_owned()),
            ),
        ]);
        let read = |name: &str, key: &str| {
            let (name, key) = (name.to_owned(), key.to_owned());
            text(&found, &SecretKeyRef { name, key })
        };
        assert_eq!(read("seed", "user").unwrap(), "#cloud-config");
        for (name, key, message) in [
            ("seed", "net", "Secret \"seed\" has no key \"net\""),
            (
                "seed",
                "binary",
                "key \"binary\" of Secret \"seed\" is not UTF-8 text",
            ),
            ("gone", "user", "Secret \"gone\" does not exist"),
        ] {
            assert_eq!(read(name, key).unwrap_err(), message);
        }
    }
}
