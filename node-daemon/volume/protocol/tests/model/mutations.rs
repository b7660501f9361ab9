//! Each rule, broken, must be noticed by a model.

use bascule_volume_protocol::{Mutation, Rules};

use crate::check::{Size, is_caught};
use crate::coordinator::{self, CoordinatorModel};
use crate::election::{self, ElectionModel};
use crate::lease::{self, LeaseModel};

fn lease_notices(mutation: Mutation) {
    let model = LeaseModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), lease::SAFE, model);
}

#[test]
fn r1_a_lease_that_counts_from_the_acknowledgement_is_noticed() {
    lease_notices(Mutation::LeaseCountsFromAcknowledgement);
}

#[test]
fn r2_a_late_acknowledgement_that_extends_is_noticed() {
    lease_notices(Mutation::LateAcknowledgementExtends);
}

#[test]
fn r3_a_sequence_number_sent_twice_is_noticed() {
    lease_notices(Mutation::SequenceSentTwice);
}

#[test]
fn r3_a_sequence_number_sent_again_by_the_next_process_is_noticed() {
    lease_notices(Mutation::SequenceFromDisk);
}

#[test]
fn r4_an_interval_from_the_issue_of_the_first_read_is_noticed() {
    lease_notices(Mutation::IntervalFromIssue);
}

#[test]
fn r5_a_confirmation_by_the_completion_of_a_read_is_noticed() {
    lease_notices(Mutation::ConfirmedAtCompletion);
}

#[test]
fn a_watch_without_allowance_for_drift_is_noticed() {
    lease_notices(Mutation::WatchWithoutDrift);
}

#[test]
fn a_renewal_without_a_re_read_is_noticed() {
    let model = LeaseModel {
        newer_process: true,
        generations: 1,
        crashes: 0,
        ..LeaseModel::new(Rules::without(Mutation::RenewWithoutReread), Size::Small)
    };
    is_caught("RenewWithoutReread", lease::SAFE, model);
}

fn election_notices(mutation: Mutation, property: &'static str) {
    let model = ElectionModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), property, model);
}

#[test]
fn a_ballot_that_is_decided_without_the_last_read_is_noticed() {
    election_notices(Mutation::DecideWithoutReread, election::AGREED);
}

#[test]
fn a_ballot_that_ignores_a_higher_one_is_noticed() {
    election_notices(Mutation::IgnoreHigherBallot, election::AGREED);
}

#[test]
fn a_ballot_that_forgets_what_was_accepted_is_noticed() {
    election_notices(Mutation::ForgetAccepted, election::AGREED);
}

#[test]
fn a_paxos_block_reused_before_earlier_writes_settled_is_noticed() {
    election_notices(Mutation::ReuseBeforeSettle, election::AGREED);
}

fn coordinator_notices(mutation: Mutation) {
    let model = CoordinatorModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), coordinator::KEPT, model);
}

#[test]
fn an_answer_without_a_re_read_is_noticed() {
    coordinator_notices(Mutation::AnswerWithoutReread);
}

#[test]
fn a_re_read_that_was_issued_before_the_record_was_durable_is_noticed() {
    coordinator_notices(Mutation::RereadIssuedEarly);
}

#[test]
fn a_journal_that_is_read_before_the_leader_block_is_durable_is_noticed() {
    coordinator_notices(Mutation::ReadJournalBeforeLeaderDurable);
}
