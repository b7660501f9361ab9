//! The offline repair behind `bascule-volume repair`: which damaged blocks can be written again, and as
//! what. It plans first, reading only; the caller decides whether to perform the plan.
//!
//! # Guarantees
//! - Only superblock copies, leader blocks and checkpoint heads are written: a copy of what is intact, a
//!   blank block where a damaged one is provably older, or a block that other blocks of the volume prove.
//! - Rows, journals, heartbeats and Paxos blocks are never written, so nobody becomes the owner of anything:
//!   the metadata after the repair is the metadata that was acknowledged.
//! - Damage that may hide something which nothing proves is refused, with the reason.
//!
//! # Assumes
//! No node has the volume attached, and no write of one is outstanding.

use std::collections::BTreeMap;
use std::io;

use bascule_types::{Lba, SlotId, error_chain};

use crate::area_blocks::{CheckpointHead, CheckpointRow};
use crate::block_store::BlockStore;
use crate::damage::{
    DamagedHead, DamagedLeader, highest_epoch_won, is_older_head, read_record, scan_heads,
    scan_leaders,
};
use crate::election_blocks::{CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
use crate::envelope::{BLOCK_BYTES, RECORD_BYTES, open, seal_block};
use crate::features::Features;
use crate::metadata::Metadata;
use crate::recovery::{LogError, recover_from};
use crate::superblock::Superblock;
use crate::superblock_copies::{Copies, OpenError, StaleCopy, read_copies};
use crate::volume_layout::AreaId;

/// What can be done about a volume's damage.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Repair {
    /// Blocks to write, in this order.
    pub steps: Vec<RepairStep>,
    /// What cannot be repaired, and why.
    pub refused: Vec<String>,
}

/// One block to write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RepairStep {
    /// The block's address.
    pub lba: Lba,
    /// What it is, and what it becomes.
    pub text: String,
    block: Vec<u8>,
}

impl Repair {
    /// Writes every block and flushes the device.
    ///
    /// # Errors
    /// The device's.
    pub fn perform<S: BlockStore>(&self, store: &mut S) -> io::Result<()> {
        for step in &self.steps {
            store.write(step.lba, &step.block)?;
        }
        store.flush()
    }

    fn write(&mut self, lba: Lba, block: &[u8], text: String) {
        let block = block.to_vec();
        self.steps.push(RepairStep { lba, text, block });
    }

    fn blank(&mut self, lba: Lba, what: &str) {
        let text = format!(
            "{what} at block {}: blank it, a newer one can be read",
            lba.0
        );
        self.write(lba, &[0; BLOCK_BYTES], text);
    }
}

/// Plans the repair of a volume. Writes nothing.
///
/// # Errors
/// [`OpenError`] when the device holds no volume that this release can read, or cannot be read.
pub fn plan_repair<S: BlockStore>(store: &mut S) -> Result<Repair, OpenError> {
    let Copies { current, stale } = read_copies(store, Features::KNOWN)?;
    let mut repair = Repair::default();
    if let Err(unknown) = current.check_writable(Features::KNOWN) {
        repair.refused.push(unknown.to_string());
        return Ok(repair);
    }
    if let Some(StaleCopy { lba, .. }) = stale {
        let block = seal_block(&current, current.place(lba));
        let text = format!("superblock at block {}: write the intact copy", lba.0);
        repair.write(lba, &block, text);
    }
    plan_leaders(store, &current, &mut repair).map_err(OpenError::Io)?;
    plan_heads(store, &current, &mut repair).map_err(OpenError::Io)?;
    Ok(repair)
}

fn plan_leaders<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    repair: &mut Repair,
) -> io::Result<()> {
    let (leaders, damaged) = scan_leaders(store, superblock)?;
    let newest = leaders.iter().map(|leader| leader.epoch).max();
    let newest = newest.unwrap_or_default();
    for damage in damaged {
        match highest_epoch_won(store, superblock, damage.slot)? {
            Some(won) if won <= newest => repair.blank(damage.lba, "leader block"),
            Some(won) => match accepted_itself(store, superblock, damage.slot, won)? {
                Some(leader) => {
                    let epoch = leader.epoch;
                    let text = format!(
                        "leader block at block {}: write that {} won epoch {epoch}, as its Paxos block says",
                        damage.lba.0, leader.coordinator
                    );
                    let block = seal_block(&leader, superblock.place(damage.lba));
                    repair.write(damage.lba, &block, text);
                }
                None => repair.refused.push(refusal(
                    &damage,
                    &format!("{} may have won an epoch up to {won}", damage.slot),
                )),
            },
            None => repair.refused.push(refusal(
                &damage,
                "a Paxos block of its slot is damaged, too: which epoch it won is not known",
            )),
        }
    }
    Ok(())
}

fn refusal(damage: &DamagedLeader, reason: &str) -> String {
    format!("{}; {reason}", error_chain(damage))
}

/// The leader block of `slot` for `epoch`, if the slot accepted itself there.
fn accepted_itself<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    slot: SlotId,
    epoch: CoordinatorEpoch,
) -> io::Result<Option<LeaderBlock>> {
    let mut newest: Option<PaxosBlock> = None;
    for subsector in 0..PAXOS_SUBSECTORS {
        let lba = superblock.paxos_lba(slot, subsector);
        let Ok(block) = read_record::<_, PaxosBlock>(store, superblock, lba)? else {
            continue;
        };
        if block.instance == epoch && newest.is_none_or(|newest| newest.order() < block.order()) {
            newest = Some(block);
        }
    }
    let accepted = newest.and_then(|block| block.accepted);
    let coordinator = accepted.map(|accepted| accepted.value);
    let coordinator = coordinator.filter(|coordinator| coordinator.slot == slot);
    Ok(coordinator.map(|coordinator| LeaderBlock { epoch, coordinator }))
}

fn plan_heads<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    repair: &mut Repair,
) -> io::Result<()> {
    let heads = scan_heads(store, superblock)?;
    let newest = heads.newest();
    for damage in heads.damaged {
        let Some((area, head)) = newest else {
            let reason = "no other checkpoint can be read";
            repair
                .refused
                .push(format!("{}; {reason}", error_chain(&damage)));
            continue;
        };
        if is_older_head(store, superblock, damage.area, &head)? {
            repair.blank(damage.lba, "checkpoint head");
            continue;
        }
        match reconstruct(store, superblock, &damage, (area, &head))? {
            Ok(head) => {
                let text = format!(
                    "checkpoint head at block {}: write that checkpoint {} of epoch {} has {} rows; they are \
                     those of the checkpoint and journal before it",
                    damage.lba.0, head.id.number, head.id.epoch, head.rows
                );
                let block = seal_block(&head, superblock.place(damage.lba));
                repair.write(damage.lba, &block, text);
            }
            Err(reason) => repair
                .refused
                .push(format!("{}; {reason}", error_chain(&damage))),
        }
    }
    Ok(())
}

/// The head that the rows of its area prove: rows of one checkpoint, which are together what the newest
/// checkpoint that can be read, with its journal, says.
fn reconstruct<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    damage: &DamagedHead,
    (area, newest): (AreaId, &CheckpointHead),
) -> io::Result<Result<CheckpointHead, String>> {
    let known = match recover_from(store, superblock, area, newest) {
        Ok((known, _)) => known,
        Err(LogError::Io { source, .. }) => return Err(source),
        Err(error) => return Ok(Err(error_chain(&error))),
    };
    let Some((head, rows)) = scan_rows(store, superblock, damage.area)? else {
        return Ok(Err("its first row cannot be read".to_owned()));
    };
    if head.id <= newest.id || rows.as_ref() != Some(&known) {
        let reason = "the rows behind it are not those of the checkpoint and journal before it: what was \
                      acknowledged is not known";
        return Ok(Err(reason.to_owned()));
    }
    Ok(Ok(head))
}

/// The longest run of rows of one checkpoint at the start of an area: the head that they would have, and the
/// metadata that they make, if they fit each other.
fn scan_rows<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    id: AreaId,
) -> io::Result<Option<(CheckpointHead, Option<Metadata>)>> {
    let area = superblock.area(id);
    let mut found: Option<CheckpointHead> = None;
    let mut metadata = Some(Metadata::new(superblock));
    let mut block = [0; BLOCK_BYTES];
    for index in 0..area.rows_max() {
        let offset = index * RECORD_BYTES as u64;
        let lba = Lba(area.rows.0 + offset / BLOCK_BYTES as u64);
        let at = usize::try_from(offset % BLOCK_BYTES as u64).unwrap_or(0);
        if at == 0 {
            store.read(lba, &mut block)?;
        }
        let record = &block[at..at + RECORD_BYTES];
        let Ok(row) = open::<CheckpointRow>(record, superblock.place(lba)) else {
            break;
        };
        let head = found.get_or_insert(CheckpointHead {
            id: row.id,
            rows: 0,
            crc32c: 0,
            follows: None,
        });
        if row.id != head.id || row.index != index {
            break;
        }
        head.rows += 1;
        head.crc32c = crc32c::crc32c_append(head.crc32c, record);
        metadata = metadata.and_then(|mut rows| rows.apply(&row.record).is_ok().then_some(rows));
    }
    Ok(found
        .filter(|head| head.rows > 0)
        .map(|head| (head, metadata)))
}

/// A device with the steps of a repair performed in memory.
#[derive(Debug)]
pub struct Repaired<'a, S> {
    store: &'a mut S,
    blocks: BTreeMap<Lba, &'a [u8]>,
}

impl<'a, S: BlockStore> Repaired<'a, S> {
    /// `store` as it would be after `repair`.
    pub fn new(store: &'a mut S, repair: &'a Repair) -> Self {
        let blocks = repair.steps.iter();
        let blocks = blocks.map(|step| (step.lba, step.block.as_slice()));
        let blocks = blocks.collect();
        Self { store, blocks }
    }
}

impl<S: BlockStore> BlockStore for Repaired<'_, S> {
    fn blocks(&mut self) -> io::Result<u64> {
        self.store.blocks()
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.store.read(lba, blocks)?;
        for (at, block) in (lba.0..).map(Lba).zip(blocks.chunks_exact_mut(BLOCK_BYTES)) {
            if let Some(repaired) = self.blocks.get(&at) {
                block.copy_from_slice(repaired);
            }
        }
        Ok(())
    }

    fn write(&mut self, _: Lba, _: &[u8]) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
