//! `identity.json`: the node's UID, its name and its cluster.

use std::fs;

use anyhow::{Context, Result};
use bascule_types::{ClusterId, NodeUid};
use serde::{Deserialize, Serialize};

use crate::paths::Paths;

/// The node's identity, assigned by the operator or by `cert issue`. It is stored in the state
/// directory, so that the node starts without the API server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) node: NodeUid,
    pub(crate) name: String,
    pub(crate) cluster: ClusterId,
}

impl Identity {
    pub(crate) fn load(paths: &Paths) -> Result<Option<Self>> {
        let path = paths.identity();
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .map(Some)
                .with_context(|| format!("read {}", path.display())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
        }
    }

    /// The contents of `identity.json`.
    pub(crate) fn to_json(&self) -> Result<Vec<u8>> {
        serde_json::to_vec_pretty(self).context("write the identity")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stored_identity_is_loaded_again() {
        let folder = tempfile::tempdir().unwrap();
        let paths = Paths::new(&folder.path().join("run"), &folder.path().join("state"));
        assert_eq!(Identity::load(&paths).unwrap(), None);
        let identity = Identity {
            node: NodeUid::random(),
            name: "n1".into(),
            cluster: ClusterId::random(),
        };
        fs::create_dir_all(folder.path().join("state")).unwrap();
        fs::write(paths.identity(), identity.to_json().unwrap()).unwrap();
        assert_eq!(Identity::load(&paths).unwrap(), Some(identity));
    }
}
