//! Secrets in a VirtualMachine's namespace that its spec refers to.
//!
//! The operator may read a Secret only where its ServiceAccount was granted that. What it holds goes to a node and
//! nowhere else: not to a status, a pod, an event or a log. Nothing is kept: every use reads it anew.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result};
use bascule_crds::names::reason;
use bascule_types::SecretKey;
use k8s_openapi::ByteString;
use k8s_openapi::api::core::v1::Secret;
use kube::Api;

use crate::execute::execution::{Execution, Refused};

/// The data of each Secret by its name, or why it cannot be had.
pub(super) struct Secrets(BTreeMap<String, Result<BTreeMap<String, ByteString>, String>>);

impl Execution<'_> {
    /// Reads the Secrets of these names.
    pub(super) async fn read_secrets(&self, names: BTreeSet<String>) -> Result<Secrets> {
        let operator = &self.context.args.namespace;
        let mut found = BTreeMap::new();
        for name in names {
            let data = if self.intent.namespace == *operator {
                Err(OWN_NAMESPACE.to_owned())
            } else {
                let api: Api<Secret> = self.namespaced();
                match api.get(&name).await {
                    Ok(secret) => Ok(secret.data.unwrap_or_default()),
                    Err(error) => match unavailable(&error, &name, operator) {
                        Some(message) => Err(message),
                        None => return Err(error).context("read a Secret"),
                    },
                }
            };
            found.insert(name, data);
        }
        Ok(Secrets(found))
    }

    /// Puts a Secret that cannot be had, or has an unsuitable value, into the conditions until it can.
    pub(super) fn secret_unavailable(&mut self, message: String) -> anyhow::Error {
        self.memory.error = Some((reason::SECRET_UNAVAILABLE, message.clone()));
        Refused(message).into()
    }
}

impl Secrets {
    /// The value of a key, or why it cannot be had.
    pub(super) fn bytes(&self, secret: &SecretKey) -> Result<&[u8], String> {
        let SecretKey { name, key } = secret;
        let data = match self.0.get(name) {
            Some(Ok(data)) => data,
            Some(Err(message)) => return Err(message.clone()),
            None => return Err(format!("Secret {name:?} was not read")),
        };
        let value = data.get(key);
        let value = value.ok_or_else(|| format!("Secret {name:?} has no key {key:?}"))?;
        Ok(&value.0)
    }

    /// The value of a key as text, or why it cannot be had.
    pub(super) fn text(&self, secret: &SecretKey) -> Result<String, String> {
        let text = str::from_utf8(self.bytes(secret)?);
        text.map(str::to_owned)
            .map_err(|_| format!("{secret} is not UTF-8 text"))
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
        let found = Secrets(BTreeMap::from([
            ("seed".to_owned(), Ok(data)),
            (
                "gone".to_owned(),
                Err("Secret \"gone\" does not exist".to_owned()),
            ),
        ]));
        let read = |name: &str, key: &str| {
            let (name, key) = (name.to_owned(), key.to_owned());
            found.text(&SecretKey { name, key })
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
