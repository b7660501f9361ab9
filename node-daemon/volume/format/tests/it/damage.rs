//! One damaged leader block or checkpoint head: it is ignored because something newer can be read,
//! repaired to the same metadata, or refused. Never does an older state come back.

use std::collections::BTreeSet;

use bascule_types::{Lba, SlotId};
use bascule_volume_format::{
    Accepted, BLOCK_BYTES, BlockStore, CoordinatorEpoch, LeaderBlock, Log, MemStore, MetaRecord,
    Metadata, PaxosBlock, Record, Repair, Repaired, Severity, Superblock, check_volume,
    plan_repair, read_leaders, recover, seal_block,
};

use crate::crash::history;
use crate::fixture::{commit, formatted, owner};

/// Slots that coordinate in turn, from epoch 1 on.
pub(crate) const TERMS: [u16; 5] = [0, 1, 0, 2, 2];

/// What was acknowledged.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Acknowledged {
    /// The epoch whose leader block is durable.
    pub(crate) led: CoordinatorEpoch,
    pub(crate) groups: usize,
}

/// `slot` wins `epoch` and commits `groups`. Ends early when the device fails.
pub(crate) fn coordinate(
    store: &mut MemStore,
    superblock: &Superblock,
    (slot, epoch): (SlotId, CoordinatorEpoch),
    groups: &[Vec<MetaRecord>],
    acknowledged: &mut Acknowledged,
) -> Option<()> {
    let coordinator = owner(slot.0, 1);
    let slots = u64::from(superblock.slot_count);
    let ballot = epoch.0 * slots + u64::from(slot.0);
    let mut block = PaxosBlock {
        instance: epoch,
        writer: coordinator,
        mbal: ballot,
        accepted: None,
    };
    let paxos = superblock.paxos_lba(slot, ballot / slots);
    write(store, superblock, paxos, &block)?;
    block.accepted = Some(Accepted {
        bal: ballot,
        value: coordinator,
    });
    write(store, superblock, paxos, &block)?;
    let leader = LeaderBlock { epoch, coordinator };
    write(store, superblock, superblock.leader_lba(slot), &leader)?;
    acknowledged.led = epoch;
    let recovered = recover(store, superblock).ok()?;
    let barred = BTreeSet::new();
    let mut log = Log::start(store, superblock, &recovered, (slot, epoch), &barred).ok()?;
    let mut metadata = recovered.metadata;
    for group in groups {
        commit(&mut log, store, &mut metadata, group).ok()?;
        acknowledged.groups += 1;
    }
    Some(())
}

fn write<R: Record>(
    store: &mut MemStore,
    superblock: &Superblock,
    lba: Lba,
    record: &R,
) -> Option<()> {
    let block = seal_block(record, superblock.place(lba));
    store.write(lba, &block).ok()?;
    store.flush().ok()
}

/// A volume after some terms, or as many of them as the device allows. Whether it allowed them all.
pub(crate) fn coordinated(
    store: &mut MemStore,
    superblock: &Superblock,
    terms: &[u16],
    groups: usize,
) -> (Acknowledged, bool) {
    let mut acknowledged = Acknowledged::default();
    let history = history(superblock);
    let mut rest = history.iter().cycle();
    for (epoch, slot) in (1..).zip(terms) {
        let groups: Vec<_> = rest.by_ref().take(groups).cloned().collect();
        let term = (SlotId(*slot), CoordinatorEpoch(epoch));
        if coordinate(store, superblock, term, &groups, &mut acknowledged).is_none() {
            return (acknowledged, false);
        }
    }
    (acknowledged, true)
}

/// What is read of a volume, if that is not refused.
pub(crate) fn read<S: BlockStore>(
    store: &mut S,
    superblock: &Superblock,
) -> Option<(Metadata, CoordinatorEpoch)> {
    let leaders = read_leaders(store, superblock).ok()?;
    let newest = leaders.newest().map(|leader| leader.epoch);
    let metadata = recover(store, superblock).ok()?.metadata;
    Some((metadata, newest.unwrap_or_default()))
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Ignored,
    Repaired,
    Refused,
}

/// Damages one block, and checks everything that may become of it.
fn damage(store: &MemStore, superblock: &Superblock, lba: Lba, how: &[u8]) -> Outcome {
    let expected = read(&mut store.clone(), superblock).unwrap();
    let mut damaged = store.clone();
    let mut block = [0; BLOCK_BYTES];
    damaged.read(lba, &mut block).unwrap();
    for (byte, damage) in block.iter_mut().zip(how) {
        *byte ^= damage;
    }
    damaged.write(lba, &block).unwrap();
    damaged.flush().unwrap();
    let seen = read(&mut damaged, superblock);
    let report = check_volume(&mut damaged).unwrap();
    let worst = report.worst();
    let repair = plan_repair(&mut damaged).unwrap();
    if seen.is_some() {
        assert_eq!(seen.as_ref(), Some(&expected), "an older state is back");
        assert_eq!(worst, Some(Severity::Warning), "{report:?}");
    } else {
        assert_eq!(worst, Some(Severity::Error), "{report:?}");
    }
    if repair.steps.is_empty() {
        assert_eq!(repair.refused.len(), 1);
        assert!(seen.is_none(), "{repair:?}");
        return Outcome::Refused;
    }
    assert_repairs(&mut damaged, superblock, &repair, &expected);
    if seen.is_some() {
        Outcome::Ignored
    } else {
        Outcome::Repaired
    }
}

fn assert_repairs(
    store: &mut MemStore,
    superblock: &Superblock,
    repair: &Repair,
    expected: &(Metadata, CoordinatorEpoch),
) {
    assert_eq!(
        (repair.steps.len(), repair.refused.len()),
        (1, 0),
        "{repair:?}"
    );
    let planned = read(&mut Repaired::new(store, repair), superblock);
    repair.perform(store).unwrap();
    let repaired = read(store, superblock);
    assert_eq!(planned, repaired);
    let (metadata, epoch) = repaired.unwrap();
    assert_eq!(&metadata, &expected.0, "{repair:?}");
    // An epoch that was accepted, and not begun, may count as led: the next one is later.
    assert!(epoch >= expected.1, "{repair:?}");
    assert_eq!(plan_repair(store).unwrap(), Repair::default());
}

pub(crate) fn leaders(superblock: &Superblock) -> Vec<Lba> {
    let slots = superblock.slots();
    slots.map(|slot| superblock.leader_lba(slot)).collect()
}

pub(crate) fn heads(superblock: &Superblock) -> Vec<Lba> {
    let areas = superblock.areas();
    areas.map(|id| superblock.area(id).head).collect()
}

/// One bit of the body, and the whole record.
const DAMAGES: [&[u8]; 2] = [
    &{
        let mut bits = [0; 60];
        bits[59] = 1;
        bits
    },
    &[0xA5; 512],
];

fn outcomes(store: &MemStore, superblock: &Superblock, lbas: &[Lba]) -> Vec<Outcome> {
    lbas.iter()
        .flat_map(|lba| DAMAGES.map(|how| damage(store, superblock, *lba, how)))
        .collect()
}

fn count(outcomes: &[Outcome], wanted: Outcome) -> usize {
    outcomes
        .iter()
        .filter(|outcome| **outcome == wanted)
        .count()
}

/// Regression: one such block, of any slot and however old, stopped coordination.
#[test]
fn only_the_newest_leader_block_and_checkpoint_head_are_needed_and_both_can_be_repaired() {
    let (mut store, superblock) = formatted();
    assert!(coordinated(&mut store, &superblock, &TERMS, 3).1);
    assert_eq!(check_volume(&mut store).unwrap().worst(), None);
    let each = DAMAGES.len();
    for lbas in [leaders(&superblock), heads(&superblock)] {
        let found = outcomes(&store, &superblock, &lbas);
        assert_eq!(count(&found, Outcome::Repaired), each, "{found:?}");
        assert_eq!(
            count(&found, Outcome::Ignored),
            each * (lbas.len() - 1),
            "{found:?}"
        );
    }
}

#[test]
fn a_head_in_the_middle_of_a_term_is_repaired_from_its_rows() {
    let (mut store, superblock) = formatted();
    // Many groups: the journal goes on behind several checkpoints.
    assert!(coordinated(&mut store, &superblock, &[0], 60).1);
    let newest = recover(&mut store, &superblock).unwrap();
    assert!(newest.base.number > 2);
    let lba = superblock.area(newest.area).head;
    let found = outcomes(&store, &superblock, &[lba]);
    assert_eq!(count(&found, Outcome::Repaired), DAMAGES.len(), "{found:?}");
}

#[test]
fn what_nothing_proves_is_refused() {
    let (store, superblock) = formatted();
    // The only checkpoint.
    let first = superblock.area(recover(&mut store.clone(), &superblock).unwrap().area);
    let found = outcomes(&store, &superblock, &[first.head]);
    assert_eq!(count(&found, Outcome::Refused), DAMAGES.len());
    // A leader block whose slot's Paxos block is damaged, too.
    let mut store = store;
    assert!(coordinated(&mut store, &superblock, &TERMS, 1).1);
    let slot = SlotId(2);
    let epoch = u64::try_from(TERMS.len()).unwrap();
    for lba in [
        superblock.leader_lba(slot),
        superblock.paxos_lba(slot, epoch),
    ] {
        store.write(lba, &[7; BLOCK_BYTES]).unwrap();
    }
    let error = read_leaders(&mut store, &superblock).unwrap_err();
    assert!(error.to_string().contains("may be the newest"), "{error}");
    let repair = plan_repair(&mut store).unwrap();
    assert_eq!((repair.steps.len(), repair.refused.len()), (0, 1));
    assert!(repair.refused[0].contains("Paxos"), "{repair:?}");
}

/// The device fails after every possible number of writes and flushes: elections and checkpoints stop
/// half-way.
#[test]
fn damage_after_a_crash_at_any_write_brings_no_older_state_back() {
    let (pristine, superblock) = formatted();
    let lbas = [leaders(&superblock), heads(&superblock)].concat();
    let mut found = Vec::new();
    for budget in 0.. {
        let mut store = pristine.clone();
        store.fail_after(budget);
        let (_, complete) = coordinated(&mut store, &superblock, &TERMS[..4], 2);
        found.extend(outcomes(&store.crashed(|_| true), &superblock, &lbas));
        if complete {
            break;
        }
    }
    println!("{} damaged volumes", found.len());
    for wanted in [Outcome::Ignored, Outcome::Repaired, Outcome::Refused] {
        assert!(count(&found, wanted) > 10, "{wanted:?}");
    }
}
