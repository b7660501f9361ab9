//! Who is at the other end of a connection to `volume.sock`, and what that process may request.
//!
//! The kernel says which user a client had when it connected (SO_PEERCRED, unix(7)). Root, and the user of this process,
//! is the node: `bascule-node`, an importer, a VM process of an earlier release. Any other user may be that of one VM's
//! process: the group of the VM's run directory, which only root can set (`node-daemon/src/processes/users.rs`). That
//! process may request what it needs for its own VM.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bascule_ipc::volume::Request;
use bascule_types::{Change, VmUid};

/// The client of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Client {
    /// A process of the node, which may request everything.
    Node,
    /// The process of this VM.
    Vm(VmUid),
}

/// The clients of one socket.
#[derive(Debug)]
pub struct LocalClients {
    /// The directory of all VMs' run directories.
    vms: PathBuf,
    /// The user of this process.
    user: u32,
    /// Open connections of VM processes, by user.
    open: Mutex<BTreeMap<u32, usize>>,
    /// VM processes that have requested what they may not.
    refused: Mutex<BTreeSet<VmUid>>,
}

/// A connection that was let in; counts until it is dropped.
#[derive(Debug)]
pub struct Admitted {
    /// Whose it is.
    pub client: Client,
    counted: Option<(Arc<LocalClients>, u32)>,
}

/// Why a connection is closed at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// The kernel does not say who it is.
    #[error("the client is not known")]
    Unknown,
    /// No VM's process has this user.
    #[error("user {0} is that of no VM's process")]
    Stranger(u32),
    /// The process of one VM has as many connections as it may.
    #[error("the process of VM {0} has too many connections")]
    TooMany(VmUid),
}

impl LocalClients {
    /// The clients on a node whose VMs have their run directories in `vms`.
    #[must_use]
    pub fn new(vms: PathBuf) -> Arc<Self> {
        Arc::new(Self {
            vms,
            user: rustix::process::geteuid().as_raw(),
            open: Mutex::default(),
            refused: Mutex::default(),
        })
    }

    /// Whether the client at the other end of `stream` is let in.
    ///
    /// # Errors
    /// [`NotAdmitted`]
    pub fn admit(self: &Arc<Self>, stream: impl AsFd) -> Result<Admitted, NotAdmitted> {
        let peer = rustix::net::sockopt::socket_peercred(stream);
        self.admit_user(peer.map_err(|_| NotAdmitted::Unknown)?.uid.as_raw())
    }

    fn admit_user(self: &Arc<Self>, user: u32) -> Result<Admitted, NotAdmitted> {
        if user == 0 || user == self.user {
            return Ok(Admitted {
                client: Client::Node,
                counted: None,
            });
        }
        let vm = vm_of(user, &self.vms).ok_or(NotAdmitted::Stranger(user))?;
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        let count = open.entry(user).or_default();
        if *count >= CONNECTIONS_OF_VM_MAX {
            return Err(NotAdmitted::TooMany(vm));
        }
        *count += 1;
        Ok(Admitted {
            client: Client::Vm(vm),
            counted: Some((Arc::clone(self), user)),
        })
    }
}

impl Admitted {
    /// Logs that a request was refused, once for each VM: its process could fill the log.
    pub fn log_refusal(&self, reason: &str) {
        let (Client::Vm(vm), Some((clients, _))) = (self.client, &self.counted) else {
            return;
        };
        let mut refused = (clients.refused.lock()).unwrap_or_else(PoisonError::into_inner);
        if refused.insert(vm) {
            tracing::warn!(reason, "refused");
        }
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let Some((clients, user)) = self.counted.take() else {
            return;
        };
        let mut open = clients.open.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = open.get_mut(&user) {
            *count -= 1;
            if *count == 0 {
                open.remove(&user);
            }
        }
    }
}

/// The VM whose run directory has the group `user`.
fn vm_of(user: u32, vms: &Path) -> Option<VmUid> {
    let entries = std::fs::read_dir(vms).ok()?.flatten();
    let mut of_user = entries.filter(|entry| {
        let metadata = entry.metadata();
        metadata.is_ok_and(|found| found.is_dir() && found.uid() == 0 && found.gid() == user)
    });
    of_user.find_map(|entry| entry.file_name().to_str()?.parse().ok())
}

impl Client {
    /// Why this client may not make a request; none if it may.
    #[must_use]
    pub fn why_refused(self, request: &Request) -> Option<String> {
        match self {
            Self::Node => None,
            Self::Vm(own) => match subject(request) {
                Subject::Volume => None,
                Subject::Vm(vm) if vm == own => None,
                _ => Some(format!("the process of VM {own} may not request this")),
            },
        }
    }
}

/// What a request is about.
enum Subject {
    /// The volume as a whole, which is read.
    Volume,
    /// One VM, and such as its own process makes.
    Vm(VmUid),
    /// Something that only the node requests.
    Node,
}

/// A request that is new is of the node only until it is listed here.
const fn subject(request: &Request) -> Subject {
    match request {
        Request::Status => Subject::Volume,
        Request::OpenVm { vm, .. }
        | Request::PeekVm { vm }
        | Request::Vm { vm }
        | Request::CloseVm { vm, .. }
        | Request::ReportFailure { vm, .. }
        | Request::Change(
            Change::Release { vm, .. }
            | Change::Transfer { vm, .. }
            | Change::ReserveSavedState { vm, .. }
            | Change::FinishSavedState { vm, .. }
            | Change::DropSavedState { vm, .. },
        ) => Subject::Vm(*vm),
        Request::Rows | Request::Change(_) => Subject::Node,
    }
}

/// One that stays open, one for each migration, and those that a broken one has left behind.
const CONNECTIONS_OF_VM_MAX: usize = 16;

#[cfg(test)]
mod tests;
