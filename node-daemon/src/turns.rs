//! Turns: one command at a time for a VM, and for the volumes.
//!
//! A turn is a file lock, so it holds among the threads of the daemon and, in embedded mode, among
//! the commands that run beside it. It ends with its holder, however that ends.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use bascule_types::VmUid;
use rustix::fs::{FlockOperation, flock};

use crate::supervisor::Supervisor;

/// A turn, or a share of one, until it is dropped.
#[derive(Debug)]
#[must_use = "the turn is over when this is dropped"]
pub(crate) struct Turn {
    /// Its lock goes with the descriptor.
    _file: File,
}

impl Supervisor {
    /// Runs `work` while no other command starts, ends or talks to this VM's process.
    pub(crate) fn exclusively<T, E: From<anyhow::Error>>(
        &self,
        vm: VmUid,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let _turn = take(&self.paths.vm_lock(vm), FlockOperation::LockExclusive)?;
        work()
    }

    /// Until the turn is dropped, nobody forgets this VM's process: what has become of it can be
    /// read. Any number of commands may watch one VM.
    pub(crate) fn watch(&self, vm: VmUid) -> Result<Turn> {
        take(&self.paths.vm_lock(vm), FlockOperation::LockShared)
    }

    /// Keeps others from starting and ending volumes' processes.
    pub(crate) fn volumes_alone(&self) -> Result<Turn> {
        take(&self.paths.volumes_lock(), FlockOperation::LockExclusive)
    }
}

fn take(path: &Path, how: FlockOperation) -> Result<Turn> {
    let open = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    let file = open.with_context(|| format!("open {}", path.display()))?;
    flock(&file, how).with_context(|| format!("lock {}", path.display()))?;
    Ok(Turn { _file: file })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of another process, as far as the kernel is concerned: it opens the file for itself.
    fn is_free(path: &Path, how: FlockOperation) -> bool {
        take(path, how).is_ok()
    }

    #[test]
    fn a_turn_keeps_all_others_out_and_watchers_keep_out_only_turns() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        let shared = FlockOperation::NonBlockingLockShared;
        let turn = take(&path, FlockOperation::LockExclusive).unwrap();
        assert!(!is_free(&path, exclusive) && !is_free(&path, shared));
        drop(turn);
        let watch = take(&path, FlockOperation::LockShared).unwrap();
        assert!(!is_free(&path, exclusive) && is_free(&path, shared));
        drop(watch);
        assert!(is_free(&path, exclusive));
    }
}
