//! `watchdog.json`: the enlisted volumes, kept over restarts of this process within one boot.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bascule_types::VolumeId;
use bascule_volume_gate::boot_id;
use serde::{Deserialize, Serialize};

/// Where the list of enlisted volumes outlives this process: `watchdog.json` in production.
pub trait EnlistmentStore: fmt::Debug + Send {
    /// The gate page of each volume that was enlisted in this boot; empty without a list.
    ///
    /// # Errors
    /// [`StoreError`].
    fn load(&self) -> Result<BTreeMap<VolumeId, PathBuf>, StoreError>;

    /// Replaces the list atomically.
    ///
    /// # Errors
    /// [`StoreError::Io`]; the previous list is then unchanged.
    fn save(&self, enlisted: &BTreeMap<VolumeId, PathBuf>) -> Result<(), StoreError>;
}

/// Reads and writes `watchdog.json`.
#[derive(Clone, Debug)]
pub struct EnlistmentFile {
    path: PathBuf,
    boot: String,
}

/// `watchdog.json` cannot be read or written.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum StoreError {
    /// An error of the file system.
    #[error("cannot {action} {path}")]
    Io {
        /// The verb: read, write or replace.
        action: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    /// The file is damaged, or was written by a later release. Which volumes have writers is then
    /// unknown.
    #[error("the list of enlisted volumes in {path} cannot be parsed")]
    Damaged {
        path: PathBuf,
        source: serde_json::Error,
    },
}

/// The contents of `watchdog.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Document {
    version: u32,
    boot: String,
    enlisted: BTreeMap<VolumeId, PathBuf>,
}

impl EnlistmentFile {
    /// The list at `path`, bound to the current boot.
    ///
    /// # Errors
    /// When the kernel's boot id cannot be read.
    pub fn new(path: impl Into<PathBuf>) -> Result<Self, StoreError> {
        let path = path.into();
        let boot = boot_id().map_err(io_error("read the boot id for", &path))?;
        Ok(Self {
            path,
            boot: boot.to_string(),
        })
    }
}

impl EnlistmentStore for EnlistmentFile {
    fn load(&self) -> Result<BTreeMap<VolumeId, PathBuf>, StoreError> {
        let text = match fs::read(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            Err(error) => return Err(io_error("read", &self.path)(error)),
        };
        let document: Document =
            serde_json::from_slice(&text).map_err(|source| StoreError::Damaged {
                path: self.path.clone(),
                source,
            })?;
        // The reboot ended every writer of an earlier boot.
        let same_boot = document.boot == self.boot;
        Ok(if same_boot {
            document.enlisted
        } else {
            BTreeMap::new()
        })
    }

    fn save(&self, enlisted: &BTreeMap<VolumeId, PathBuf>) -> Result<(), StoreError> {
        let document = Document {
            version: VERSION,
            boot: self.boot.clone(),
            enlisted: enlisted.clone(),
        };
        let text = serde_json::to_vec(&document).map_err(|source| StoreError::Damaged {
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

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io {
        action,
        path,
        source,
    }
}

/// Of [`Document`].
const VERSION: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_another_boot_is_ignored_and_a_damaged_one_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("watchdog.json");
        let store = EnlistmentFile::new(&path).unwrap();
        assert_eq!(store.load().unwrap(), BTreeMap::new());
        let gold = VolumeId::from_bytes([1; 16]);
        let list = BTreeMap::from([(gold, PathBuf::from("/run/gate"))]);
        store.save(&list).unwrap();
        assert_eq!(store.load().unwrap(), list);

        let other_boot = EnlistmentFile {
            boot: "another".to_owned(),
            ..store.clone()
        };
        assert_eq!(other_boot.load().unwrap(), BTreeMap::new());
        fs::write(&path, b"{").unwrap();
        let error = store.load().unwrap_err();
        assert!(matches!(error, StoreError::Damaged { .. }), "{error}");
    }
}
