//! What a VirtualMachine's `cloudInit` is in the spec that its node gets: texts, wherever they come from.

use bascule_crds::SecretKeyRef;
use bascule_ipc::vm::CloudInit;
use serde::{Deserialize, Serialize};

/// The keys of Secrets that the texts of a spec's `cloud_init` were read from; none for a text that is written
/// in the VirtualMachine.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct CloudInitSecrets {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data: Option<SecretKeyRef>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config: Option<SecretKeyRef>,
}

impl CloudInitSecrets {
    /// Those that a VirtualMachine refers to.
    #[must_use]
    pub fn of(asked: &bascule_crds::CloudInit) -> Self {
        let key = |from: &Option<bascule_crds::TextSource>| {
            from.as_ref().map(|from| from.secret_key_ref.clone())
        };
        Self {
            user_data: key(&asked.user_data_from),
            network_config: key(&asked.network_config_from),
        }
    }

    /// Whether every text is written in the VirtualMachine.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.user_data.is_none() && self.network_config.is_none()
    }
}

/// The texts that are written in a VirtualMachine. Those that it takes from Secrets are empty.
#[must_use]
pub fn inline_texts(asked: &bascule_crds::CloudInit) -> CloudInit {
    CloudInit {
        user_data: asked.user_data.clone(),
        network_config: asked.network_config.clone(),
        ssh_authorized_keys: asked.ssh_authorized_keys.clone(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::VmSpec;

    fn spec(key: &str, user_data: &str, ssh_key: &str) -> VmSpec {
        let spec = serde_json::json!({
            "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e", "namespace": "shop", "name": "web",
            "volume": "gold", "cpus": 1, "memory": 1, "initrd": null, "cmdline": "",
            "disks": [], "interfaces": [],
            "cloud_init": {"user_data": user_data, "ssh_authorized_keys": [ssh_key]},
            "cloud_init_secrets": {"user_data": {"name": "seed", "key": key}},
        });
        serde_json::from_value(spec).unwrap()
    }

    #[test]
    fn texts_of_the_same_secret_are_taken_and_inline_ones_are_not() {
        let mut now = spec("user", "", "new");
        assert!(now.take_secret_texts(spec("user", "#saved", "old")));
        assert_eq!(now, spec("user", "#saved", "new"));
    }

    #[test]
    fn nothing_is_taken_of_another_secret() {
        let mut now = spec("user", "", "new");
        assert!(!now.take_secret_texts(spec("other", "#saved", "old")));
        assert_eq!(now, spec("user", "", "new"));
    }

    /// A spec of an earlier release has no Secrets, and the digest of one without Secrets is as it was.
    #[test]
    fn a_spec_without_secrets_is_written_as_before() {
        let mut spec = spec("user", "#inline", "key");
        spec.cloud_init_secrets = CloudInitSecrets::default();
        let text = serde_json::to_string(&spec).unwrap();
        assert!(!text.contains("secrets"), "{text}");
        assert_eq!(serde_json::from_str::<VmSpec>(&text).unwrap(), spec);
    }
}
