//! The enlisted volumes on disk, so that a restart of this process forgets none.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bascule_types::VolumeId;
use serde::{Deserialize, Serialize};

/// The file beside the socket.
#[derive(Clone, Debug)]
pub struct Store {
    path: PathBuf,
    boot: String,
}

/// The list cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum PersistError {
    /// The file system's error.
    #[error("cannot {action} {path}")]
    Io {
        /// What was tried.
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// The file is damaged, or of a later release. Which volumes have writers is then unknown.
    #[error("the list of enlisted volumes in {path} cannot be understood")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Where.
        source: serde_json::Error,
    },
}

/// The file's contents.
#[derive(Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    boot: String,
    enlisted: BTreeMap<VolumeId, PathBuf>,
}

impl Store {
    /// The list at `path`, for this boot.
    ///
    /// # Errors
    /// When the kernel's boot id cannot be read.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, PersistError> {
        let boot = fs::read_to_string(BOOT_ID).map_err(io_error("read", Path::new(BOOT_ID)))?;
        Ok(Self {
            path: path.into(),
            boot: boot.trim().to_owned(),
        })
    }

    /// The volumes that were enlisted in this boot.
    ///
    /// # Errors
    /// [`PersistError`].
    pub fn load(&self) -> Result<BTreeMap<VolumeId, PathBuf>, PersistError> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(io_error("read", &self.path)(error)),
        };
        let document: Document =
            serde_json::from_slice(&text).map_err(|source| PersistError::Damaged {
                path: self.path.clone(),
                source,
            })?;
        // No process of an earlier boot writes any more.
        let same_boot = document.boot == self.boot;
        Ok(if same_boot {
            document.enlisted
        } else {
            BTreeMap::new()
        })
    }

    /// Replace the list.
    ///
    /// # Errors
    /// [`PersistError::Io`]; the old list is then still there.
    pub fn save(&self, enlisted: &BTreeMap<VolumeId, PathBuf>) -> Result<(), PersistError> {
        let document = Document {
            version: VERSION,
            boot: self.boot.clone(),
            enlisted: enlisted.clone(),
        };
        let text = serde_json::to_vec(&document).map_err(|source| PersistError::Damaged {
            path: self.path.clone(),
            source,
        })?;
        let fresh = self.path.with_extension("new");
        let write = || {
            let mut file = fs::File::create(&fresh)?;
            file.write_all(&text)?;
            file.sync_all()
        };
        write().map_err(io_error("write", &fresh))?;
        fs::rename(&fresh, &self.path).map_err(io_error("replace", &self.path))
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> PersistError {
    let path = path.to_owned();
    move |source| PersistError::Io {
        action,
        path,
        source,
    }
}

const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";
/// The version of the document.
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_another_boot_is_not_believed_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog.json");
        let store = Store::new(&path).unwrap();
        assert_eq!(store.load().unwrap(), BTreeMap::new());
        let gold = VolumeId::from_bytes([1; 16]);
        let list = BTreeMap::from([(gold, PathBuf::from("/run/gate"))]);
        store.save(&list).unwrap();
        assert_eq!(store.load().unwrap(), list);

        let other_boot = Store {
            boot: "another".to_owned(),
            ..store.clone()
        };
        assert_eq!(other_boot.load().unwrap(), BTreeMap::new());
        fs::write(&path, b"{").unwrap();
        let error = store.load().unwrap_err();
        assert!(matches!(error, PersistError::Damaged { .. }), "{error}");
    }
}
