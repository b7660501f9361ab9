//! Breaks each rule in turn: a model must find a counterexample.

use bascule_volume_format::{Fencing, WatchdogKind};
use bascule_volume_protocol::{Mutation, Rules};

use crate::checker::{Size, is_caught};
use crate::coordinator::{self, CoordinatorModel};
use crate::election::{self, ElectionModel};
use crate::fence::{self, FenceModel};
use crate::handover::{self, HandOverModel};
use crate::lease::{self, LeaseModel};
use crate::watchdog::{self, WatchdogModel};

fn lease_counterexample(mutation: Mutation) {
    let model = LeaseModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), lease::SAFE, model);
}

#[test]
fn r1_a_lease_that_counts_from_the_acknowledgement_has_a_counterexample() {
    lease_counterexample(Mutation::LeaseCountsFromAcknowledgement);
}

#[test]
fn r2_a_late_acknowledgement_that_extends_has_a_counterexample() {
    lease_counterexample(Mutation::LateAcknowledgementExtends);
}

#[test]
fn r3_a_sequence_number_sent_twice_has_a_counterexample() {
    lease_counterexample(Mutation::SequenceSentTwice);
}

#[test]
fn r3_a_sequence_number_sent_again_by_the_next_process_has_a_counterexample() {
    lease_counterexample(Mutation::SequenceFromDisk);
}

#[test]
fn r4_an_interval_from_the_issue_of_the_first_read_has_a_counterexample() {
    lease_counterexample(Mutation::IntervalFromIssue);
}

#[test]
fn r5_a_confirmation_by_the_completion_of_a_read_has_a_counterexample() {
    lease_counterexample(Mutation::ConfirmedAtCompletion);
}

#[test]
fn a_watch_without_allowance_for_drift_has_a_counterexample() {
    lease_counterexample(Mutation::WatchWithoutDrift);
}

#[test]
fn a_renewal_without_a_re_read_has_a_counterexample() {
    let model = LeaseModel {
        newer_process: true,
        generations: 1,
        crashes: 0,
        ..LeaseModel::new(Rules::without(Mutation::RenewWithoutReread), Size::Small)
    };
    is_caught("RenewWithoutReread", lease::SAFE, model);
}

fn election_counterexample(mutation: Mutation, property: &'static str) {
    let model = ElectionModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), property, model);
}

#[test]
fn a_ballot_that_is_decided_without_the_last_read_has_a_counterexample() {
    election_counterexample(Mutation::DecideWithoutReread, election::AGREED);
}

#[test]
fn a_ballot_that_ignores_a_higher_one_has_a_counterexample() {
    election_counterexample(Mutation::IgnoreHigherBallot, election::AGREED);
}

#[test]
fn a_ballot_that_forgets_what_was_accepted_has_a_counterexample() {
    election_counterexample(Mutation::ForgetAccepted, election::AGREED);
}

#[test]
fn a_paxos_block_reused_before_earlier_writes_settled_has_a_counterexample() {
    election_counterexample(Mutation::ReuseBeforeSettle, election::AGREED);
}

fn forgotten_failures(slots: u16, attempts: u8, property: &'static str) {
    let rules = Rules::without(Mutation::ForgetFailedWrites);
    let model = ElectionModel {
        slots,
        attempts,
        failures: 1,
        ..ElectionModel::new(rules, Size::Small)
    };
    is_caught("ForgetFailedWrites", property, model);
}

#[test]
fn a_lost_promise_of_a_predecessor_that_is_written_over_has_a_counterexample() {
    forgotten_failures(2, 2, election::AGREED);
}

#[test]
fn a_leader_block_of_a_predecessor_that_lands_late_has_a_counterexample() {
    // One candidate alone can suffer it.
    forgotten_failures(1, 3, election::LED);
}

fn coordinator_counterexample(mutation: Mutation) {
    let model = CoordinatorModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), coordinator::KEPT, model);
}

#[test]
fn an_answer_without_a_re_read_has_a_counterexample() {
    coordinator_counterexample(Mutation::AnswerWithoutReread);
}

#[test]
fn a_re_read_that_was_issued_before_the_record_was_durable_has_a_counterexample() {
    coordinator_counterexample(Mutation::RereadIssuedEarly);
}

#[test]
fn a_journal_that_is_read_before_the_leader_block_is_durable_has_a_counterexample() {
    coordinator_counterexample(Mutation::ReadJournalBeforeLeaderDurable);
}

fn handover_counterexample(mutation: Mutation, property: &'static str) {
    let model = HandOverModel::new(Rules::without(mutation), Size::Small);
    is_caught(&format!("{mutation:?}"), property, model);
}

#[test]
fn a_source_that_resumes_without_an_answer_has_a_counterexample() {
    handover_counterexample(Mutation::ResumeOnNoAnswer, handover::NEVER_AGAIN);
}

#[test]
fn a_source_that_resumes_on_a_refusal_has_a_counterexample() {
    handover_counterexample(Mutation::ResumeOnRefusal, handover::NEVER_AGAIN);
}

#[test]
fn a_transfer_that_is_not_bound_to_its_epoch_has_a_counterexample() {
    handover_counterexample(Mutation::TransferIgnoresEpoch, handover::NEVER_AGAIN);
}

#[test]
fn a_row_that_forgets_its_attempt_has_a_counterexample() {
    handover_counterexample(Mutation::AttemptForgotten, handover::NOT_LOST);
}

fn fence_counterexample(
    mutation: Mutation,
    property: &'static str,
    adapt: impl FnOnce(&mut FenceModel),
) {
    let mut model = FenceModel::new(Rules::without(mutation));
    adapt(&mut model);
    is_caught(&format!("{mutation:?}"), property, model);
}

#[test]
fn a_take_over_after_the_lease_alone_has_a_counterexample() {
    fence_counterexample(Mutation::TakeOverWithoutFence, fence::I1, |model| {
        model.settle = 5;
    });
}

#[test]
fn a_safe_time_without_settle_has_a_counterexample() {
    fence_counterexample(Mutation::SafeTimeWithoutSettle, fence::I1, |model| {
        model.settle = 5;
    });
}

#[test]
fn a_softdog_that_counts_has_a_counterexample() {
    fence_counterexample(Mutation::SoftwareWatchdogCounts, fence::I1, |model| {
        model.kind = WatchdogKind::Software;
        model.late_pets = false;
    });
}

#[test]
fn lease_only_without_a_confirmation_has_a_counterexample() {
    fence_counterexample(Mutation::LeaseOnlyWithoutConfirmation, fence::I1, |model| {
        model.kind = WatchdogKind::None;
        model.fencing = Fencing::LeaseOnly;
        model.late_pets = false;
    });
}

#[test]
fn a_watchdog_timeout_that_is_too_long_has_a_counterexample() {
    fence_counterexample(Mutation::LongWatchdogTimeout, fence::I1, |model| {
        model.device_timeout = 5;
        model.ticks = 10;
    });
}

fn restart_counterexample(mutation: Mutation) {
    let model = WatchdogModel::new(Rules::without(mutation));
    is_caught(&format!("{mutation:?}"), watchdog::RESET_IN_TIME, model);
}

#[test]
fn a_restart_that_opens_the_device_before_it_decides_has_a_counterexample() {
    restart_counterexample(Mutation::OpenBeforeDeciding);
}

#[test]
fn a_watchdog_device_that_only_one_process_holds_has_a_counterexample() {
    restart_counterexample(Mutation::NoSecondHolder);
}

#[test]
fn a_timeout_that_counts_once_has_a_counterexample() {
    let rules = Rules::without(Mutation::LateKeepaliveNotCounted);
    let model = WatchdogModel::with_long_timeout(rules);
    is_caught("LateKeepaliveNotCounted", watchdog::RESET_IN_TIME, model);
}

#[test]
fn a_pet_without_a_lease_has_a_counterexample() {
    fence_counterexample(Mutation::PetWithoutLease, fence::I1, |model| {
        model.late_pets = false;
    });
}

#[test]
fn a_volume_that_is_withdrawn_before_its_writes_completed_has_a_counterexample() {
    fence_counterexample(Mutation::WithdrawBeforeDrain, fence::I1, |model| {
        model.kill = true;
        model.late_pets = false;
        model.ticks = 3;
    });
}

fn withdraw_counterexample(mutation: Mutation, adapt: impl FnOnce(&mut FenceModel)) {
    let mut model = FenceModel::withdrawing(Rules::without(mutation));
    adapt(&mut model);
    is_caught(&format!("{mutation:?}"), fence::I1, model);
}

#[test]
fn a_lapsed_volume_that_is_withdrawn_with_a_write_in_flight_has_a_counterexample() {
    withdraw_counterexample(Mutation::WithdrawLapsedInFlight, |_| {});
}

#[test]
fn a_failed_write_that_counts_as_ended_has_a_counterexample() {
    withdraw_counterexample(Mutation::UncleanCountsAsDrained, |model| {
        model.failing_writes = true;
    });
}

#[test]
fn a_gate_that_opens_before_its_volume_is_enlisted_again_has_a_counterexample() {
    withdraw_counterexample(Mutation::GateOpensBeforeEnlisting, |_| {});
}

#[test]
fn a_gate_that_opens_unwatched_while_a_watchdog_is_counted_on_has_a_counterexample() {
    withdraw_counterexample(Mutation::UnwatchedWhileNamed, |model| {
        model.silent_watchdog = true;
    });
}

#[test]
fn a_take_over_that_keeps_the_epoch_has_a_counterexample() {
    fence_counterexample(Mutation::TakeOverKeepsEpoch, fence::ONE_WRITER, |model| {
        model.late_pets = false;
    });
}

#[test]
fn a_reboot_that_is_claimed_before_writes_settled_has_a_counterexample() {
    fence_counterexample(Mutation::RebootClaimedBeforeSettle, fence::I1, |model| {
        model.settle = 2;
        model.power_cut = true;
        model.reboots = 1;
        model.late_pets = false;
        model.ticks = 3;
    });
}

fn lease_only(model: &mut FenceModel) {
    model.watch = 3;
    model.kind = WatchdogKind::None;
    model.fencing = Fencing::LeaseOnly;
    model.power_cut = true;
    model.reboots = 1;
    model.late_pets = false;
    model.ticks = 8;
}

#[test]
fn a_confirmation_that_counts_for_a_later_generation_has_a_counterexample() {
    let property = fence::CONFIRMATION_BOUND;
    fence_counterexample(Mutation::ConfirmationForAnyGeneration, property, lease_only);
}

#[test]
fn a_fenced_node_that_keeps_its_vms_has_a_counterexample() {
    let property = fence::FENCED_ENDS;
    fence_counterexample(Mutation::RejoinKeepsFencedRows, property, lease_only);
}
