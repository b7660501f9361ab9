//! I6: after a crash at any write, with any subset of the unflushed writes lost, the volume holds
//! exactly the acknowledged changes, plus at most the one in flight.

use std::collections::BTreeSet;

use crate::fixture::{Cluster, DEVICE_BYTES, commit, formatted, name, node, owner, request, vm};
use bascule_types::{Bytes, Change, DiskRole, Epoch, Lba, SlotId, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BlockStore, CoordinatorEpoch, FormatRequest, Log, LogError, MemStore, MetaRecord,
    Metadata, Severity, Superblock, check_volume, make_volume, read_superblock, recover,
};

/// The record groups of a small history: nodes join, VMs come, run, move and go.
pub(crate) fn history(superblock: &Superblock) -> Vec<Vec<MetaRecord>> {
    let mut cluster = Cluster::of(superblock);
    let mut groups = vec![cluster.metadata.rows().collect::<Vec<_>>()];
    let mut step = |cluster: &mut Cluster, change: &Change| {
        let before = cluster.metadata.clone();
        cluster.ask(1, change).unwrap();
        groups.push(difference(&before, &cluster.metadata));
    };
    for n in 1..=6 {
        let create = Change::CreateVm {
            vm: vm(n),
            name: name(&format!("shop/web-{n}")),
            spec_digest: [n; 32],
        };
        step(&mut cluster, &create);
        let disk = Change::CreateDisk {
            vm: vm(n),
            name: name(&format!("shop/disk-{n}")),
            size: Bytes::mib(2),
            role: DiskRole::Data,
            importing: true,
        };
        step(&mut cluster, &disk);
        let acquire = Change::Acquire {
            vm: vm(n),
            expected_epoch: Epoch(0),
            to: owner(0, 1),
        };
        step(&mut cluster, &acquire);
    }
    groups
}

/// Row by row, what became of the metadata: the same as what was decided, in groups of two and
/// more where several rows changed.
fn difference(before: &Metadata, after: &Metadata) -> Vec<MetaRecord> {
    let old: Vec<MetaRecord> = before.rows().collect();
    after.rows().filter(|row| !old.contains(row)).collect()
}

/// Every state that the history passes through, the first being the freshly formatted one.
pub(crate) fn states(superblock: &Superblock, groups: &[Vec<MetaRecord>]) -> Vec<Metadata> {
    let (mut store, _) = formatted();
    let mut metadata = recover(&mut store, superblock).unwrap().metadata;
    let mut states = vec![metadata.clone()];
    for group in groups {
        for record in group {
            metadata.apply(record).unwrap();
        }
        states.push(metadata.clone());
    }
    states
}

/// Runs the history until the device fails. Returns how many groups were acknowledged.
pub(crate) fn run(
    store: &mut MemStore,
    superblock: &Superblock,
    groups: &[Vec<MetaRecord>],
) -> usize {
    let Ok(recovered) = recover(store, superblock) else {
        return 0;
    };
    let epoch = CoordinatorEpoch(recovered.base.epoch.0 + 1);
    let Ok(mut log) = Log::start(
        store,
        superblock,
        &recovered,
        (SlotId(0), epoch),
        &BTreeSet::new(),
    ) else {
        return 0;
    };
    let mut metadata = recovered.metadata;
    for (index, group) in groups.iter().enumerate() {
        if commit(&mut log, store, &mut metadata, group).is_err() {
            let again = commit(&mut log, store, &mut metadata, group);
            assert!(matches!(again, Err(LogError::Failed)), "sticky: {again:?}");
            return index;
        }
    }
    groups.len()
}

fn assert_recovers(
    mut store: MemStore,
    superblock: &Superblock,
    states: &[Metadata],
    acknowledged: usize,
    story: &str,
) {
    let found = recover(&mut store, superblock)
        .unwrap_or_else(|error| panic!("{story}: {error}"))
        .metadata;
    let allowed = &states[acknowledged..states.len().min(acknowledged + 2)];
    assert!(
        allowed.contains(&found),
        "{story}: neither the {acknowledged} acknowledged groups nor one more"
    );
    let report = check_volume(&mut store).unwrap();
    let rotten = report
        .findings
        .iter()
        .find(|f| !f.text.contains("coordinator epoch"));
    assert_eq!(rotten, None, "{story}");
}

/// Which of `count` unflushed writes survive: all subsets of few, and for many the ones in which
/// a prefix, a suffix, a single one or all but one survive.
pub(crate) fn subsets(count: usize) -> Vec<Vec<bool>> {
    if count <= 6 {
        let all = 0..(1_usize << count);
        return all
            .map(|bits| (0..count).map(|i| bits >> i & 1 == 1).collect())
            .collect();
    }
    let mut subsets = Vec::new();
    for at in 0..=count {
        subsets.push((0..count).map(|i| i < at).collect());
        subsets.push((0..count).map(|i| i >= at).collect());
        subsets.push((0..count).map(|i| i == at).collect());
        subsets.push((0..count).map(|i| i != at).collect());
    }
    subsets
}

/// Commits `groups` to copies of `store` that fail after each number of operations, and recovers from every subset of
/// what was unflushed then; `states` are the rows after each number of groups. Returns how many crashes were tried.
fn crash_at_any_write(
    store: &MemStore,
    superblock: &Superblock,
    groups: &[Vec<MetaRecord>],
    states: &[Metadata],
) -> usize {
    let mut crashes = 0;
    for budget in 0.. {
        let mut store = store.clone();
        store.fail_after(budget);
        let acknowledged = run(&mut store, superblock, groups);
        for subset in subsets(store.unflushed().len()) {
            let story = format!("failed after {budget} operations, kept {subset:?}");
            let crashed = store.crashed(|index| subset[index]);
            assert_recovers(crashed, superblock, states, acknowledged, &story);
            crashes += 1;
        }
        if acknowledged == groups.len() {
            break;
        }
    }
    crashes
}

#[test]
fn i6_a_volume_is_consistent_after_a_crash_at_any_write() {
    let (pristine, superblock) = formatted();
    let groups = history(&superblock);
    assert!(groups.iter().any(|group| group.len() > 1), "groups of many");
    let crashes = crash_at_any_write(
        &pristine,
        &superblock,
        &groups,
        &states(&superblock, &groups),
    );
    println!("{crashes} crashes");
    assert!(crashes > 60, "only {crashes} crashes tried");
}

#[test]
fn i6_a_crash_of_the_next_coordinator_loses_nothing_either() {
    let (mut store, superblock) = formatted();
    let groups = history(&superblock);
    let half = groups.len() / 2;
    assert_eq!(run(&mut store, &superblock, &groups[..half]), half);
    let states = &states(&superblock, &groups)[half..];
    crash_at_any_write(&store, &superblock, &groups[half..], states);
}

#[test]
fn what_a_deposed_coordinator_still_journals_is_not_read() {
    let (mut store, superblock) = formatted();
    let groups = history(&superblock);
    let recovered = recover(&mut store, &superblock).unwrap();
    let (slot_0, slot_1) = (SlotId(0), SlotId(1));
    let epoch = CoordinatorEpoch;
    let mut old = Log::start(
        &mut store,
        &superblock,
        &recovered,
        (slot_0, epoch(1)),
        &BTreeSet::new(),
    )
    .unwrap();
    let mut old_rows = recovered.metadata;
    commit(&mut old, &mut store, &mut old_rows, &groups[0]).unwrap();
    let recovered = recover(&mut store, &superblock).unwrap();
    let mut new = Log::start(
        &mut store,
        &superblock,
        &recovered,
        (slot_1, epoch(2)),
        &BTreeSet::new(),
    )
    .unwrap();
    let mut rows = recovered.metadata;
    for _ in 0..40 {
        // Through several of its checkpoints, too.
        for group in &groups[1..] {
            commit(&mut old, &mut store, &mut old_rows, group).unwrap();
        }
    }
    commit(&mut new, &mut store, &mut rows, &groups[1]).unwrap();
    assert_eq!(recover(&mut store, &superblock).unwrap().metadata, rows);
}

#[test]
fn a_journal_longer_than_its_area_goes_on_behind_a_checkpoint() {
    let (mut store, superblock) = formatted();
    let groups = history(&superblock);
    let recovered = recover(&mut store, &superblock).unwrap();
    let epoch = CoordinatorEpoch(1);
    let mut log = Log::start(
        &mut store,
        &superblock,
        &recovered,
        (SlotId(0), epoch),
        &BTreeSet::new(),
    )
    .unwrap();
    let mut rows = recovered.metadata;
    for _ in 0..5 {
        for group in &groups {
            commit(&mut log, &mut store, &mut rows, group).unwrap();
        }
    }
    let found = recover(&mut store, &superblock).unwrap();
    assert!(found.base.number > 2, "{:?}", found.base);
    assert_eq!(found.metadata, rows);
}

#[test]
fn a_damaged_journal_record_with_later_ones_behind_it_is_not_a_crash() {
    let (mut store, superblock) = formatted();
    let groups = history(&superblock);
    run(&mut store, &superblock, &groups[..6]);
    let found = recover(&mut store, &superblock).unwrap();
    let journal = superblock.area(found.area).journal;
    let mut block = [0; 4096];
    store.read(journal, &mut block).unwrap();
    block[100] ^= 1;
    store.write(journal, &block).unwrap();
    let error = recover(&mut store, &superblock).unwrap_err();
    assert!(
        matches!(error, LogError::Hole { sequence: 0, .. }),
        "{error}"
    );
}

/// Groups of several requests each, as the coordinator joins those that wait: later ones build on earlier ones.
fn joined(groups: &[Vec<MetaRecord>]) -> Vec<Vec<MetaRecord>> {
    let sizes = [1, 3, 9, 2].into_iter().cycle();
    let mut rest = groups;
    let mut joined = Vec::new();
    for size in sizes {
        let (some, more) = rest.split_at(rest.len().min(size));
        if some.is_empty() {
            return joined;
        }
        joined.push(some.concat());
        rest = more;
    }
    joined
}

#[test]
fn i6_a_group_of_many_requests_takes_effect_as_a_whole_or_not_at_all() {
    let (pristine, superblock) = formatted();
    let once = history(&superblock);
    let groups: Vec<_> = (0..6).flat_map(|_| joined(&once)).collect();
    let widest = groups.iter().map(Vec::len).max().unwrap();
    assert!(widest > 8, "only {widest} records: a single block");
    let crashes = crash_at_any_write(
        &pristine,
        &superblock,
        &groups,
        &states(&superblock, &groups),
    );
    println!("{crashes} crashes");
    assert!(crashes > 100, "only {crashes} crashes tried");
}

/// A device with blocks of 512 bytes may keep any of the records of a group.
#[test]
fn i6_a_group_of_which_any_record_is_missing_has_no_effect() {
    let (mut store, superblock) = formatted();
    let groups = joined(&history(&superblock));
    run(&mut store, &superblock, &groups[..2]);
    let before = recover(&mut store, &superblock).unwrap();
    let mut after = before.metadata.clone();
    for record in &groups[2] {
        after.apply(record).unwrap();
    }
    assert_eq!(run(&mut store, &superblock, &groups[2..3]), 1);
    let found = recover(&mut store, &superblock).unwrap();
    assert_eq!(found.metadata, after);
    let first = superblock.area(found.area).journal;
    for index in 0..groups[2].len() {
        let mut torn = store.clone();
        let lba = Lba(first.0 + index as u64 / 8);
        let mut block = [0; BLOCK_BYTES];
        torn.read(lba, &mut block).unwrap();
        block[index % 8 * 512..][..512].fill(0);
        torn.write(lba, &block).unwrap();
        let found = recover(&mut torn, &superblock).unwrap();
        assert_eq!(found.metadata, before.metadata, "without record {index}");
    }
}

/// Regression: a record that this release does not know ended the journal, and everything behind it was lost.
#[test]
fn a_journal_record_of_a_later_release_is_refused_and_does_not_end_the_journal() {
    let (mut store, superblock) = formatted();
    let groups = history(&superblock);
    run(&mut store, &superblock, &groups[..6]);
    let found = recover(&mut store, &superblock).unwrap();
    let last = Lba(superblock.area(found.area).journal.0 + found.journaled - 1);
    // The record's type, its version, the version of the block.
    for offset in [66, 67, 6] {
        let mut store = store.clone();
        let mut block = [0; BLOCK_BYTES];
        store.read(last, &mut block).unwrap();
        block[offset] = 99;
        block[8..12].fill(0);
        let crc = crc32c::crc32c(&block[..512]);
        block[8..12].copy_from_slice(&crc.to_le_bytes());
        store.write(last, &block).unwrap();
        let error = recover(&mut store, &superblock).unwrap_err();
        assert!(matches!(error, LogError::Damaged { .. }), "{error}");
    }
}

/// A device that was a volume of another id, with rows of its own.
fn old_volume() -> (MemStore, Superblock) {
    let mut store = MemStore::new(DEVICE_BYTES / 4096);
    let request = FormatRequest {
        volume: VolumeId::from_bytes([0x99; 16]),
        ..request()
    };
    let superblock = make_volume(&mut store, &request, Some(node(1))).unwrap();
    let groups = history(&superblock);
    assert_eq!(run(&mut store, &superblock, &groups), groups.len());
    (store, superblock)
}

/// After a crash of `format`: no volume, the untouched old one, or the complete new one.
fn assert_no_mixture(mut crashed: MemStore, old: (&Superblock, &Metadata), made: bool) {
    let superblock = match read_superblock(&mut crashed) {
        Ok(superblock) => superblock,
        Err(error) => {
            assert!(!made, "acknowledged and lost: {error}");
            return;
        }
    };
    let found = recover(&mut crashed, &superblock).unwrap().metadata;
    if superblock.volume == old.0.volume {
        assert!(!made, "acknowledged, and the old volume is back");
        assert_eq!(&found, old.1);
    } else {
        assert_eq!(found.row_count(), 1, "the first node's slot");
        let report = check_volume(&mut crashed).unwrap();
        assert_ne!(report.worst(), Some(Severity::Error), "{report:?}");
    }
}

#[test]
fn a_crash_while_formatting_leaves_no_volume_the_old_one_or_the_complete_new_one() {
    let (old, old_superblock) = old_volume();
    let old_rows = recover(&mut old.clone(), &old_superblock).unwrap().metadata;
    let mut crashes = 0;
    for device in [old, MemStore::new(DEVICE_BYTES / 4096)] {
        for budget in 0.. {
            let mut store = device.clone();
            store.fail_after(budget);
            let made = make_volume(&mut store, &request(), Some(node(1))).is_ok();
            for subset in subsets(store.unflushed().len()) {
                let crashed = store.crashed(|index| subset[index]);
                assert_no_mixture(crashed, (&old_superblock, &old_rows), made);
                crashes += 1;
            }
            if made {
                break;
            }
        }
    }
    println!("{crashes} crashes");
    assert!(crashes > 4000, "only {crashes} crash states");
}

/// `format` gives up with the first error. The write that failed lands later, before or after the power loss.
#[test]
fn a_failed_write_of_a_format_that_lands_later_leaves_no_volume_the_old_one_or_the_new_one() {
    let (old, old_superblock) = old_volume();
    let old_rows = recover(&mut old.clone(), &old_superblock).unwrap().metadata;
    let mut crashes = 0;
    for budget in 0.. {
        let mut store = old.clone();
        store.fail_once(budget);
        let made = make_volume(&mut store, &request(), Some(node(1))).is_ok();
        store.land_failed(|_| true);
        for kept in subsets(store.unflushed().len()) {
            let crashed = store.crashed(|index| kept[index]);
            assert_no_mixture(crashed, (&old_superblock, &old_rows), made);
            crashes += 1;
        }
        if made {
            break;
        }
    }
    println!("{crashes} crashes");
    assert!(crashes > 2000, "only {crashes} crashes");
}
