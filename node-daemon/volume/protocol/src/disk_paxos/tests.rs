use bascule_types::Generation;

use super::*;

const SLOTS: u16 = 8;

fn owner(slot: u16, generation: u64) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(generation),
    }
}

fn block(instance: u64, slot: u16, mbal: u64, accepted: Option<(u64, Owner)>) -> PaxosBlock {
    PaxosBlock {
        instance: CoordinatorEpoch(instance),
        writer: owner(slot, 1),
        mbal,
        accepted: accepted.map(|(bal, value)| Accepted { bal, value }),
    }
}

fn leader(epoch: u64, slot: u16) -> LeaderBlock {
    LeaderBlock {
        epoch: CoordinatorEpoch(epoch),
        coordinator: owner(slot, 1),
    }
}

/// Slot 2 of eight, on a disk with these blocks.
struct Fixture {
    election: Election,
    paxos: Vec<PaxosBlock>,
    leaders: Vec<LeaderBlock>,
}

impl Fixture {
    fn new(paxos: Vec<PaxosBlock>, leaders: Vec<LeaderBlock>) -> Self {
        Self::barred(paxos, leaders, &[])
    }

    fn barred(paxos: Vec<PaxosBlock>, leaders: Vec<LeaderBlock>, barred: &[SlotPart]) -> Self {
        let config = ElectionConfig {
            me: owner(2, 1),
            slots: SLOTS,
            quiet_since: BootTime(0),
            settle: Duration::from_secs(4),
            rules: Rules::ENFORCED,
        };
        let election = Election::new(config, &barred.iter().copied().collect());
        Self {
            election,
            paxos,
            leaders,
        }
    }

    fn step(&mut self, event: &ElectionEvent) -> Option<ElectionCommand> {
        let (next, command) = self.election.clone().next(event);
        self.election = next;
        command
    }

    fn start(&mut self, seconds: u64) -> Option<ElectionCommand> {
        let now = BootTime(0).after(Duration::from_secs(seconds));
        self.step(&ElectionEvent::Start { now })
    }

    fn blocks(&mut self) -> Option<ElectionCommand> {
        let (paxos, leaders) = (self.paxos.clone(), self.leaders.clone());
        self.step(&ElectionEvent::Blocks { paxos, leaders })
    }

    /// Performs what is commanded, alone on the disk, until the attempt is over.
    fn alone(&mut self) -> ElectionOutcome {
        let mut command = self.start(4);
        loop {
            command = match command {
                Some(ElectionCommand::ReadBlocks) => self.blocks(),
                Some(ElectionCommand::WritePaxos { block, .. }) => {
                    self.paxos.push(block);
                    self.step(&ElectionEvent::Written)
                }
                Some(ElectionCommand::WriteLeader(leader)) => {
                    self.leaders.push(leader);
                    self.step(&ElectionEvent::Written)
                }
                Some(ElectionCommand::Done(outcome)) => return outcome,
                None => panic!("the election hangs in {:?}", self.election.phase()),
            }
        }
    }
}

fn done(outcome: ElectionOutcome) -> Option<ElectionCommand> {
    Some(ElectionCommand::Done(outcome))
}

#[test]
fn a_node_alone_wins_the_first_epoch_and_its_leader_block_is_durable_then() {
    let mut fixture = Fixture::new(Vec::new(), Vec::new());
    let won = ElectionOutcome::Won(CoordinatorEpoch(1));
    assert_eq!(fixture.alone(), won);
    assert_eq!(fixture.leaders, [leader(1, 2)]);
    let won = ElectionOutcome::Won(CoordinatorEpoch(2));
    assert_eq!(fixture.alone(), won);
}

#[test]
fn the_epoch_follows_the_highest_one_that_was_ever_led() {
    let mut fixture = Fixture::new(Vec::new(), vec![leader(6, 0), leader(9, 1)]);
    let won = ElectionOutcome::Won(CoordinatorEpoch(10));
    assert_eq!(fixture.alone(), won);
}

#[test]
fn i2_a_value_that_was_accepted_is_adopted_and_its_owner_wins() {
    let accepted = block(1, 5, 13, Some((13, owner(5, 1))));
    let mut fixture = Fixture::new(vec![accepted], Vec::new());
    let other = ElectionOutcome::Elected(CoordinatorEpoch(1), owner(5, 1));
    assert_eq!(fixture.alone(), other);
    assert_eq!(fixture.leaders, [], "only the winner writes its block");
    // Slot 5 never writes its leader block: the next attempt is for the next epoch.
    let won = ElectionOutcome::Won(CoordinatorEpoch(2));
    assert_eq!(fixture.alone(), won);
}

#[test]
fn i2_a_value_of_this_slots_earlier_generation_does_not_count_as_its_own() {
    let earlier = owner(2, 0);
    let accepted = block(1, 2, 10, Some((10, earlier)));
    let mut fixture = Fixture::new(vec![accepted], Vec::new());
    let other = ElectionOutcome::Elected(CoordinatorEpoch(1), earlier);
    assert_eq!(fixture.alone(), other);
}

#[test]
fn the_next_ballot_is_higher_than_every_ballot_seen_and_encodes_its_slot() {
    let mut fixture = Fixture::new(vec![block(1, 5, 85, None)], Vec::new());
    fixture.start(4);
    let Some(ElectionCommand::WritePaxos { subsector, block }) = fixture.blocks() else {
        panic!("no ballot");
    };
    assert!(block.mbal > 85 && block.mbal % u64::from(SLOTS) == 2);
    assert_eq!(subsector, block.mbal / u64::from(SLOTS) % PAXOS_SUBSECTORS);
}

#[test]
fn a_higher_ballot_and_a_later_instance_end_an_attempt() {
    for rival in [block(1, 5, 85, None), block(2, 5, 1, None)] {
        let mut fixture = Fixture::new(Vec::new(), Vec::new());
        fixture.start(4);
        fixture.blocks();
        fixture.step(&ElectionEvent::Written);
        fixture.paxos.push(rival);
        assert_eq!(fixture.blocks(), done(ElectionOutcome::Beaten));
    }
}

#[test]
fn nothing_is_written_before_the_writes_of_earlier_processes_have_settled() {
    let mut fixture = Fixture::new(Vec::new(), Vec::new());
    let from = BootTime(0).after(Duration::from_secs(4));
    assert_eq!(fixture.start(3), done(ElectionOutcome::NotBefore(from)));
    assert_eq!(fixture.start(4), Some(ElectionCommand::ReadBlocks));
}

#[test]
fn a_block_whose_write_failed_is_not_used_again() {
    let mut fixture = Fixture::new(Vec::new(), Vec::new());
    let mut used = Vec::new();
    for _ in 0..PAXOS_SUBSECTORS {
        fixture.start(4);
        let Some(ElectionCommand::WritePaxos { subsector, .. }) = fixture.blocks() else {
            panic!("no ballot after {used:?}");
        };
        assert!(!used.contains(&subsector));
        used.push(subsector);
        let failed = fixture.step(&ElectionEvent::Failed);
        assert_eq!(failed, done(ElectionOutcome::Beaten));
    }
    assert_eq!(fixture.start(4), done(ElectionOutcome::Unfit));
}

#[test]
fn a_process_whose_leader_block_may_land_late_is_no_longer_a_candidate() {
    let mut fixture = Fixture::new(Vec::new(), Vec::new());
    let mut command = fixture.start(4);
    while !matches!(command, Some(ElectionCommand::WriteLeader(_))) {
        command = match command {
            Some(ElectionCommand::WritePaxos { block, .. }) => {
                fixture.paxos.push(block);
                fixture.step(&ElectionEvent::Written)
            }
            _ => fixture.blocks(),
        };
    }
    fixture.step(&ElectionEvent::Failed);
    assert_eq!(fixture.start(4), done(ElectionOutcome::Unfit));
}

/// Regression: only the process in which the write had failed knew of it; the next one wrote the block
/// again.
#[test]
fn a_block_whose_write_failed_in_an_earlier_process_is_not_used_either() {
    let barred: Vec<SlotPart> = [1, 2, 4].map(SlotPart::Paxos).into();
    let mut fixture = Fixture::barred(Vec::new(), Vec::new(), &barred);
    fixture.start(4);
    let Some(ElectionCommand::WritePaxos { subsector, block }) = fixture.blocks() else {
        panic!("no ballot");
    };
    assert_eq!((subsector, block.mbal / u64::from(SLOTS)), (3, 3));

    let all: Vec<SlotPart> = (0..PAXOS_SUBSECTORS).map(SlotPart::Paxos).collect();
    for barred in [vec![SlotPart::Leader], all] {
        let mut fixture = Fixture::barred(Vec::new(), Vec::new(), &barred);
        assert_eq!(fixture.start(4), done(ElectionOutcome::Unfit), "{barred:?}");
    }
}

#[test]
fn a_process_proposes_its_present_generation() {
    let mut fixture = Fixture::new(Vec::new(), Vec::new());
    fixture.election = fixture.election.renamed(owner(2, 9));
    fixture.alone();
    assert_eq!(fixture.leaders[0].coordinator, owner(2, 9));
}
