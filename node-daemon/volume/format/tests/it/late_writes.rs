//! I6 under failed writes: a metadata write that was reported as failed lands later, at any point of
//! the next coordinator's work, followed by a power loss with any subset of the unflushed writes.

use std::collections::BTreeSet;
use std::io;

use bascule_types::{Lba, SlotId};
use bascule_volume_format::{
    BlockStore, CoordinatorEpoch, Log, LogError, MemStore, MetaRecord, Metadata, SlotPart,
    Superblock, check_volume, recover,
};

use crate::crash::{history, run, states, subsets};
use crate::fixture::{commit, formatted};

/// A device on which failed writes land right before operation `land_at`, and which loses power right
/// before operation `cut_at`. Reads count as operations, too.
struct Late {
    store: MemStore,
    landed: Vec<bool>,
    operation: u64,
    land_at: u64,
    cut_at: u64,
}

impl Late {
    fn step(&mut self) -> io::Result<()> {
        if self.operation == self.land_at {
            self.store.land_failed(|index| self.landed[index]);
        }
        if self.operation >= self.cut_at {
            return Err(io::Error::other("power loss"));
        }
        self.operation += 1;
        Ok(())
    }
}

impl BlockStore for Late {
    fn blocks(&mut self) -> io::Result<u64> {
        self.store.blocks()
    }

    fn read(&mut self, lba: Lba, blocks: &mut [u8]) -> io::Result<()> {
        self.step()?;
        self.store.read(lba, blocks)
    }

    fn write(&mut self, lba: Lba, blocks: &[u8]) -> io::Result<()> {
        self.step()?;
        self.store.write(lba, blocks)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.step()?;
        self.store.flush()
    }
}

/// A history of which the first coordinator, of slot 0, acknowledged some groups before a write or
/// flush failed.
struct Scenario<'a> {
    superblock: &'a Superblock,
    groups: &'a [Vec<MetaRecord>],
    states: &'a [Metadata],
    acknowledged: usize,
    next: &'a Next,
}

/// The next coordinator.
struct Next {
    slot: SlotId,
    /// Whether it is told where a failed write of its slot may land.
    knows_failed_writes: bool,
}

impl Scenario<'_> {
    /// The next coordinator recovers and commits up to [`GROUPS`] more groups, until the power loss.
    /// Returns which states the volume may show then.
    fn succeed(&self, store: &mut Late, barred: &BTreeSet<SlotPart>) -> &[Metadata] {
        let in_doubt = self.states.len().min(self.acknowledged + 2);
        let undecided = &self.states[self.acknowledged..in_doubt];
        let Ok(recovered) = recover(store, self.superblock) else {
            return undecided;
        };
        let position = undecided.iter().position(|s| *s == recovered.metadata);
        let mut next = self.acknowledged + position.expect("an acknowledged group was lost");
        let epoch = CoordinatorEpoch(2);
        let term = (self.next.slot, epoch);
        let Ok(mut log) = Log::start(store, self.superblock, &recovered, term, barred) else {
            return undecided;
        };
        let mut metadata = recovered.metadata;
        for group in self.groups[next..].iter().take(GROUPS) {
            if commit(&mut log, store, &mut metadata, group).is_err() {
                return &self.states[next..next + 2];
            }
            next += 1;
        }
        &self.states[next..=next]
    }

    /// Lets the failed write land at `land_at`, cuts the power at `cut_at`, and checks every state
    /// that the power loss may leave. Returns their number, and whether the power was cut.
    fn check(&self, device: &MemStore, (land_at, cut_at): (u64, u64)) -> (u64, bool) {
        let slot = self.next.slot;
        let failed = device.failed().iter();
        let failed = failed.filter_map(|(lba, _)| self.superblock.slot_part(*lba));
        let barred = failed
            .filter(|(of, _)| *of == slot && self.next.knows_failed_writes)
            .map(|(_, part)| part)
            .collect();
        let mut checked = 0;
        let mut was_cut = false;
        for landed in subsets(device.failed().len()) {
            let mut store = Late {
                store: device.clone(),
                landed: landed.clone(),
                operation: 0,
                land_at,
                cut_at,
            };
            let allowed = self.succeed(&mut store, &barred);
            was_cut |= store.operation == cut_at;
            if store.operation < land_at {
                store.store.land_failed(|index| landed[index]);
            }
            for kept in subsets(store.store.unflushed().len()) {
                let story = format!(
                    "{} acknowledged, {landed:?} landed before operation {land_at} of {slot:?}, \
                     power loss before {cut_at}, {kept:?} kept",
                    self.acknowledged
                );
                let mut crashed = store.store.crashed(|index| kept[index]);
                let found = recover(&mut crashed, self.superblock)
                    .unwrap_or_else(|error| panic!("{story}: {error}"));
                assert!(allowed.contains(&found.metadata), "{story}");
                checked += 1;
            }
            let mut last = store.store.crashed(|_| true);
            let report = check_volume(&mut last).unwrap();
            let damage = report
                .findings
                .iter()
                .find(|finding| !finding.text.contains("coordinator epoch"));
            assert_eq!(damage, None);
        }
        (checked, was_cut)
    }
}

/// For each write and flush of the first coordinator: a device on which that one failed, and how many
/// groups were acknowledged before.
fn failures(
    pristine: &MemStore,
    superblock: &Superblock,
    groups: &[Vec<MetaRecord>],
) -> Vec<(MemStore, usize)> {
    let mut failures = Vec::new();
    for operation in 0.. {
        let mut store = pristine.clone();
        store.fail_once(operation);
        let acknowledged = run(&mut store, superblock, groups);
        if acknowledged == groups.len() {
            return failures;
        }
        failures.push((store, acknowledged));
    }
    failures
}

fn check_all(next: &Next, land_ats: &[u64]) -> u64 {
    let (pristine, superblock) = formatted();
    let groups = history(&superblock);
    let states = states(&superblock, &groups);
    let mut checked = 0;
    for (device, acknowledged) in failures(&pristine, &superblock, &groups) {
        let scenario = Scenario {
            superblock: &superblock,
            groups: &groups,
            states: &states,
            acknowledged,
            next,
        };
        for &land_at in land_ats {
            for cut_at in land_at.. {
                let (count, was_cut) = scenario.check(&device, (land_at, cut_at));
                checked += count;
                if !was_cut {
                    break;
                }
            }
        }
    }
    checked
}

#[test]
fn i6_a_failed_write_that_lands_during_another_nodes_term_changes_nothing_acknowledged() {
    let next = Next {
        slot: SlotId(1),
        knows_failed_writes: false,
    };
    let checked = check_all(&next, &EVERY_THIRD);
    println!("{checked} crash states");
    assert!(checked > 5000, "only {checked} crash states");
}

#[test]
fn i6_a_failed_write_that_landed_before_the_same_slot_coordinates_again_loses_nothing() {
    let next = Next {
        slot: SlotId(0),
        knows_failed_writes: false,
    };
    let checked = check_all(&next, &[0]);
    println!("{checked} crash states");
    assert!(checked > 2000, "only {checked} crash states");
}

/// Regression: a process did not know which metadata writes of its predecessor had failed.
#[test]
fn i6_a_failed_write_that_lands_while_the_same_slot_coordinates_again_loses_nothing() {
    let next = Next {
        slot: SlotId(0),
        knows_failed_writes: true,
    };
    let checked = check_all(&next, &EVERY_THIRD);
    println!("{checked} crash states");
    assert!(checked > 5000, "only {checked} crash states");
}

#[test]
#[should_panic(expected = "landed before operation")]
fn a_slot_that_does_not_know_its_failed_writes_loses_metadata() {
    let next = Next {
        slot: SlotId(0),
        knows_failed_writes: false,
    };
    check_all(&next, &EVERY_THIRD);
}

#[test]
fn a_coordinator_never_writes_an_area_where_a_failed_write_may_land() {
    let (mut store, superblock) = formatted();
    let groups = history(&superblock);
    let recovered = recover(&mut store, &superblock).unwrap();
    let (slot, epoch) = (recovered.area.slot, CoordinatorEpoch(1));
    let start = |store: &mut MemStore, slot, half| {
        let barred = BTreeSet::from([SlotPart::Area(half)]);
        Log::start(store, &superblock, &recovered, (slot, epoch), &barred)
    };
    // The base is in half 0 of slot 0.
    let refused = start(&mut store, slot, 1).unwrap_err();
    assert!(matches!(refused, LogError::Barred { half: 1, .. }));
    for (slot, half, used) in [(slot, 0, 1), (SlotId(1), 0, 1), (SlotId(1), 1, 0)] {
        let mut store = store.clone();
        let mut log = start(&mut store, slot, half).unwrap();
        let mut metadata = recovered.metadata.clone();
        let end = groups.iter().cycle().find_map(|group| {
            let committed = commit(&mut log, &mut store, &mut metadata, group);
            committed.err()
        });
        assert!(matches!(end, Some(LogError::Barred { .. })), "{end:?}");
        let found = recover(&mut store, &superblock).unwrap();
        assert_eq!((found.area.slot, found.area.half), (slot, used));
        assert_eq!(found.metadata, metadata);
    }
}

/// Every third operation, to keep a test within seconds.
const EVERY_THIRD: [u64; 10] = [0, 3, 6, 9, 12, 15, 18, 21, 24, 27];
/// Groups that the next coordinator commits.
const GROUPS: usize = 2;
