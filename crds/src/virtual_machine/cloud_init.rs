//! What cloud-init finds in the guest.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::fmt;

use kube::KubeSchema;
use serde::{Deserialize, Serialize};

use super::field_error::FieldError;
use super::secret_ref::{SecretKeyRef, TextSource};

/// What cloud-init finds in the guest. Whoever may read the VirtualMachine may read userData and
/// networkConfig: texts with passwords or tokens belong in a Secret, which userDataFrom and
/// networkConfigFrom refer to.
#[derive(KubeSchema, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
#[x_kube(
    validation = Rule::new("!has(self.userDataFrom) || !has(self.userData) || self.userData == ''").message("set userData or userDataFrom, not both"),
    validation = Rule::new("!has(self.networkConfigFrom) || !has(self.networkConfig)").message("set networkConfig or networkConfigFrom, not both"),
)]
pub struct CloudInit {
    /// The user data, for example a text that begins with #cloud-config, or a script that begins with #!.
    /// At most 131072 characters. Texts with another beginning are refused, because cloud-init would
    /// not read them.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    #[schemars(length(max = USER_DATA_MAX))]
    #[x_kube(validation = Rule::new("self == '' || self.startsWith('#') || self.startsWith('Content-Type:') || self.startsWith('MIME-Version:')").message("userData must begin with a line that tells cloud-init what it is: #cloud-config, #! and an interpreter, #include, ## template: jinja, or a MIME header"))]
    pub user_data: String,
    /// Takes the user data from a Secret, in place of userData, with the same rules. The Secret is
    /// read when the guest is started; a change of it takes effect at the next start and is not
    /// reported by RestartRequired.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user_data_from: Option<TextSource>,
    /// The network configuration in cloud-init's version 1 or 2 (netplan). By default, cloud-init
    /// uses DHCP on the first interface. At most 32768 characters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = NETWORK_CONFIG_MAX))]
    pub network_config: Option<String>,
    /// Takes the network configuration from a Secret, in place of networkConfig, as userDataFrom
    /// does the user data.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network_config_from: Option<TextSource>,
    /// Public SSH keys of the image's default user, each as a line of authorized_keys: at most 32, of
    /// at most 4096 characters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = KEYS_MAX), inner(length(min = 1, max = KEY_MAX)))]
    #[x_kube(validation = Rule::new("self.all(key, !key.contains('\\n'))").message("each of sshAuthorizedKeys is one line, such as the contents of id_ed25519.pub"))]
    pub ssh_authorized_keys: Vec<String>,
}

/// Lengths only: specs are logged, and people write passwords where they should not.
impl fmt::Debug for CloudInit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CloudInit")
            .field("user_data_bytes", &self.user_data.len())
            .field("ssh_authorized_keys", &self.ssh_authorized_keys.len())
            .finish_non_exhaustive()
    }
}

impl CloudInit {
    /// Calls `require` with every rule: whether it holds, the field, and what to write instead.
    pub(super) fn check(&self, mut require: impl FnMut(bool, &str, &str)) {
        let data = &self.user_data;
        let begins = |start: &&str| data.starts_with(*start);
        let known = ["#", "Content-Type:", "MIME-Version:"].iter().any(begins);
        require(data.is_empty() || known, "userData", USER_DATA);
        let short = data.chars().count() <= USER_DATA_MAX;
        require(short, "userData", USER_DATA_LENGTH);
        let network = self.network_config.as_ref();
        let good =
            network.is_none_or(|text| (1..=NETWORK_CONFIG_MAX).contains(&text.chars().count()));
        require(good, "networkConfig", NETWORK_CONFIG_LENGTH);
        let from = &self.user_data_from;
        require(from.is_none() || data.is_empty(), "userDataFrom", EITHER);
        let both = self.network_config_from.is_some() && network.is_some();
        require(!both, "networkConfigFrom", EITHER);
        for (field, secret) in self.secrets() {
            secret.check(field, &mut require);
        }
        let keys = &self.ssh_authorized_keys;
        require(
            keys.len() <= KEYS_MAX,
            "sshAuthorizedKeys",
            "at most 32 keys",
        );
        for (index, key) in keys.iter().enumerate() {
            let good = (1..=KEY_MAX).contains(&key.chars().count()) && !key.contains('\n');
            require(good, &format!("sshAuthorizedKeys[{index}]"), SSH_KEY);
        }
    }

    /// The keys of Secrets that it refers to, each with the field that does.
    pub fn secrets(&self) -> impl Iterator<Item = (&'static str, &SecretKeyRef)> {
        let both = [
            ("userDataFrom", &self.user_data_from),
            ("networkConfigFrom", &self.network_config_from),
        ];
        let given = both
            .into_iter()
            .filter_map(|(field, from)| Some((field, from.as_ref()?)));
        given.map(|(field, from)| (field, &from.secret_key_ref))
    }

    /// The same with the texts in place of the references to Secrets. `text` returns that of a key, or why
    /// there is none.
    ///
    /// # Errors
    /// The first field whose text is missing, or breaks the rules of a text that is written inline.
    pub fn resolve(
        &self,
        text: impl Fn(&SecretKeyRef) -> Result<String, String>,
    ) -> Result<Self, FieldError> {
        let mut inline = Self {
            user_data_from: None,
            network_config_from: None,
            ..self.clone()
        };
        for (field, secret) in self.secrets() {
            let found = text(secret).map_err(|message| field_error(field, message))?;
            if field == "userDataFrom" {
                inline.user_data = found;
            } else {
                inline.network_config = Some(found);
            }
            let mut broken = None;
            inline.check(|holds, _, message| {
                if !holds && broken.is_none() {
                    broken = Some(message.to_owned());
                }
            });
            if let Some(message) = broken {
                return Err(field_error(field, format!("{secret}: {message}")));
            }
        }
        Ok(inline)
    }
}

fn field_error(field: &str, message: String) -> FieldError {
    FieldError {
        field: format!("spec.cloudInit.{field}"),
        message,
    }
}

/// Most characters of the user data. All limits together fit on the disk that the guest gets.
const USER_DATA_MAX: usize = 131_072;
/// Most characters of the network configuration.
const NETWORK_CONFIG_MAX: usize = 32_768;
/// Most keys.
const KEYS_MAX: usize = 32;
/// Most characters of a key: RSA with 16384 bits has 2800.
const KEY_MAX: usize = 4096;
const USER_DATA: &str = "userData must begin with a line that tells cloud-init what it is: \
    #cloud-config, #! and an interpreter, #include, ## template: jinja, or a MIME header";
const USER_DATA_LENGTH: &str =
    "at most 131072 characters: have cloud-init fetch larger files, or put them on a disk";
const NETWORK_CONFIG_LENGTH: &str = "1 to 32768 characters; leave it out for DHCP";
const EITHER: &str = "set the text or a reference to a Secret, not both";
const SSH_KEY: &str = "one line of 1 to 4096 characters, such as the contents of id_ed25519.pub";

#[cfg(test)]
mod tests {
    use super::*;

    fn bad_fields(text: &str) -> Vec<String> {
        let asked: CloudInit = serde_saphyr::from_str(text).unwrap();
        let mut bad = Vec::new();
        asked.check(|holds, field, _| {
            if !holds {
                bad.push(field.to_owned());
            }
        });
        bad
    }

    #[test]
    fn every_bad_value_is_reported_with_its_field() {
        for good in [
            "{}",
            "{userData: '#!/bin/sh'}",
            "{userDataFrom: {secretKeyRef: {name: a.b-c, key: user_Data.1}}}",
            "{userData: 'MIME-Version: 1.0', networkConfig: 'version: 2', sshAuthorizedKeys: [ssh-ed25519 A]}",
        ] {
            assert_eq!(bad_fields(good), Vec::<String>::new(), "{good}");
        }
        let long = format!("{{userData: '#{}'}}", "x".repeat(USER_DATA_MAX));
        for (bad, field) in [
            ("{userData: 'packages: [vim]'}", "userData"),
            (long.as_str(), "userData"),
            ("{networkConfig: ''}", "networkConfig"),
            (
                "{sshAuthorizedKeys: [ssh-ed25519 A, \"a\\nb\"]}",
                "sshAuthorizedKeys[1]",
            ),
            ("{sshAuthorizedKeys: ['']}", "sshAuthorizedKeys[0]"),
            (
                "{userData: '#a', userDataFrom: {secretKeyRef: {name: a, key: b}}}",
                "userDataFrom",
            ),
            (
                "{networkConfig: 'a', networkConfigFrom: {secretKeyRef: {name: a, key: b}}}",
                "networkConfigFrom",
            ),
            (
                "{userDataFrom: {secretKeyRef: {name: ../a, key: b}}}",
                "userDataFrom.secretKeyRef.name",
            ),
            (
                "{networkConfigFrom: {secretKeyRef: {name: a, key: ''}}}",
                "networkConfigFrom.secretKeyRef.key",
            ),
        ] {
            assert_eq!(bad_fields(bad), [field], "{bad:.80}");
        }
    }

    /// A user writes a password where it does not belong, and an error prints the spec.
    #[test]
    fn its_texts_are_not_in_what_is_printed_for_debugging() {
        let asked = CloudInit {
            user_data: "#cloud-config\npassword: secret".to_owned(),
            network_config: Some("secret".to_owned()),
            ssh_authorized_keys: vec!["secret".to_owned()],
            ..CloudInit::default()
        };
        assert!(!format!("{asked:?}").contains("secret"));
    }

    fn from_secrets() -> CloudInit {
        let text = "{userDataFrom: {secretKeyRef: {name: seed, key: user}}, \
                    networkConfigFrom: {secretKeyRef: {name: seed, key: net}}}";
        serde_saphyr::from_str(text).unwrap()
    }

    #[test]
    fn texts_of_secrets_take_the_place_of_their_references() {
        let text = |secret: &SecretKeyRef| Ok(format!("#{}/{}", secret.name, secret.key));
        let inline = from_secrets().resolve(text).unwrap();
        assert_eq!(inline.user_data, "#seed/user");
        assert_eq!(inline.network_config.as_deref(), Some("#seed/net"));
        assert_eq!(inline.secrets().count(), 0);
    }

    #[test]
    fn a_text_of_a_secret_obeys_the_rules_of_an_inline_one_and_is_not_quoted() {
        let resolve = |user: &str, net: &str| {
            let text = |secret: &SecretKeyRef| {
                let text = if secret.key == "user" { user } else { net };
                Ok(text.to_owned())
            };
            from_secrets().resolve(text)
        };
        assert!(resolve("#cloud-config", "version: 2").is_ok());
        for (user, net, field) in [
            (
                "password: hunter2",
                "version: 2",
                "spec.cloudInit.userDataFrom",
            ),
            ("#cloud-config", "", "spec.cloudInit.networkConfigFrom"),
        ] {
            let error = resolve(user, net).unwrap_err();
            assert_eq!(error.field, field);
            assert!(error.message.contains("\"seed\""), "{error}");
            assert!(!error.message.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_missing_text_is_reported_with_the_field_that_refers_to_it() {
        let error = from_secrets()
            .resolve(|_| Err("gone".to_owned()))
            .unwrap_err();
        assert_eq!(error.to_string(), "spec.cloudInit.userDataFrom: gone");
    }
}
