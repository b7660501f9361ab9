//! Each rule, broken, must be noticed by a model.

use bascule_volume_format::{Fencing, WatchdogKind};
use bascule_volume_protocol::{Mutation, Rules};

use crate::checker::{Size, is_caught};
use crate::coordinator::{self, CoordinatorModel};
use crate::election::{self, ElectionModel};
use crate::fence::{self, FenceModel};
use crate::handover::{self, HandOverModel};
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

fn handover_notices(mutation: Mutation, property: &'static str) {
    let model = HandOverModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), property, model);
}

#[test]
fn a_source_that_resumes_without_an_answer_is_noticed() {
    handover_notices(Mutation::ResumeOnNoAnswer, handover::NEVER_AGAIN);
}

#[test]
fn a_source_that_resumes_on_a_refusal_is_noticed() {
    handover_notices(Mutation::ResumeOnRefusal, handover::NEVER_AGAIN);
}

#[test]
fn a_transfer_that_is_not_bound_to_its_epoch_is_noticed() {
    handover_notices(Mutation::TransferIgnoresEpoch, handover::NEVER_AGAIN);
}

#[test]
fn a_row_that_forgets_its_attempt_is_noticed() {
    handover_notices(Mutation::AttemptForgotten, handover::NOT_LOST);
}

fn fence_notices(mutation: Mutation, property: &'static str, adapt: impl FnOnce(&mut FenceModel)) {
    let mut model = FenceModel::new(Rules::without(mutation));
    adapt(&mut model);
    is_caught(&format!("{mutation:?}"), property, model);
}

#[test]
fn a_take_over_after_the_lease_alone_is_noticed() {
    fence_notices(Mutation::TakeOverWithoutFence, fence::I1, |model| {
        model.settle = 5;
    });
}

#[test]
fn a_safe_time_without_settle_is_noticed() {
    fence_notices(Mutation::SafeTimeWithoutSettle, fence::I1, |model| {
        model.settle = 5;
    });
}

#[test]
fn a_softdog_that_counts_is_noticed() {
    fence_notices(Mutation::SoftwareWatchdogCounts, fence::I1, |model| {
        model.kind = WatchdogKind::Software;
        model.late_pets = false;
    });
}

#[test]
fn lease_only_without_a_word_is_noticed() {
    fence_notices(Mutation::LeaseOnlyWithoutConfirmation, fence::I1, |model| {
        model.kind = WatchdogKind::None;
        model.fencing = Fencing::LeaseOnly;
        model.late_pets = false;
    });
}

#[test]
fn a_watchdog_timeout_that_is_too_long_is_noticed() {
    fence_notices(Mutation::LongWatchdogTimeout, fence::I1, |model| {
        model.device_timeout = 5;
        model.ticks = 10;
    });
}

#[test]
fn a_pet_without_a_lease_is_noticed() {
    fence_notices(Mutation::PetWithoutLease, fence::I1, |model| {
        model.late_pets = false;
    });
}

#[test]
fn a_volume_that_is_withdrawn_before_its_writes_completed_is_noticed() {
    fence_notices(Mutation::WithdrawBeforeDrain, fence::I1, |model| {
        model.kill = true;
        model.late_pets = false;
        model.ticks = 3;
    });
}

#[test]
fn a_take_over_that_keeps_the_epoch_is_noticed() {
    fence_notices(Mutation::TakeOverKeepsEpoch, fence::ONE_WRITER, |model| {
        model.late_pets = false;
    });
}

#[test]
fn a_reboot_that_is_claimed_before_writes_settled_is_noticed() {
    fence_notices(Mutation::RebootClaimedBeforeSettle, fence::I1, |model| {
        model.settle = 2;
        model.power_cut = true;
        model.reboots = 1;
        model.late_pets = false;
        model.ticks = 3;
    });
}

fn lease_only(model: &mut FenceModel) {
    model.kind = WatchdogKind::None;
    model.fencing = Fencing::LeaseOnly;
    model.power_cut = true;
    model.reboots = 1;
    model.late_pets = false;
    model.ticks = 8;
}

#[test]
fn a_word_that_counts_for_a_later_generation_is_noticed() {
    let property = fence::CONFIRMATION_BOUND;
    fence_notices(Mutation::ConfirmationForAnyGeneration, property, lease_only);
}

#[test]
fn a_fenced_node_that_takes_its_rows_along_is_noticed() {
    let property = fence::FENCED_ENDS;
    fence_notices(Mutation::RejoinKeepsFencedRows, property, lease_only);
}
