//! The paths of a node's files. The layout is shared with `bascule-vm`, `bascule-volume` and
//! `bascule-watchdog`, which get the paths as arguments.

use std::path::{Path, PathBuf};

use bascule_types::{DiskId, VmUid};

/// The run directory (a tmpfs, empty after a reboot) and the state directory (persistent).
#[derive(Clone, Debug)]
pub(crate) struct Paths {
    run: PathBuf,
    state: PathBuf,
}

impl Paths {
    pub(crate) fn new(run: &Path, state: &Path) -> Self {
        Self {
            run: run.to_owned(),
            state: state.to_owned(),
        }
    }

    pub(crate) fn run(&self) -> &Path {
        &self.run
    }

    /// Exists from the begin of the host's shutdown on: no guest is started here. The reboot removes it.
    pub(crate) fn shutting_down(&self) -> PathBuf {
        self.run.join("shutting-down")
    }

    pub(crate) fn vms(&self) -> PathBuf {
        self.run.join("vms")
    }

    pub(crate) fn vm(&self, vm: VmUid) -> PathBuf {
        self.vms().join(vm.to_string())
    }

    pub(crate) fn vm_socket(&self, vm: VmUid) -> PathBuf {
        self.vm(vm).join("vm.sock")
    }

    /// The last serial output of VMs whose run directory was removed.
    pub(crate) fn console_logs(&self) -> PathBuf {
        self.run.join("console-logs")
    }

    pub(crate) fn console_log(&self, vm: VmUid) -> PathBuf {
        self.console_logs().join(vm.to_string())
    }

    pub(crate) fn vm_locks(&self) -> PathBuf {
        self.run.join("vm-locks")
    }

    /// One of 256: they are never removed, and two VMs that share one only wait for each other.
    pub(crate) fn vm_lock(&self, vm: VmUid) -> PathBuf {
        let [first, ..] = vm.to_bytes();
        self.vm_locks().join(format!("{first:02x}"))
    }

    pub(crate) fn volumes(&self) -> PathBuf {
        self.run.join("volumes")
    }

    pub(crate) fn volumes_lock(&self) -> PathBuf {
        self.run.join("volumes.lock")
    }

    pub(crate) fn volume(&self, name: &str) -> PathBuf {
        self.volumes().join(name)
    }

    /// Where volume processes keep which metadata writes may still land. A detached volume's stay until
    /// the next boot.
    pub(crate) fn metadata_writes(&self) -> PathBuf {
        self.run.join("metadata-writes")
    }

    pub(crate) fn volume_socket(&self, name: &str) -> PathBuf {
        self.volume(name).join("volume.sock")
    }

    /// Where `run` makes volumes in files, on a node whose identity it has made too.
    pub(crate) fn local_volumes(&self) -> PathBuf {
        self.state.join("volumes")
    }

    /// Where imports keep an image that must be whole before it can be read: files without a name, so an empty
    /// folder.
    pub(crate) fn image_spool(&self) -> PathBuf {
        self.state.join("image-spool")
    }

    pub(crate) fn users_lock(&self) -> PathBuf {
        self.run.join("users.lock")
    }

    pub(crate) fn imports(&self) -> PathBuf {
        self.run.join("imports")
    }

    pub(crate) fn imports_lock(&self) -> PathBuf {
        self.run.join("imports.lock")
    }

    pub(crate) fn import(&self, disk: DiskId) -> PathBuf {
        self.imports().join(format!("{disk}.json"))
    }

    pub(crate) fn watchdog_socket(&self) -> PathBuf {
        self.run.join("watchdog.sock")
    }

    pub(crate) fn logs(&self) -> PathBuf {
        self.run.join("logs")
    }

    /// The log of `bascule-node run`.
    pub(crate) fn run_log(&self) -> PathBuf {
        self.logs().join("run.log")
    }

    pub(crate) fn tls(&self) -> PathBuf {
        self.state.join("tls")
    }

    pub(crate) fn identity(&self) -> PathBuf {
        self.state.join("identity.json")
    }

    pub(crate) fn binaries(&self) -> PathBuf {
        self.state.join("bin")
    }
}
