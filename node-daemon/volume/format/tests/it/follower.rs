//! A node that follows the metadata sees what recovery sees, and reads only what changed.

use std::collections::BTreeSet;
use std::io;

use bascule_types::{Lba, SlotId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, CoordinatorEpoch, Follower, Log, MemStore, MetaRecord, Metadata,
    Superblock, recover,
};
use proptest::prelude::*;

use crate::crash::history;
use crate::fixture::{commit, formatted};

/// Counts the blocks that are read.
struct Counting {
    store: MemStore,
    blocks_read: usize,
}

impl BlockStore for Counting {
    fn blocks(&mut self) -> io::Result<u64> {
        self.store.blocks()
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.blocks_read += blocks.len() / BLOCK_BYTES;
        self.store.read(lba, blocks)
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        self.store.write(lba, blocks)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.store.flush()
    }
}

/// A volume on which slots coordinate in turn, and a node that follows.
struct Followed {
    store: Counting,
    superblock: Superblock,
    epoch: CoordinatorEpoch,
    log: Log,
    metadata: Metadata,
    /// None after a look that said to recover.
    follower: Option<Follower>,
}

impl Followed {
    fn new() -> Self {
        let (store, superblock) = formatted();
        let mut store = Counting {
            store,
            blocks_read: 0,
        };
        let epoch = CoordinatorEpoch(1);
        let (log, metadata) = start(&mut store, &superblock, SlotId(0), epoch);
        let follower = Some(Follower::from(recover(&mut store, &superblock).unwrap()));
        Self {
            store,
            superblock,
            epoch,
            log,
            metadata,
            follower,
        }
    }

    fn commit(&mut self, group: &[MetaRecord]) {
        commit(&mut self.log, &mut self.store, &mut self.metadata, group).unwrap();
    }

    fn elect(&mut self, slot: SlotId) {
        self.epoch.0 += 1;
        let started = start(&mut self.store, &self.superblock, slot, self.epoch);
        (self.log, self.metadata) = started;
    }

    /// One look. Returns the blocks that it read; none if all rows had to be read.
    fn look(&mut self) -> Option<usize> {
        self.store.blocks_read = 0;
        let follower = self.follower.take().unwrap();
        let followed = follower.follow(&mut self.store, &self.superblock, self.epoch);
        let read = self.store.blocks_read;
        let (follower, is_followed) = match followed.unwrap() {
            Some((follower, _)) => (follower, true),
            None => {
                let recovered = recover(&mut self.store, &self.superblock).unwrap();
                (Follower::from(recovered), false)
            }
        };
        assert_eq!(follower.metadata(), &self.metadata);
        assert_eq!(follower.epoch(), self.epoch);
        self.follower = Some(follower);
        is_followed.then_some(read)
    }
}

fn start(
    store: &mut Counting,
    superblock: &Superblock,
    slot: SlotId,
    epoch: CoordinatorEpoch,
) -> (Log, Metadata) {
    let recovered = recover(store, superblock).unwrap();
    let log = Log::start(
        store,
        superblock,
        &recovered,
        (slot, epoch),
        &BTreeSet::new(),
    );
    (log.unwrap(), recovered.metadata)
}

/// The heads of one slot and, at a change of checkpoint, two chunks of a journal of 16 blocks.
const LOOK_MAX: usize = 2 + 2 * 16;

#[test]
fn a_look_reads_two_heads_and_one_piece_of_the_journal_across_checkpoints_and_elections() {
    let mut followed = Followed::new();
    let groups = history(&followed.superblock);
    for round in 0..4 {
        for group in &groups {
            followed.commit(group);
            let read = followed.look();
            assert!(read.is_some_and(|blocks| blocks <= LOOK_MAX), "{read:?}");
            let again = followed.look();
            assert!(again.is_some_and(|blocks| blocks <= 2 + 16), "{again:?}");
        }
        followed.elect(SlotId(round % 2));
        let heads = 2 * usize::from(followed.superblock.slot_count);
        let read = followed.look();
        assert!(
            read.is_some_and(|blocks| blocks <= heads + 2 * 16),
            "{read:?}"
        );
    }
}

#[test]
fn a_node_that_did_not_look_for_two_checkpoints_reads_all_rows() {
    let mut followed = Followed::new();
    let groups = history(&followed.superblock);
    for group in groups.iter().chain(&groups) {
        followed.commit(group);
    }
    assert_eq!(followed.look(), None);
    followed.commit(&groups[0]);
    assert!(followed.look().is_some());
}

/// A record that the deposed coordinator still wrote is not among those that its successor goes on from.
#[test]
fn what_a_deposed_coordinator_wrote_too_late_is_forgotten() {
    let mut followed = Followed::new();
    let groups = history(&followed.superblock);
    let recovered = recover(&mut followed.store, &followed.superblock).unwrap();
    followed.commit(&groups[0]);
    followed.look();
    let term = (SlotId(1), CoordinatorEpoch(2));
    let superblock = followed.superblock.clone();
    let nothing = BTreeSet::new();
    let log = Log::start(&mut followed.store, &superblock, &recovered, term, &nothing);
    followed.log = log.unwrap();
    followed.epoch = CoordinatorEpoch(2);
    followed.metadata = recovered.metadata;
    assert_eq!(followed.look(), None, "a group too many was applied");
    followed.commit(&groups[0]);
    assert!(followed.look().is_some());
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn it_shows_what_recovery_shows(steps in proptest::collection::vec((0_usize..30, 0_u16..12), 1..40)) {
        let mut followed = Followed::new();
        let groups = history(&followed.superblock);
        for (groups_between, what) in steps {
            if what < 4 {
                followed.elect(SlotId(what));
            }
            for group in groups.iter().take(groups_between) {
                followed.commit(group);
            }
            followed.look();
        }
    }
}
