use super::*;

const EPOCH: CoordinatorEpoch = CoordinatorEpoch(4);

fn steps(events: &[CoordinatorEvent]) -> (Coordinator, Vec<CoordinatorCommand>) {
    let mut coordinator = Coordinator::new(EPOCH, Rules::ENFORCED);
    let mut commands = Vec::new();
    for event in events {
        let (next, more) = coordinator.next(*event);
        coordinator = next;
        commands.extend(more);
    }
    (coordinator, commands)
}

fn durable(ticket: u64) -> CoordinatorEvent {
    CoordinatorEvent::Durable(Ticket(ticket))
}

fn leader(epoch: u64) -> CoordinatorEvent {
    let highest = CoordinatorEpoch(epoch);
    CoordinatorEvent::Leader { highest }
}

use CoordinatorCommand::{Answer, Deposed, ReadLeader};

#[test]
fn a_durable_record_is_answered_after_a_re_read_that_shows_the_own_epoch() {
    let (_, commands) = steps(&[durable(1)]);
    assert_eq!(commands, [ReadLeader]);
    let (_, commands) = steps(&[durable(1), leader(4)]);
    assert_eq!(commands, [ReadLeader, Answer(vec![Ticket(1)])]);
}

#[test]
fn i3_a_re_read_counts_only_for_records_that_were_durable_before_it_was_issued() {
    let (_, commands) = steps(&[durable(1), durable(2), leader(4), leader(4)]);
    let one = Answer(vec![Ticket(1)]);
    let two = Answer(vec![Ticket(2)]);
    assert_eq!(commands, [ReadLeader, one, ReadLeader, two]);
}

#[test]
fn many_records_share_one_re_read() {
    let (_, commands) = steps(&[durable(1), durable(2), durable(3), leader(4), leader(4)]);
    let rest = Answer(vec![Ticket(2), Ticket(3)]);
    assert_eq!(commands.last(), Some(&rest));
}

#[test]
fn i3_a_deposed_coordinator_sends_no_answer() {
    let (deposed, commands) = steps(&[durable(1), durable(2), leader(5)]);
    assert!(!deposed.is_active());
    let unanswered = Deposed(vec![Ticket(1), Ticket(2)]);
    assert_eq!(commands, [ReadLeader, unanswered]);
    let (deposed, commands) = deposed.next(durable(3));
    assert_eq!(commands, [Deposed(vec![Ticket(3)])]);
    assert_eq!(deposed.next(leader(4)).1, []);
}

#[test]
fn an_epoch_below_its_own_means_a_lost_leader_block_and_deposes_the_coordinator() {
    let (deposed, _) = steps(&[durable(1), leader(3)]);
    assert!(!deposed.is_active());
}

#[test]
fn a_failed_re_read_is_repeated_for_the_same_records() {
    let failed = CoordinatorEvent::LeaderReadFailed;
    let (_, commands) = steps(&[durable(1), failed, leader(4)]);
    assert_eq!(commands, [ReadLeader, ReadLeader, Answer(vec![Ticket(1)])]);
}

#[test]
fn a_failed_journal_write_deposes_the_coordinator() {
    let (ended, commands) = steps(&[durable(1), CoordinatorEvent::JournalFailed]);
    assert!(!ended.is_active());
    assert_eq!(commands, [ReadLeader, Deposed(vec![Ticket(1)])]);
}
