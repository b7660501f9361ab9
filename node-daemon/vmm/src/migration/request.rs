//! Requests for a live migration, and why one is refused.

use std::net::SocketAddr;
use std::path::PathBuf;

use bascule_ipc::vm::{MigrationLimits, VmConfig};
use bascule_types::{AttemptId, Epoch, Owner, Ownership, VmUid};

use super::fault::Faults;

/// A requested live migration.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Outgoing {
    /// The VM to migrate.
    pub vm: VmUid,
    /// Chosen by the operator; the destination waits for the same id.
    pub attempt: AttemptId,
    /// Where the destination listens.
    pub peer: SocketAddr,
    /// The present owner: the source.
    pub from: Owner,
    pub epoch: Epoch,
    /// The next owner: the destination.
    pub to: Owner,
    /// Downtime, duration and bandwidth.
    pub limits: MigrationLimits,
    /// Directory of the node's certificate, key and authority.
    pub tls_dir: PathBuf,
    /// Number of virtual CPUs.
    pub cpus: u16,
    /// Must be equal on both sides, see [`describe`].
    pub description: Vec<u8>,
    /// The MTU in bytes that was offered to the guest on each interface, 0 where none was.
    pub offered_mtus: Vec<u16>,
    /// Faults injected by tests.
    pub faults: Faults,
}

/// Why a migration cannot even begin. Nothing was changed.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    /// Without a home volume there is no ownership record.
    #[error(
        "the VM has no home volume: only the ownership record there says on which side it may run"
    )]
    NoHome,
    /// The stream cannot be encrypted.
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
    /// The migration that `config`'s machine would make; its guest was offered these MTUs.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn new(
        (config, offered_mtus): (&VmConfig, Vec<u16>),
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
            offered_mtus,
            faults: Faults::from_environment(),
        })
    }
}

/// The part of a configuration that must be equal on both sides because the guest sees it.
pub(super) fn describe(config: &VmConfig) -> Result<Vec<u8>, serde_json::Error> {
    let disks: Vec<_> = config.disks.iter().map(|disk| &disk.name).collect();
    let macs: Vec<_> = config.interfaces.iter().map(|nic| nic.mac).collect();
    let common = (config.cpus, config.memory, disks, macs);
    let mut described = match &config.cloud_init {
        None => serde_json::to_vec(&common)?,
        // Not the contents, which may be longer than a frame.
        Some(contents) => {
            let contents = crc32c::crc32c(&serde_json::to_vec(contents)?);
            serde_json::to_vec(&(common, contents))?
        }
    };
    if config.guest_agent {
        described.extend(b" with guest agent");
    }
    Ok(described)
}

#[cfg(test)]
mod tests {
    use bascule_ipc::vm::CloudInit;

    use super::*;
    use crate::process::testing;

    #[test]
    fn a_machine_with_another_cloud_init_disk_is_another_machine() {
        let described = |cloud_init| {
            let config = VmConfig {
                cloud_init,
                ..testing::config()
            };
            describe(&config).unwrap()
        };
        let with = |user_data: &str| {
            described(Some(CloudInit {
                user_data: user_data.to_owned(),
                ..CloudInit::default()
            }))
        };
        assert_ne!(described(None), with(""));
        assert_ne!(with("#a"), with("#b"));
        assert_eq!(with("#a"), with("#a"));
    }

    #[test]
    fn a_machine_with_a_port_for_an_agent_is_another_machine() {
        let described = |guest_agent| {
            let config = VmConfig {
                guest_agent,
                ..testing::config()
            };
            describe(&config).unwrap()
        };
        assert_ne!(described(true), described(false));
    }
}
