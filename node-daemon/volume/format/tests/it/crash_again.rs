//! I6 after two crashes in a row: at any write of a coordinator and then of the next one, in elections, and
//! while a volume is repaired. Each loses any subset of the unflushed writes.

use std::collections::BTreeSet;

use bascule_types::{Lba, SlotId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, CoordinatorEpoch, Log, MemStore, MetaRecord, Metadata, Repair,
    Severity, Superblock, check_volume, plan_repair, read_leaders, read_superblock, recover,
};

use crate::crash::{history, run, states, subsets};
use crate::damage::{Acknowledged, TERMS, coordinate, coordinated, heads, leaders, read};
use crate::fixture::{commit, formatted};

/// Every device that a power loss may leave of `store`.
pub(crate) fn crashed(store: &MemStore) -> Vec<(MemStore, Vec<bool>)> {
    let kept = subsets(store.unflushed().len()).into_iter();
    kept.map(|kept| (store.crashed(|index| kept[index]), kept))
        .collect()
}

/// Calls `attempt` with a device that fails after 0, 1, 2 … operations, until it says that none failed.
pub(crate) fn fail_everywhere(
    device: &MemStore,
    mut attempt: impl FnMut(&mut MemStore, u64) -> bool,
) {
    for budget in 0.. {
        let mut store = device.clone();
        store.fail_after(budget);
        if attempt(&mut store, budget) {
            return;
        }
    }
}

/// The next coordinator commits up to [`GROUPS`] groups from `next` on. Returns the number of those that are
/// acknowledged then, and whether nothing failed.
fn go_on(
    store: &mut MemStore,
    superblock: &Superblock,
    slot: SlotId,
    groups: &[Vec<MetaRecord>],
    next: usize,
) -> (usize, bool) {
    let recovered = recover(store, superblock).unwrap();
    let term = (slot, CoordinatorEpoch(2));
    let Ok(mut log) = Log::start(store, superblock, &recovered, term, &BTreeSet::new()) else {
        return (next, false);
    };
    let mut metadata = recovered.metadata;
    let mut done = next;
    for group in groups[next..].iter().take(GROUPS) {
        if commit(&mut log, store, &mut metadata, group).is_err() {
            return (done, false);
        }
        done += 1;
    }
    (done, true)
}

fn assert_one_of(store: &mut MemStore, superblock: &Superblock, allowed: &[Metadata], story: &str) {
    let found = recover(store, superblock).unwrap_or_else(|error| panic!("{story}: {error}"));
    assert!(allowed.contains(&found.metadata), "{story}");
}

fn assert_undamaged(store: &mut MemStore, story: &str) {
    let report = check_volume(store).unwrap();
    let mut findings = report.findings.iter();
    // A journal of an epoch that the history does not elect.
    let damage = findings.find(|finding| !finding.text.contains("coordinator epoch"));
    assert_eq!(damage, None, "{story}");
}

/// The second crash of a coordinator of `slot`. Returns how many crashes there were.
fn crash_twice(slot: SlotId) -> u64 {
    let (pristine, superblock) = formatted();
    let groups = history(&superblock);
    let states = states(&superblock, &groups);
    let mut crashes = 0;
    fail_everywhere(&pristine, |store, first| {
        let acknowledged = run(store, &superblock, &groups);
        for (mut device, kept) in crashed(store) {
            let found = recover(&mut device, &superblock).unwrap().metadata;
            let position = states[acknowledged..].iter().position(|s| *s == found);
            let next = acknowledged + position.unwrap();
            fail_everywhere(&device, |store, second| {
                let story =
                    format!("failed after {first} operations, kept {kept:?}, after {second} more");
                let (done, is_complete) = go_on(store, &superblock, slot, &groups, next);
                let most = states.len().min(done + 2 - usize::from(is_complete));
                for (mut device, kept) in crashed(store) {
                    let story = format!("{story}, kept {kept:?}");
                    assert_one_of(&mut device, &superblock, &states[done..most], &story);
                    crashes += 1;
                }
                assert_undamaged(&mut store.crashed(|_| true), &story);
                is_complete
            });
        }
        acknowledged == groups.len()
    });
    crashes
}

/// A journal that fills its area several times goes on behind another checkpoint each time.
#[test]
fn i6_a_crash_at_any_write_of_a_long_term_with_several_checkpoints_loses_nothing() {
    let (pristine, superblock) = formatted();
    let once = history(&superblock);
    let groups: Vec<_> = (0..5).flat_map(|_| once.clone()).collect();
    let states = states(&superblock, &groups);
    let (mut crashes, mut checkpoints) = (0, 0);
    fail_everywhere(&pristine, |store, budget| {
        let done = run(store, &superblock, &groups);
        let most = states.len().min(done + 2);
        for (mut device, kept) in crashed(store) {
            let story = format!("failed after {budget} operations, kept {kept:?}");
            assert_one_of(&mut device, &superblock, &states[done..most], &story);
            crashes += 1;
        }
        let mut last = store.crashed(|_| true);
        checkpoints = recover(&mut last, &superblock).unwrap().base.number;
        assert_undamaged(&mut last, &format!("failed after {budget} operations"));
        done == groups.len()
    });
    println!("{crashes} crashes, {checkpoints} checkpoints");
    assert!(
        crashes > 300 && checkpoints > 2,
        "only {crashes} crashes, {checkpoints} checkpoints"
    );
}

#[test]
fn i6_a_second_crash_while_the_same_slot_coordinates_again_loses_nothing() {
    let crashes = crash_twice(SlotId(0));
    println!("{crashes} crashes");
    assert!(crashes > 1500, "only {crashes} crashes");
}

#[test]
fn i6_a_second_crash_while_another_slot_coordinates_loses_nothing() {
    let crashes = crash_twice(SlotId(1));
    println!("{crashes} crashes");
    assert!(crashes > 1500, "only {crashes} crashes");
}

/// What was acknowledged is there, and at most one step more.
fn assert_led(
    store: &mut MemStore,
    superblock: &Superblock,
    states: &[Metadata],
    acknowledged: Acknowledged,
    story: &str,
) {
    let Acknowledged { led, groups } = acknowledged;
    let newest = read_leaders(store, superblock).unwrap().newest();
    let epoch = newest.map(|leader| leader.epoch).unwrap_or_default();
    assert!((led.0..=led.0 + 1).contains(&epoch.0), "{story}: {epoch}");
    let allowed = &states[groups..states.len().min(groups + 2)];
    assert_one_of(store, superblock, allowed, story);
}

#[test]
fn i6_two_crashes_at_any_write_of_elections_and_terms_lose_nothing() {
    let (pristine, superblock) = formatted();
    let groups = history(&superblock);
    let states = states(&superblock, &groups);
    let mut crashes = 0;
    fail_everywhere(&pristine, |store, first| {
        let (acknowledged, is_complete) = coordinated(store, &superblock, &TERMS[..4], 2);
        for (mut device, kept) in crashed(store) {
            let story = format!("failed after {first} operations, kept {kept:?}");
            assert_led(&mut device, &superblock, &states, acknowledged, &story);
            let found = recover(&mut device, &superblock).unwrap().metadata;
            let position = states[acknowledged.groups..]
                .iter()
                .position(|s| *s == found);
            let next = Acknowledged {
                groups: acknowledged.groups + position.unwrap(),
                ..acknowledged
            };
            // The epoch that was begun last may be led, or not.
            let term = (SlotId(3), CoordinatorEpoch(acknowledged.led.0 + 2));
            let rest = &groups[next.groups..next.groups + 2];
            fail_everywhere(&device, |store, second| {
                let mut done = next;
                let complete = coordinate(store, &superblock, term, rest, &mut done).is_some();
                for (mut device, kept) in crashed(store) {
                    let story = format!("{story}, failed after {second} more, kept {kept:?}");
                    let allowed = &states[done.groups..states.len().min(done.groups + 2)];
                    assert_one_of(&mut device, &superblock, allowed, &story);
                    let newest = read_leaders(&mut device, &superblock).unwrap().newest();
                    assert!(newest.map(|leader| leader.epoch).unwrap_or_default() >= done.led);
                    crashes += 1;
                }
                complete
            });
        }
        is_complete
    });
    println!("{crashes} crashes");
    assert!(crashes > 2000, "only {crashes} crashes");
}

/// A volume of which a superblock, a leader block and a checkpoint head may be damaged.
fn damaged_volumes(store: &MemStore, superblock: &Superblock) -> Vec<MemStore> {
    let with_none = |lbas: Vec<Lba>| {
        let some = lbas.into_iter().map(Some);
        some.chain([None]).collect::<Vec<_>>()
    };
    let mut volumes = Vec::new();
    for first in with_none(superblock.copy_lbas().to_vec()) {
        for second in with_none(leaders(superblock)) {
            for third in with_none(heads(superblock)) {
                let mut damaged = store.clone();
                for lba in [first, second, third].into_iter().flatten() {
                    let mut block = [0; BLOCK_BYTES];
                    damaged.read(lba, &mut block).unwrap();
                    block[59] ^= 1;
                    damaged.write(lba, &block).unwrap();
                }
                damaged.flush().unwrap();
                volumes.push(damaged);
            }
        }
    }
    volumes
}

/// The repair of what a crash has left of a repair ends with the acknowledged metadata.
fn assert_repaired(
    store: &mut MemStore,
    superblock: &Superblock,
    expected: &Metadata,
    story: &str,
) {
    assert_eq!(&read_superblock(store).unwrap(), superblock, "{story}");
    let repair = plan_repair(store).unwrap();
    assert!(repair.refused.is_empty(), "{story}: {repair:?}");
    repair.perform(store).unwrap();
    let found = read(store, superblock).map(|(metadata, _)| metadata);
    assert_eq!(found.as_ref(), Some(expected), "{story}");
    assert_eq!(plan_repair(store).unwrap(), Repair::default(), "{story}");
    let report = check_volume(store).unwrap();
    assert_ne!(report.worst(), Some(Severity::Error), "{story}: {report:?}");
}

#[test]
fn i6_a_repair_that_crashes_or_whose_failed_writes_land_late_is_repaired_by_the_next_one() {
    let (mut store, superblock) = formatted();
    assert!(coordinated(&mut store, &superblock, &TERMS, 3).1);
    let (expected, _) = read(&mut store, &superblock).unwrap();
    let mut crashes = 0;
    for damaged in damaged_volumes(&store, &superblock) {
        let repair = plan_repair(&mut damaged.clone()).unwrap();
        if !repair.refused.is_empty() {
            continue;
        }
        fail_everywhere(&damaged, |store, budget| {
            let complete = repair.perform(store).is_ok();
            for (mut device, kept) in crashed(store) {
                let story = format!("{repair:?} failed after {budget} operations, kept {kept:?}");
                assert_repaired(&mut device, &superblock, &expected, &story);
                crashes += 1;
            }
            // A second attempt; then the failed writes land.
            let mut again = damaged.clone();
            again.fail_once(budget);
            if repair.perform(&mut again).is_err() {
                let story = format!("operation {budget} of {repair:?} failed and landed late");
                assert_repaired(&mut again, &superblock, &expected, &story);
                again.land_failed(|_| true);
                for (mut device, _) in crashed(&again) {
                    assert_repaired(&mut device, &superblock, &expected, &story);
                    crashes += 1;
                }
            }
            complete
        });
    }
    println!("{crashes} crashes");
    assert!(crashes > 1000, "only {crashes} crashes");
}

/// Groups that the next coordinator commits.
const GROUPS: usize = 6;
