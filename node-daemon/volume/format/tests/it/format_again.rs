//! A device is formatted again after a write of the first `format` has failed, and that write lands late.

use bascule_types::{Lba, SlotId, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, CoordinatorEpoch, FormatRequest, LeaderBlock, MakeError, MemStore,
    OpenError, Superblock, find_unfinished_format, make_volume, read_superblock, seal_block,
};

use crate::fixture::{DEVICE_BYTES, node, owner, request};

/// Another volume than that of the first `format`.
fn again() -> FormatRequest {
    FormatRequest {
        volume: VolumeId::from_bytes([0x12; 16]),
        ..request()
    }
}

/// As by a node that coordinates the volume: blocks that `format` zeroes.
fn use_volume(store: &mut MemStore, superblock: &Superblock) -> Vec<(Lba, [u8; BLOCK_BYTES])> {
    let slots = superblock.slots();
    let leaders = slots.map(|slot: SlotId| {
        let lba = superblock.leader_lba(slot);
        let leader = LeaderBlock {
            epoch: CoordinatorEpoch(5),
            coordinator: owner(slot.0, 6),
        };
        (lba, seal_block(&leader, superblock.place(lba)))
    });
    let mut written: Vec<_> = leaders.collect();
    for (lba, block) in &written {
        store.write(*lba, block).unwrap();
    }
    for area in superblock.areas() {
        let lba = superblock.area(area).head;
        let mut block = [0; BLOCK_BYTES];
        store.read(lba, &mut block).unwrap();
        written.push((lba, block));
    }
    written
}

/// A zero write of the first `format` landed after the second one, and erased what a node had written since.
#[test]
fn no_failed_write_of_an_earlier_format_lands_on_the_volume_of_a_later_one() {
    let mut refused = 0;
    for count in 0.. {
        let mut store = MemStore::new(DEVICE_BYTES / 4096);
        store.fail_once(count);
        match make_volume(&mut store, &request(), Some(node(1))) {
            Ok(_) => {
                assert!(
                    refused > 10 && count > refused,
                    "of {count} failures {refused}"
                );
                return;
            }
            Err(error) => assert!(matches!(error, MakeError::Io(_) | MakeError::Log(_))),
        }
        let waits = find_unfinished_format(&mut store).unwrap();
        if let Some(unfinished) = waits {
            assert_eq!(unfinished.settle, request().timings.settle);
            refused += 1;
            // It is formatted again only after a reset and the settle time.
            store.land_failed(|_| true);
        }
        let superblock = make_volume(&mut store, &again(), Some(node(1))).unwrap();
        let written = use_volume(&mut store, &superblock);
        store.land_failed(|_| true);
        for (lba, before) in written {
            let mut block = [0; BLOCK_BYTES];
            store.read(lba, &mut block).unwrap();
            assert!(
                block == before,
                "failure {count}: block {} was replaced",
                lba.0
            );
        }
        assert_eq!(
            read_superblock(&mut store).unwrap(),
            superblock,
            "failure {count}"
        );
    }
}

#[test]
fn a_device_whose_format_has_not_finished_holds_no_volume_and_a_finished_one_shows_no_trace() {
    let mut store = MemStore::new(DEVICE_BYTES / 4096);
    assert_eq!(find_unfinished_format(&mut store).unwrap(), None);
    store.fail_once(10);
    make_volume(&mut store, &request(), Some(node(1))).unwrap_err();
    let error = read_superblock(&mut store).unwrap_err();
    assert!(matches!(error, OpenError::Unfinished), "{error}");
    make_volume(&mut store, &again(), Some(node(1))).unwrap();
    assert_eq!(find_unfinished_format(&mut store).unwrap(), None);
    // A copy that could not be written, of a volume that can be used.
    let unfinished = bascule_volume_format::UnfinishedFormat {
        settle: request().timings.settle,
    };
    let superblock = read_superblock(&mut store).unwrap();
    let lba = superblock.last_copy();
    store
        .write(lba, &seal_block(&unfinished, superblock.place(lba)))
        .unwrap();
    assert_eq!(read_superblock(&mut store).unwrap(), superblock);
    assert_eq!(
        find_unfinished_format(&mut store).unwrap(),
        Some(unfinished)
    );
}
