//! Texts that a VirtualMachine takes from Secrets of its namespace.
#![expect(
    unreachable_pub,
    reason = "the KubeSchema derive repeats each struct inside a function"
)]

use std::fmt;

use kube::KubeSchema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where a text comes from that is not in the VirtualMachine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct TextSource {
    /// A key of a Secret in the VirtualMachine's namespace. The operator may read it only where that was
    /// granted: its ServiceAccount needs the verb get on the Secret.
    pub secret_key_ref: SecretKeyRef,
}

/// A key of a Secret in the VirtualMachine's namespace.
#[derive(KubeSchema, Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SecretKeyRef {
    /// The Secret's name.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$')").message("name is that of a Secret: lower-case letters, digits, hyphens and dots"))]
    pub name: String,
    /// The key in the Secret's data.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self.matches('^[-._a-zA-Z0-9]+$')").message("key is one of the Secret's data: letters, digits, hyphens, dots and underscores"))]
    pub key: String,
}

impl SecretKeyRef {
    /// Calls `require` with every rule: whether it holds, the field below `from`, which refers to the key, and
    /// what to write instead.
    pub(super) fn check(&self, from: &str, require: &mut impl FnMut(bool, &str, &str)) {
        let Self { name, key } = self;
        let bytes = |text: &str| (1..=253).contains(&text.len());
        let good = bytes(name) && is_subdomain(name);
        require(good, &format!("{from}.secretKeyRef.name"), SECRET_NAME);
        let good = bytes(key) && key.bytes().all(is_key_byte);
        require(good, &format!("{from}.secretKeyRef.key"), SECRET_KEY);
    }
}

/// As messages name it: `key "authorization" of Secret "images"`.
impl fmt::Display for SecretKeyRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {:?} of Secret {:?}", self.key, self.name)
    }
}

/// RFC 1123 subdomain, as the schema's rule has it.
fn is_subdomain(text: &str) -> bool {
    let edge = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    bytes.iter().all(|b| edge(*b) || matches!(b, b'-' | b'.'))
        && bytes.first().copied().is_some_and(edge)
        && bytes.last().copied().is_some_and(edge)
}

const fn is_key_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_')
}

const SECRET_NAME: &str =
    "the name of a Secret: 1 to 253 lower-case letters, digits, hyphens and dots";
const SECRET_KEY: &str =
    "a key of the Secret: 1 to 253 letters, digits, hyphens, dots and underscores";
