use std::time::Duration;

use bascule_types::{BootTime, Generation, NodeUid, Owner, SlotId};
use bascule_volume_format::Timings;

use super::*;
use bascule_volume_format::Rules;

const ME: NodeUid = NodeUid::from_bytes([1; 16]);
const OTHER: NodeUid = NodeUid::from_bytes([2; 16]);

fn at(ms: u64) -> BootTime {
    BootTime(0).after(Duration::from_millis(ms))
}

fn owner(generation: u64) -> Owner {
    Owner {
        slot: SlotId(3),
        generation: Generation(generation),
    }
}

fn record(node: NodeUid, generation: u64, sequence: u64) -> OwnRecord {
    OwnRecord {
        node,
        owner: owner(generation),
        sequence,
    }
}

/// A holder with the default times: L 4 s, renewal every second.
struct Fixture(LeaseHolder);

impl Fixture {
    fn lapsed() -> Self {
        let config = LeaseConfig {
            node: ME,
            timings: Timings::DEFAULT,
            rules: Rules::ENFORCED,
        };
        Self(LeaseHolder::start(config, at(0), None, 0))
    }

    fn begun() -> Self {
        let mut fixture = Self::lapsed();
        let (now, owner) = (at(0), owner(1));
        assert_eq!(fixture.step(LeaseEvent::NewGeneration { now, owner }), None);
        fixture
    }

    /// Holds a lease until 4 s, by record 1; the next renewal is due at 1 s.
    fn held() -> Self {
        let mut fixture = Self::begun();
        assert_eq!(fixture.submit(0, Vec::new()), 1);
        fixture.written(0, 1);
        assert_eq!(fixture.expiry(), Some(at(4000)));
        fixture
    }

    fn step(&mut self, event: LeaseEvent) -> Option<LeaseCommand> {
        let (next, command) = self.0.clone().next(event);
        self.0 = next;
        command
    }

    fn tick(&mut self, ms: u64) -> Option<LeaseCommand> {
        self.step(LeaseEvent::Tick { now: at(ms) })
    }

    fn records(&mut self, ms: u64, records: Vec<OwnRecord>) -> Option<LeaseCommand> {
        let now = at(ms);
        self.step(LeaseEvent::OwnRecords { now, records })
    }

    /// From the tick to the submission, all at one moment; the number that was submitted.
    fn submit(&mut self, ms: u64, records: Vec<OwnRecord>) -> u64 {
        assert_eq!(self.tick(ms), Some(LeaseCommand::ReadOwnRecords));
        match self.records(ms, records) {
            Some(LeaseCommand::WriteRecord { sequence, .. }) => sequence,
            other => panic!("no record was submitted: {other:?}"),
        }
    }

    fn written(&mut self, ms: u64, sequence: u64) {
        let now = at(ms);
        assert_eq!(self.step(LeaseEvent::Written { now, sequence }), None);
    }

    fn expiry(&self) -> Option<BootTime> {
        self.0.lease().map(|held| held.expiry)
    }
}

#[test]
fn a_new_generation_opens_no_gate_before_its_first_record_is_durable() {
    let mut fixture = Fixture::begun();
    assert_eq!(fixture.0.phase(), LeasePhase::Begun);
    assert_eq!(fixture.expiry(), None);
    let sequence = fixture.submit(0, Vec::new());
    assert_eq!(fixture.expiry(), None);
    fixture.written(10, sequence);
    assert_eq!(fixture.0.phase(), LeasePhase::Held);
}

#[test]
fn r1_the_lease_counts_from_before_the_submission() {
    let mut fixture = Fixture::begun();
    assert_eq!(fixture.tick(100), Some(LeaseCommand::ReadOwnRecords));
    fixture.records(700, Vec::new());
    fixture.written(1500, 1);
    assert_eq!(fixture.expiry(), Some(at(4100)));
}

#[test]
fn r2_an_acknowledgement_after_the_expiry_extends_nothing() {
    let mut fixture = Fixture::held();
    let sequence = fixture.submit(3000, vec![record(ME, 1, 1)]);
    fixture.written(4000, sequence);
    assert_eq!(fixture.expiry(), None);
    assert_eq!(fixture.0.phase(), LeasePhase::Lapsed);
}

#[test]
fn r2_an_acknowledgement_just_before_the_expiry_extends_the_lease() {
    let mut fixture = Fixture::held();
    let sequence = fixture.submit(3000, vec![record(ME, 1, 1)]);
    fixture.written(3999, sequence);
    assert_eq!(fixture.expiry(), Some(at(7000)));
}

#[test]
fn r2_the_first_record_of_a_generation_has_a_deadline_too() {
    let mut fixture = Fixture::begun();
    let sequence = fixture.submit(3000, Vec::new());
    fixture.written(4000, sequence);
    assert_eq!(fixture.0.phase(), LeasePhase::Lapsed);
}

#[test]
fn r3_nothing_is_sent_while_a_renewal_is_outstanding() {
    let mut fixture = Fixture::held();
    fixture.submit(1000, vec![record(ME, 1, 1)]);
    for ms in [1500, 2500, 3999] {
        assert_eq!(fixture.tick(ms), None);
    }
    assert!(!fixture.0.is_idle());
}

#[test]
fn r3_a_number_whose_write_failed_is_not_sent_again() {
    let mut fixture = Fixture::held();
    let sequence = fixture.submit(1000, vec![record(ME, 1, 1)]);
    let now = at(1100);
    fixture.step(LeaseEvent::WriteFailed { now, sequence });
    let next = fixture.submit(1100, vec![record(ME, 1, 1)]);
    assert_eq!((sequence, next), (2, 3));
}

#[test]
fn r3_a_new_generation_waits_for_the_old_ones_outstanding_record() {
    let mut fixture = Fixture::held();
    let outstanding = fixture.submit(3000, vec![record(ME, 1, 1)]);
    assert_eq!(fixture.tick(4000), None);
    assert_eq!(fixture.0.phase(), LeasePhase::Lapsed);
    let (now, owner) = (at(5000), owner(2));
    assert_eq!(fixture.step(LeaseEvent::NewGeneration { now, owner }), None);
    assert_eq!(fixture.tick(5500), None);
    fixture.written(6000, outstanding);
    let records = vec![record(ME, 1, outstanding)];
    assert_eq!(fixture.submit(6000, records), outstanding + 1);
}

#[test]
fn a_renewal_is_due_one_interval_after_the_one_before() {
    let mut fixture = Fixture::held();
    assert_eq!(fixture.tick(999), None);
    assert_eq!(fixture.tick(1000), Some(LeaseCommand::ReadOwnRecords));
}

#[test]
fn a_failed_read_is_tried_again_while_the_lease_lasts() {
    let mut fixture = Fixture::held();
    fixture.tick(1000);
    fixture.step(LeaseEvent::ReadFailed { now: at(1200) });
    assert_eq!(fixture.tick(1300), Some(LeaseCommand::ReadOwnRecords));
    fixture.step(LeaseEvent::ReadFailed { now: at(4000) });
    assert_eq!(fixture.0.phase(), LeasePhase::Lapsed);
}

#[test]
fn a_lapsed_lease_is_never_renewed_in_its_generation() {
    let mut fixture = Fixture::held();
    assert_eq!(fixture.tick(4000), None);
    assert_eq!(fixture.0.phase(), LeasePhase::Lapsed);
    assert_eq!(fixture.0.owner(), None);
    for ms in [4001, 5000, 9000] {
        assert_eq!(fixture.tick(ms), None);
    }
}

#[test]
fn another_node_in_the_slot_stops_the_holder_permanently() {
    let mut fixture = Fixture::held();
    fixture.tick(1000);
    let found = vec![record(ME, 1, 1), record(OTHER, 1, 7)];
    assert_eq!(fixture.records(1000, found), None);
    assert!(matches!(
        fixture.0.phase(),
        LeasePhase::Stopped(StopReason::ForeignNode(found)) if found.node == OTHER
    ));
    assert_eq!(fixture.expiry(), None);
    let (now, owner) = (at(1001), owner(2));
    fixture.step(LeaseEvent::NewGeneration { now, owner });
    assert_eq!(fixture.0.owner(), None);
}

#[test]
fn an_older_record_of_the_slots_earlier_node_does_not_stop_the_holder() {
    let mut fixture = Fixture::lapsed();
    let (now, owner) = (at(0), owner(5));
    fixture.step(LeaseEvent::NewGeneration { now, owner });
    fixture.submit(0, vec![record(OTHER, 4, 99)]);
}

#[test]
fn a_newer_generation_in_the_slot_stops_the_holder_permanently() {
    let mut fixture = Fixture::held();
    fixture.tick(1000);
    fixture.records(1000, vec![record(ME, 1, 1), record(ME, 2, 1)]);
    assert!(matches!(
        fixture.0.phase(),
        LeasePhase::Stopped(StopReason::NewerGeneration(_))
    ));
}

#[test]
fn i6_a_device_that_lost_an_acknowledged_record_stops_the_holder() {
    let mut fixture = Fixture::held();
    fixture.tick(1000);
    fixture.records(1000, Vec::new());
    let lost = StopReason::RecordLost { sequence: 1 };
    assert_eq!(fixture.0.phase(), LeasePhase::Stopped(lost));
}

#[test]
fn i4_the_next_process_continues_the_lease_and_the_sequence_numbers() {
    let first = Fixture::held();
    assert!(first.0.is_idle());
    let (held, sent) = (first.0.lease(), first.0.sequence_sent());
    let config = Fixture::lapsed().0.config;
    let mut next = Fixture(LeaseHolder::start(config, at(500), held, sent));
    assert_eq!(next.0.lease(), held);
    assert_eq!(next.submit(500, vec![record(ME, 1, 1)]), 2);

    let late = LeaseHolder::start(config, at(4000), held, sent);
    assert_eq!(late.phase(), LeasePhase::Lapsed);
}

#[test]
fn a_node_that_leaves_writes_one_last_record() {
    let mut fixture = Fixture::held();
    let command = fixture.step(LeaseEvent::Leave { now: at(200) });
    let last = LeaseCommand::WriteRecord {
        owner: owner(1),
        sequence: 2,
        detached: true,
    };
    assert_eq!(command, Some(last));
    fixture.written(210, 2);
    assert_eq!(fixture.0.phase(), LeasePhase::Stopped(StopReason::Left));
    assert_eq!(fixture.tick(9000), None);
}
