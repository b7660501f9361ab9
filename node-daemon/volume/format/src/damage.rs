//! Damaged leader blocks and checkpoint heads: which of them are provably older than what can be read, and
//! are ignored, and which may hide a newer state, so that reading refuses.
//!
//! # A leader block
//! A slot that won epoch `e` holds a Paxos block in which it accepted itself in instance `e`, or one of a
//! later instance: a block is rewritten only by a later ballot of its slot, which keeps what was
//! accepted in its instance. So a slot whose Paxos blocks can all be read has won no epoch beyond the
//! instances in which it accepted itself, nor the last instance that it entered. If another slot's leader
//! block shows at least that epoch, the damaged one is older.
//!
//! # A checkpoint head
//! Rows are durable before the head that makes them count. So the head of an area is not newer than the
//! area's first row; if that row is older than another area's head, the damaged head is, too. An area
//! without a first row was never used. If the row cannot be read either, the slot's leader block says
//! in which epoch it coordinated last.

use std::fmt;
use std::io;

use bascule_types::{Lba, SlotId, error_chain};

use crate::area_blocks::{CheckpointHead, CheckpointRow};
use crate::block_store::BlockStore;
use crate::election_blocks::{CoordinatorEpoch, LeaderBlock, PAXOS_SUBSECTORS, PaxosBlock};
use crate::envelope::{BLOCK_BYTES, FormatError, RECORD_BYTES, Record, open};
use crate::superblock::{RegionKind, Superblock};
use crate::volume_layout::AreaId;

/// A damaged block that is ignored: what can be read is newer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obsolete {
    /// The kind of block.
    pub what: &'static str,
    /// The block's address.
    pub lba: Lba,
    /// The kind of damage.
    pub source: FormatError,
}

impl fmt::Display for Obsolete {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the {} at block {} is damaged ({}), and ignored: a newer one can be read",
            self.what,
            self.lba.0,
            error_chain(&self.source)
        )
    }
}

/// The leader blocks of all slots.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaders {
    /// Those that can be read.
    pub blocks: Vec<LeaderBlock>,
    /// Those that are damaged, and older.
    pub obsolete: Vec<Obsolete>,
}

impl Leaders {
    /// The one with the highest epoch, which is the coordinator's.
    #[must_use]
    pub fn newest(&self) -> Option<LeaderBlock> {
        self.blocks
            .iter()
            .copied()
            .max_by_key(|leader| leader.epoch)
    }
}

/// A damaged leader block that may be the newest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the leader block at block {} is damaged and may be the newest", lba.0)]
pub struct DamagedLeader {
    /// The slot whose block it is.
    pub slot: SlotId,
    /// The block's address.
    pub lba: Lba,
    /// The kind of damage.
    #[source]
    pub source: FormatError,
}

/// Reads every leader block; a slot that never coordinated has none.
///
/// # Errors
/// Those of the device; [`io::ErrorKind::InvalidData`] with a [`DamagedLeader`] inside when a damaged block
/// may be the newest.
pub fn read_leaders<S: BlockStore>(store: &mut S, superblock: &Superblock) -> io::Result<Leaders> {
    let (blocks, damaged) = scan_leaders(store, superblock)?;
    let mut leaders = Leaders {
        blocks,
        obsolete: Vec::new(),
    };
    let newest = leaders.newest().map(|leader| leader.epoch);
    for damage in damaged {
        let won = highest_epoch_won(store, superblock, damage.slot)?;
        if won.is_none_or(|won| won > newest.unwrap_or_default()) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, damage));
        }
        leaders.obsolete.push(Obsolete {
            what: "leader block",
            lba: damage.lba,
            source: damage.source,
        });
    }
    Ok(leaders)
}

/// The leader blocks that can be read, and those that are damaged.
pub(crate) fn scan_leaders<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> io::Result<(Vec<LeaderBlock>, Vec<DamagedLeader>)> {
    let region = superblock.region(RegionKind::Leaders);
    let mut bytes = vec![0; usize::from(superblock.slot_count) * BLOCK_BYTES];
    store.read(region.start, &mut bytes)?;
    let (mut leaders, mut damaged) = (Vec::new(), Vec::new());
    for (slot, block) in superblock.slots().zip(bytes.chunks_exact(BLOCK_BYTES)) {
        let lba = superblock.leader_lba(slot);
        match open(block, superblock.place(lba)) {
            Ok(leader) => leaders.push(leader),
            Err(FormatError::Blank) => {}
            Err(source) => damaged.push(DamagedLeader { slot, lba, source }),
        }
    }
    Ok((leaders, damaged))
}

/// An epoch beyond which `slot` has won none; none when a Paxos block of the slot is damaged.
pub(crate) fn highest_epoch_won<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    slot: SlotId,
) -> io::Result<Option<CoordinatorEpoch>> {
    let mut highest = 0;
    for subsector in 0..PAXOS_SUBSECTORS {
        let lba = superblock.paxos_lba(slot, subsector);
        match read_record::<_, PaxosBlock>(store, superblock, lba)? {
            Ok(block) => {
                let accepted_itself = block
                    .accepted
                    .is_some_and(|accepted| accepted.value.slot == slot);
                let before = block.instance.0.saturating_sub(1);
                highest = highest.max(if accepted_itself {
                    block.instance.0
                } else {
                    before
                });
            }
            Err(FormatError::Blank) => {}
            Err(_) => return Ok(None),
        }
    }
    Ok(Some(CoordinatorEpoch(highest)))
}

/// A checkpoint head that is damaged.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the checkpoint head at block {} is damaged", lba.0)]
pub(crate) struct DamagedHead {
    pub(crate) area: AreaId,
    pub(crate) lba: Lba,
    #[source]
    pub(crate) source: FormatError,
}

/// The checkpoint heads of all areas.
#[derive(Debug, Default)]
pub(crate) struct Heads {
    readable: Vec<(AreaId, CheckpointHead)>,
    pub(crate) damaged: Vec<DamagedHead>,
}

impl Heads {
    /// The newest one that can be read.
    pub(crate) fn newest(&self) -> Option<(AreaId, CheckpointHead)> {
        self.readable
            .iter()
            .copied()
            .max_by_key(|(_, head)| head.id)
    }
}

pub(crate) fn scan_heads<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> io::Result<Heads> {
    let mut heads = Heads::default();
    for area in superblock.areas() {
        let lba = superblock.area(area).head;
        match read_record(store, superblock, lba)? {
            Ok(head) => heads.readable.push((area, head)),
            Err(FormatError::Blank) => {}
            Err(source) => heads.damaged.push(DamagedHead { area, lba, source }),
        }
    }
    Ok(heads)
}

/// Whether the damaged head of area `id` is older than `newest`, the newest head that can be read.
pub(crate) fn is_older_head<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    id: AreaId,
    newest: &CheckpointHead,
) -> io::Result<bool> {
    if newest.rows == 0 {
        // A checkpoint without rows would leave no first row.
        return Ok(false);
    }
    match first_row(store, superblock, id)? {
        Ok(row) => Ok(row.id < newest.id),
        // Never written, or before the volume was formatted.
        Err(FormatError::Blank | FormatError::ForeignVolume(_)) => Ok(true),
        Err(_) => {
            let lba = superblock.leader_lba(id.slot);
            let leader = read_record::<_, LeaderBlock>(store, superblock, lba)?;
            Ok(match leader {
                Ok(leader) => leader.epoch < newest.id.epoch,
                Err(FormatError::Blank) => newest.id.epoch > CoordinatorEpoch(0),
                Err(_) => false,
            })
        }
    }
}

/// The first row of the checkpoint that was last begun in area `id`.
fn first_row<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    id: AreaId,
) -> io::Result<Result<CheckpointRow, FormatError>> {
    let lba = superblock.area(id).rows;
    let mut block = [0; BLOCK_BYTES];
    store.read(lba, &mut block)?;
    let row: Result<CheckpointRow, _> = open(&block[..RECORD_BYTES], superblock.place(lba));
    Ok(row.and_then(|row| match row.index {
        0 => Ok(row),
        _ => Err(FormatError::Field("index")),
    }))
}

/// Reads one record: the inner error says what is wrong with it.
pub(crate) fn read_record<S: BlockStore, R: Record>(
    store: &mut S,
    superblock: &Superblock,
    lba: Lba,
) -> io::Result<Result<R, FormatError>> {
    let mut block = [0; BLOCK_BYTES];
    store.read(lba, &mut block)?;
    Ok(open(&block, superblock.place(lba)))
}
