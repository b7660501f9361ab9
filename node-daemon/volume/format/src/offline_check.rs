//! The offline checker behind `bascule-volume check`: reads all metadata and writes nothing.

use std::fmt;
use std::io;

use bascule_types::{Lba, error_chain};

use crate::block_store::BlockStore;
use crate::damage::{read_leaders, read_record};
use crate::election_blocks::{CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
use crate::envelope::{BLOCK_BYTES, FormatError, Record, open};
use crate::features::Features;
use crate::heartbeat::{HEARTBEAT_RECORDS, HeartbeatRecord};
use crate::recovery::{Recovered, recover};
use crate::superblock::Superblock;
use crate::superblock_copies::{Copies, OpenError, read_copies};

/// The result of a check.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The superblock with the highest revision.
    pub superblock: Option<Superblock>,
    /// The metadata, if it can be recovered.
    pub recovered: Option<Recovered>,
    /// The leader block with the highest epoch, if a coordinator was ever elected.
    pub leader: Option<LeaderBlock>,
    /// The newest heartbeat of every slot that has one.
    pub heartbeats: Vec<HeartbeatRecord>,
    /// Every inconsistency, in the order in which the regions were read.
    pub findings: Vec<Finding>,
}

/// One inconsistency.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// Whether the volume can still be used.
    pub severity: Severity,
    /// What is inconsistent and where, for the administrator.
    pub text: String,
}

/// Whether a volume with this finding can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The volume works; a redundant copy is lost or out of date.
    Warning,
    /// The volume must not be used.
    Error,
}

impl Report {
    /// The highest severity of all findings; none without findings.
    #[must_use]
    pub fn worst(&self) -> Option<Severity> {
        self.findings.iter().map(|finding| finding.severity).max()
    }

    fn find(&mut self, severity: Severity, text: String) {
        self.findings.push(Finding { severity, text });
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let severity = match self.severity {
            Severity::Warning => "warning",
            Severity::Error => "error",
        };
        write!(f, "{severity}: {}", self.text)
    }
}

/// Checks a whole volume, read-only.
///
/// # Errors
/// [`OpenError`] when the device holds no volume that this release can read.
pub fn check_volume<S: BlockStore>(store: &mut S) -> Result<Report, OpenError> {
    let Copies {
        current: superblock,
        stale,
    } = read_copies(store, Features::KNOWN)?;
    let mut report = Report::default();
    if let Some(stale) = stale {
        report.find(Severity::Warning, stale.to_string());
    }
    check_nodes(store, &superblock, &mut report).map_err(OpenError::Io)?;
    match recover(store, &superblock) {
        Ok(recovered) => {
            for obsolete in &recovered.obsolete {
                report.find(Severity::Warning, obsolete.to_string());
            }
            check_features(&superblock, &recovered, &mut report);
            check_rows(&recovered, &mut report);
            report.recovered = Some(recovered);
        }
        Err(error) => report.find(Severity::Error, error_chain(&error)),
    }
    report.superblock = Some(superblock);
    Ok(report)
}

fn check_nodes<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    report: &mut Report,
) -> io::Result<()> {
    for slot in superblock.slots() {
        let mut newest: Option<HeartbeatRecord> = None;
        for block in 0..HEARTBEAT_RECORDS {
            let lba = superblock.heartbeat_lba(slot, block);
            let record: Option<HeartbeatRecord> = look(store, superblock, lba, report)?;
            let Some(record) = record else { continue };
            if record.owner.slot != slot || record.block_of_slot() != block {
                let text = format!(
                    "Heartbeat block {}: holds record {} of {}, which belongs in another block",
                    lba.0, record.sequence, record.owner
                );
                report.find(Severity::Error, text);
            } else if newest.as_ref().is_none_or(|n| n.order() < record.order()) {
                newest = Some(record);
            }
        }
        report.heartbeats.extend(newest);
        for subsector in 0..PAXOS_SUBSECTORS {
            let lba = superblock.paxos_lba(slot, subsector);
            let block: Option<PaxosBlock> = look(store, superblock, lba, report)?;
            if block.is_some_and(|block| block.writer.slot != slot) {
                let text = format!(
                    "Paxos block {}: written by another slot than its own",
                    lba.0
                );
                report.find(Severity::Error, text);
            }
        }
    }
    check_leaders(store, superblock, report)
}

fn check_leaders<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    report: &mut Report,
) -> io::Result<()> {
    let leaders = match read_leaders(store, superblock) {
        Ok(leaders) => leaders,
        Err(error) if error.kind() == io::ErrorKind::InvalidData => {
            report.find(Severity::Error, error_chain(&error));
            return Ok(());
        }
        Err(error) => return Err(error),
    };
    for obsolete in &leaders.obsolete {
        report.find(Severity::Warning, obsolete.to_string());
    }
    for slot in superblock.slots() {
        let lba = superblock.leader_lba(slot);
        let leader = read_record::<_, LeaderBlock>(store, superblock, lba)?;
        if leader.is_ok_and(|leader| leader.coordinator.slot != slot) {
            let text = format!(
                "Leader block {}: written by another slot than its own",
                lba.0
            );
            report.find(Severity::Error, text);
        }
    }
    report.leader = leaders.newest();
    Ok(())
}

/// The record at `lba`; none if the block was never written, or is damaged, which is reported.
fn look<S: BlockStore, R: Record>(
    store: &mut S,
    superblock: &Superblock,
    lba: Lba,
    report: &mut Report,
) -> io::Result<Option<R>> {
    let mut block = [0; BLOCK_BYTES];
    store.read(lba, &mut block)?;
    match open(&block, superblock.place(lba)) {
        Ok(record) => Ok(Some(record)),
        Err(FormatError::Blank) => Ok(None),
        Err(error) => {
            let text = format!("{:?} block {}: {error}", R::KIND, lba.0);
            report.find(Severity::Error, text);
            Ok(None)
        }
    }
}

/// Compares the features of the metadata with those of the superblock, which follows them.
fn check_features(superblock: &Superblock, recovered: &Recovered, report: &mut Report) {
    let raised = recovered.metadata.features();
    let unknown = raised.incompat().without(Features::KNOWN);
    if !unknown.is_empty() {
        let text = format!(
            "the metadata has the features {unknown}, which this release does not know: use a newer one"
        );
        report.find(Severity::Error, text);
    }
    let unannounced = raised.without(superblock.features);
    if !unannounced.is_empty() {
        let text = format!(
            "the superblock does not name the features {unannounced} yet; the next coordinator adds them"
        );
        report.find(Severity::Warning, text);
    }
}

/// Checks the references between rows, which replay does not.
fn check_rows(recovered: &Recovered, report: &mut Report) {
    let metadata = &recovered.metadata;
    let leader = report.leader.map_or(CoordinatorEpoch(0), |l| l.epoch);
    if recovered.base.epoch > leader {
        let text = format!(
            "the metadata was written in coordinator epoch {}, but the newest leader block is of epoch {leader}",
            recovered.base.epoch
        );
        report.find(Severity::Error, text);
    }
    for disk in metadata.disks() {
        if disk.vm.is_some_and(|vm| metadata.vm(vm).is_none()) {
            let text = format!(
                "disk {}: attached to a VM that the volume does not have",
                disk.name
            );
            report.find(Severity::Error, text);
        }
        let room: u64 = disk.extents.iter().map(|run| run.length.0).sum();
        if room < disk.size.0 {
            let text = format!("disk {}: its extents are smaller than its size", disk.name);
            report.find(Severity::Error, text);
        }
    }
    for vm in metadata.vms() {
        let Some(owner) = vm.owner else { continue };
        let current = metadata.slot(owner.slot).map(|slot| slot.generation);
        if current.is_none_or(|generation| generation < owner.generation) {
            let text = format!(
                "VM {}: owned by {owner}, a generation that never joined",
                vm.name
            );
            report.find(Severity::Error, text);
        }
    }
    for saved in metadata.saved_states() {
        if metadata.vm(saved.vm).is_none() {
            let text = format!(
                "saved state of VM {}: the volume does not have this VM",
                saved.vm
            );
            report.find(Severity::Error, text);
        }
    }
}
