//! Locks: one command at a time per VM, and one that starts or stops volume processes.
//!
//! They are file locks (`flock`), so they hold between the threads of the daemon and, in embedded
//! mode, between concurrent commands. The kernel releases them when their holder ends, also after a
//! crash.

use std::fs::{self, File};
use std::path::Path;

use anyhow::{Context, Result};
use bascule_types::VmUid;
use rustix::fs::{FlockOperation, flock};

use super::supervisor::Supervisor;

/// An exclusive or shared lock on one VM; released on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub(crate) struct VmLock {
    _lock: File,
}

/// The exclusive lock on starting and stopping volume processes; released on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub(crate) struct VolumesLock {
    _lock: File,
}

/// The exclusive lock on starting imports and judging their reports; released on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub(crate) struct ImportsLock {
    _lock: File,
}

/// The exclusive lock on giving users to VMs; released on drop.
#[derive(Debug)]
#[must_use = "the lock is released when this is dropped"]
pub(crate) struct UsersLock {
    _lock: File,
}

impl Supervisor {
    /// Runs `work` while no other command starts, stops or calls this VM's process.
    pub(crate) fn with_vm_lock<T, E: From<anyhow::Error>>(
        &self,
        vm: VmUid,
        work: impl FnOnce() -> Result<T, E>,
    ) -> Result<T, E> {
        let _lock = lock(&self.paths.vm_lock(vm), FlockOperation::LockExclusive)?;
        work()
    }

    /// The exclusive lock on a VM, unless another command holds one.
    pub(crate) fn try_vm_lock(&self, vm: VmUid) -> Result<Option<VmLock>> {
        let path = self.paths.vm_lock(vm);
        match lock(&path, FlockOperation::NonBlockingLockExclusive) {
            Ok(_lock) => Ok(Some(VmLock { _lock })),
            Err(error) if error.downcast_ref() == Some(&rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A shared lock: while it is held, no command collects this VM's process, so that the process'
    /// last state can be read. Any number of commands may hold it.
    pub(crate) fn watch(&self, vm: VmUid) -> Result<VmLock> {
        lock(&self.paths.vm_lock(vm), FlockOperation::LockShared).map(|_lock| VmLock { _lock })
    }

    /// Prevents other commands from starting and stopping volume processes.
    pub(crate) fn lock_volumes(&self) -> Result<VolumesLock> {
        lock(&self.paths.volumes_lock(), FlockOperation::LockExclusive)
            .map(|_lock| VolumesLock { _lock })
    }

    /// Prevents other commands from giving a user to a VM.
    pub(super) fn lock_users(&self) -> Result<UsersLock> {
        lock(&self.paths.users_lock(), FlockOperation::LockExclusive)
            .map(|_lock| UsersLock { _lock })
    }

    /// Prevents an import from being taken for dead between its report's first line and its process id.
    pub(super) fn lock_imports(&self) -> Result<ImportsLock> {
        lock(&self.paths.imports_lock(), FlockOperation::LockExclusive)
            .map(|_lock| ImportsLock { _lock })
    }
}

/// The lock belongs to the open file description that is returned.
fn lock(path: &Path, how: FlockOperation) -> Result<File> {
    let open = fs::OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(path);
    let file = open.with_context(|| format!("open {}", path.display()))?;
    flock(&file, how).with_context(|| format!("lock {}", path.display()))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each call opens the file anew, which to `flock` is the same as another process.
    fn is_free(path: &Path, how: FlockOperation) -> bool {
        lock(path, how).is_ok()
    }

    #[test]
    fn an_exclusive_lock_excludes_all_and_a_shared_lock_excludes_exclusive_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        let exclusive = FlockOperation::NonBlockingLockExclusive;
        let shared = FlockOperation::NonBlockingLockShared;
        let held = lock(&path, FlockOperation::LockExclusive).unwrap();
        assert!(!is_free(&path, exclusive) && !is_free(&path, shared));
        drop(held);
        let watch = lock(&path, FlockOperation::LockShared).unwrap();
        assert!(!is_free(&path, exclusive) && is_free(&path, shared));
        drop(watch);
        assert!(is_free(&path, exclusive));
    }
}
