//! What a machine is ordered to do, and why it may refuse.

use std::net::SocketAddr;
use std::path::PathBuf;

use bascule_ipc::vm::{MigrationLimits, VmConfig};
use bascule_types::{AttemptId, Epoch, Owner, Ownership, VmUid};

use super::fault::Faults;

/// A live migration as it was ordered.
#[derive(Clone, Debug)]
pub struct Outgoing {
    /// The VM.
    pub vm: VmUid,
    /// The attempt.
    pub attempt: AttemptId,
    /// Where the destination listens.
    pub peer: SocketAddr,
    /// Who owns the VM now.
    pub from: Owner,
    /// In which epoch.
    pub epoch: Epoch,
    /// Who is to own it.
    pub to: Owner,
    /// Limits.
    pub limits: MigrationLimits,
    /// The node's certificate.
    pub tls_dir: PathBuf,
    /// Virtual CPUs.
    pub cpus: u16,
    /// What must be equal on both sides.
    pub description: Vec<u8>,
    /// What a test breaks.
    pub faults: Faults,
}

/// Why a migration cannot even begin. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Nobody could say which side owns it.
    #[error("the VM has no home volume: only its row there could say on which side it may run")]
    NoHome,
    /// No certificate.
    #[error("no TLS directory was configured: a migration stream is never in the clear")]
    NoTls,
    /// Source and destination are one.
    #[error("the VM runs on that node already")]
    SameNode,
    /// The configuration cannot be described to the other side.
    #[error("the machine's configuration cannot be described")]
    Description(#[source] serde_json::Error),
}

impl Outgoing {
    /// The migration that `config`'s machine would make.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn new(
        config: &VmConfig,
        ownership: Ownership,
        (attempt, peer, to): (AttemptId, SocketAddr, Owner),
        limits: MigrationLimits,
    ) -> Result<Self, Refused> {
        let Ownership { owner: from, epoch } = ownership;
        config.home.as_ref().ok_or(Refused::NoHome)?;
        if to.slot == from.slot {
            return Err(Refused::SameNode);
        }
        Ok(Self {
            vm: config.uid,
            attempt,
            peer,
            from,
            epoch,
            to,
            limits,
            tls_dir: config.tls_dir.clone().ok_or(Refused::NoTls)?,
            cpus: config.cpus.into(),
            description: describe(config).map_err(Refused::Description)?,
            faults: Faults::from_environment(),
        })
    }
}

/// What of a configuration must be equal on both sides: what the guest sees of it.
pub(super) fn describe(config: &VmConfig) -> Result<Vec<u8>, serde_json::Error> {
    let disks: Vec<_> = config.disks.iter().map(|disk| &disk.name).collect();
    let macs: Vec<_> = config.interfaces.iter().map(|nic| nic.mac).collect();
    serde_json::to_vec(&(config.cpus, config.memory, disks, macs))
}
