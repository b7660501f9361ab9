//! Keys of Secrets, by name.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A key of a Secret in a VirtualMachine's namespace: where a value comes from, never the value.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SecretKey {
    /// The Secret's name.
    pub name: String,
    /// The key in its data.
    pub key: String,
}

/// As messages name it: `key "authorization" of Secret "images"`.
impl fmt::Display for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "key {:?} of Secret {:?}", self.key, self.name)
    }
}
