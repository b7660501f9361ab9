//! The offline checker: reads everything, alters nothing, and says what it found.

use std::fmt;
use std::io;

use bascule_types::{Lba, SlotId, error_chain};

use crate::block_store::BlockStore;
use crate::create_and_open::{OpenError, read_copy, read_superblock};
use crate::election_blocks::{CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
use crate::envelope::{BLOCK_BYTES, FormatError, Record, open};
use crate::heartbeat::{HEARTBEAT_RECORDS, HeartbeatRecord};
use crate::metadata_log::{Recovered, recover};
use crate::superblock::{SUPERBLOCK_LBAS, Superblock};

/// What the checker found.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The volume, if there is one.
    pub superblock: Option<Superblock>,
    /// The metadata, if it can be recovered.
    pub recovered: Option<Recovered>,
    /// The newest leader block.
    pub leader: Option<LeaderBlock>,
    /// The newest heartbeat of every slot that has one.
    pub heartbeats: Vec<HeartbeatRecord>,
    /// Everything that is not as it should be.
    pub findings: Vec<Finding>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub severity: Severity,
    /// What and where.
    pub text: String,
}

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// The volume works; redundancy or tidiness is lost.
    Warning,
    /// The volume must not be used.
    Error,
}

impl Report {
    /// The worst severity, if anything was found.
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
    let superblock = read_superblock(store)?;
    let mut report = Report::default();
    check_copies(store, &superblock, &mut report).map_err(OpenError::Io)?;
    check_nodes(store, &superblock, &mut report).map_err(OpenError::Io)?;
    match recover(store, &superblock) {
        Ok(recovered) => {
            check_rows(&recovered, &mut report);
            report.recovered = Some(recovered);
        }
        Err(error) => report.find(Severity::Error, error_chain(&error)),
    }
    report.superblock = Some(superblock);
    Ok(report)
}

fn check_copies<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    report: &mut Report,
) -> io::Result<()> {
    for lba in SUPERBLOCK_LBAS {
        match read_copy(store, lba)? {
            Ok(copy) if copy == *superblock => {}
            Ok(_) => report.find(
                Severity::Warning,
                format!("the superblock copy at block {} is out of date", lba.0),
            ),
            Err(error) => report.find(
                Severity::Warning,
                format!("superblock copy at block {}: {error}", lba.0),
            ),
        }
    }
    Ok(())
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
                let text = format!("heartbeat at block {} belongs elsewhere", lba.0);
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
                let text = format!("Paxos block {} was written by another slot", lba.0);
                report.find(Severity::Error, text);
            }
        }
        check_leader(store, superblock, slot, report)?;
    }
    Ok(())
}

fn check_leader<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    slot: SlotId,
    report: &mut Report,
) -> io::Result<()> {
    let lba = superblock.leader_lba(slot);
    let Some(leader) = look::<_, LeaderBlock>(store, superblock, lba, report)? else {
        return Ok(());
    };
    if leader.coordinator.slot != slot {
        let text = format!("leader block {} was written by another slot", lba.0);
        report.find(Severity::Error, text);
    }
    if report.leader.is_none_or(|best| best.epoch < leader.epoch) {
        report.leader = Some(leader);
    }
    Ok(())
}

/// The record at `lba`; none if the block is blank, or damaged, which is found.
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

/// What replay cannot see: references between rows.
fn check_rows(recovered: &Recovered, report: &mut Report) {
    let metadata = &recovered.metadata;
    let leader = report.leader.map_or(CoordinatorEpoch(0), |l| l.epoch);
    if recovered.base.epoch > leader {
        let text = format!(
            "the metadata was written in coordinator epoch {}, but the newest leader block says {leader}",
            recovered.base.epoch
        );
        report.find(Severity::Error, text);
    }
    for disk in metadata.disks() {
        if disk.vm.is_some_and(|vm| metadata.vm(vm).is_none()) {
            let text = format!("disk {} belongs to a VM that has no row", disk.name);
            report.find(Severity::Error, text);
        }
        let room: u64 = disk.extents.iter().map(|run| run.length.0).sum();
        if room < disk.size.0 {
            let text = format!("disk {} has fewer extents than its size", disk.name);
            report.find(Severity::Error, text);
        }
    }
    for vm in metadata.vms() {
        let Some(owner) = vm.owner else { continue };
        let current = metadata.slot(owner.slot).map(|slot| slot.generation);
        if current.is_none_or(|generation| generation < owner.generation) {
            let text = format!("VM {} is owned by {owner}, which never joined", vm.name);
            report.find(Severity::Error, text);
        }
    }
    for saved in metadata.saved_states() {
        if metadata.vm(saved.vm).is_none() {
            let text = format!("a saved state belongs to VM {}, which has no row", saved.vm);
            report.find(Severity::Error, text);
        }
    }
}
