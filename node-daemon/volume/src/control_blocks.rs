//! Reading and writing the control blocks of a volume: heartbeats, Paxos blocks, leader blocks.
//! Each is one 4096-byte block with a checksum.

use std::io;

use bascule_types::{Lba, SlotId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, CoordinatorEpoch, HEARTBEAT_RECORDS, HeartbeatRecord,
    PAXOS_SUBSECTORS, PaxosBlock, Record, RegionKind, Superblock, open, read_leaders, seal_block,
};

/// Reads `count` consecutive blocks and returns the records that can be parsed.
fn read_run<R: Record, S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    first: Lba,
    count: u64,
) -> io::Result<Vec<R>> {
    let count = usize::try_from(count).map_err(io::Error::other)?;
    let mut bytes = vec![0; count * BLOCK_BYTES];
    store.read(first, &mut bytes)?;
    let blocks = (first.0..).map(Lba).zip(bytes.chunks_exact(BLOCK_BYTES));
    Ok(blocks
        .filter_map(|(lba, block)| open(block, superblock.place(lba)).ok())
        .collect())
}

/// The heartbeat records of one slot.
///
/// # Errors
/// Those of the device.
pub fn read_slot<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    slot: SlotId,
) -> io::Result<Vec<HeartbeatRecord>> {
    let first = superblock.heartbeat_lba(slot, 0);
    let records = read_run(store, superblock, first, HEARTBEAT_RECORDS)?;
    Ok(of_slot(records, slot))
}

/// The newest heartbeat record of each of the first `slots` slots that has one.
///
/// # Errors
/// Those of the device.
pub fn read_heartbeats<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    slots: u16,
) -> io::Result<Vec<HeartbeatRecord>> {
    let first = superblock.region(RegionKind::Heartbeats).start;
    let slots = slots.min(superblock.slot_count);
    let blocks = u64::from(slots) * HEARTBEAT_RECORDS;
    let all: Vec<HeartbeatRecord> = read_run(store, superblock, first, blocks)?;
    let newest = |slot| {
        let records = all.iter().filter(|record| record.owner.slot == slot);
        records.max_by_key(|record| record.order()).cloned()
    };
    Ok((0..slots).map(SlotId).filter_map(newest).collect())
}

/// Every Paxos block that can be parsed.
///
/// # Errors
/// Those of the device.
pub fn read_paxos<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> io::Result<Vec<PaxosBlock>> {
    let region = superblock.region(RegionKind::Paxos);
    let blocks = u64::from(superblock.slot_count) * PAXOS_SUBSECTORS;
    read_run(store, superblock, region.start, blocks.min(region.blocks))
}

/// The highest coordinator epoch of any leader block; 0 when there is none.
///
/// # Errors
/// As for [`read_leaders`]: a damaged leader block may be the newest.
pub fn read_highest_epoch<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> io::Result<CoordinatorEpoch> {
    let newest = read_leaders(store, superblock)?.newest();
    Ok(newest.map(|leader| leader.epoch).unwrap_or_default())
}

/// Writes a record and flushes the device.
///
/// # Errors
/// Those of the device. Whether the record was written is then unknown.
pub fn write_durably<R: Record, S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
    lba: Lba,
    record: &R,
) -> io::Result<()> {
    store.write(lba, &seal_block(record, superblock.place(lba)))?;
    store.flush()
}

fn of_slot(records: Vec<HeartbeatRecord>, slot: SlotId) -> Vec<HeartbeatRecord> {
    let mut records = records;
    records.retain(|record| record.owner.slot == slot);
    records
}
