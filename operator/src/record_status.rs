//! Status of VirtualMachineMigrations and Failovers.

use anyhow::Result;
use bascule_crds::names::{condition, reason};
use bascule_crds::{
    Duration, Failover, FailoverPhase, FailoverStatus, FencingProof, MigrationPhase,
    MigrationProgress, ProofKind, Quantity, VirtualMachine, VirtualMachineMigration,
    VirtualMachineMigrationStatus, set_condition,
};
use bascule_ipc::vm::{self, MigrationStatus};
use bascule_operator_core::{FailoverUpdate, MigrationUpdate};
use bascule_types::{AdminConfirmation, FenceProof};
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, ResourceExt};

use crate::context::OperatorContext;
use crate::kube_api::{apply_status, new_condition};

/// Writes a migration's status if it differs from the present one.
pub(crate) async fn report_migration(
    context: &OperatorContext,
    vm: &VirtualMachine,
    name: &str,
    update: &MigrationUpdate,
) -> Result<()> {
    let namespace = vm.namespace().unwrap_or_default();
    let ours = |m: &VirtualMachineMigration| {
        m.name_any() == name && m.namespace().as_deref() == Some(&namespace)
    };
    let Some(object) = context.stores.migrations.find(ours) else {
        return Ok(());
    };
    let old = object.status.clone().unwrap_or_default();
    if old.phase.is_some_and(MigrationPhase::is_final) {
        // A final phase is never left, not even by a plan made from a stale cache.
        return Ok(());
    }
    let mut status = migration_status(
        &old,
        update,
        object.metadata.generation,
        crate::clock::timestamp(),
    );
    status.reservation = reservation(vm, name).or_else(|| old.reservation.clone());
    if status == old {
        return Ok(());
    }
    if status.phase.is_some_and(MigrationPhase::is_final) {
        context.metrics.migration_ended(object.spec.mode, &status);
    }
    write_migration(context, &namespace, name, &status).await
}

/// Fails open migrations whose VirtualMachine does not exist.
pub(crate) async fn fail_orphaned_migrations(context: &OperatorContext) -> Result<()> {
    let vms = context.stores.vms.state();
    let orphaned = |m: &VirtualMachineMigration| {
        let open = !m
            .status
            .as_ref()
            .and_then(|s| s.phase)
            .is_some_and(MigrationPhase::is_final);
        let exists = vms
            .iter()
            .any(|vm| vm.name_any() == m.spec.virtual_machine && vm.namespace() == m.namespace());
        open && !exists
    };
    for object in context.stores.migrations.state_filter(orphaned) {
        let message = format!(
            "VirtualMachine {} does not exist",
            object.spec.virtual_machine
        );
        let update = MigrationUpdate {
            phase: MigrationPhase::Failed,
            source: None,
            target: None,
            source_epoch: None,
            reason: reason::VM_NOT_FOUND,
            message,
            progress: None,
        };
        let old = object.status.clone().unwrap_or_default();
        let status = migration_status(
            &old,
            &update,
            object.metadata.generation,
            crate::clock::timestamp(),
        );
        let namespace = object.namespace().unwrap_or_default();
        write_migration(context, &namespace, &object.name_any(), &status).await?;
    }
    Ok(())
}

async fn write_migration(
    context: &OperatorContext,
    namespace: &str,
    name: &str,
    status: &VirtualMachineMigrationStatus,
) -> Result<()> {
    let api: Api<VirtualMachineMigration> = Api::namespaced(context.client.clone(), namespace);
    apply_status(&api, name, status).await?;
    Ok(())
}

/// Writes a Failover's status if it differs from the present one.
pub(crate) async fn report_failover(
    context: &OperatorContext,
    vm: &VirtualMachine,
    name: &str,
    update: &FailoverUpdate,
) -> Result<()> {
    let namespace = vm.namespace().unwrap_or_default();
    let ours = |f: &Failover| f.name_any() == name && f.namespace().as_deref() == Some(&namespace);
    let Some(object) = context.stores.failovers.find(ours) else {
        return Ok(());
    };
    let old = object.status.clone().unwrap_or_default();
    if old.phase.is_some_and(FailoverPhase::is_final) {
        return Ok(());
    }
    let created = object.metadata.creation_timestamp.clone();
    let status = failover_status(&old, update, created, crate::clock::timestamp());
    if status == old {
        return Ok(());
    }
    if status.phase.is_some_and(FailoverPhase::is_final) {
        context
            .metrics
            .failover_ended(status.phase == Some(FailoverPhase::Succeeded));
    }
    let api: Api<Failover> = Api::namespaced(context.client.clone(), &namespace);
    apply_status(&api, name, &status).await?;
    Ok(())
}

fn reservation(vm: &VirtualMachine, migration: &str) -> Option<String> {
    let mut made = vm.status.iter().flat_map(|status| &status.reservations);
    made.find(|made| made.migration.as_deref() == Some(migration))
        .map(|made| made.name.clone())
}

fn migration_status(
    old: &VirtualMachineMigrationStatus,
    update: &MigrationUpdate,
    generation: Option<i64>,
    now: Timestamp,
) -> VirtualMachineMigrationStatus {
    let phase = update.phase;
    let mut conditions = old.conditions.clone();
    let complete = match phase {
        MigrationPhase::Succeeded => "True",
        MigrationPhase::Failed | MigrationPhase::Cancelled => "False",
        _ => "Unknown",
    };
    let mut new = new_condition(
        condition::COMPLETE,
        complete,
        update.reason,
        &update.message,
        now,
    );
    new.observed_generation = generation;
    set_condition(&mut conditions, new);
    let placed = matches!(
        phase,
        MigrationPhase::Copying | MigrationPhase::Committing | MigrationPhase::Succeeded
    );
    let begun = update.source_epoch.is_some();
    let once = |old: &Option<Time>, when: bool| old.clone().or_else(|| when.then_some(Time(now)));
    VirtualMachineMigrationStatus {
        observed_generation: generation,
        phase: Some(phase),
        source: update.source.clone().or_else(|| old.source.clone()),
        target: update.target.clone().or_else(|| old.target.clone()),
        reservation: old.reservation.clone(),
        source_epoch: update
            .source_epoch
            .map(|e| e.to_string())
            .or_else(|| old.source_epoch.clone()),
        started_at: once(&old.started_at, begun),
        placed_at: once(&old.placed_at, placed),
        finished_at: once(&old.finished_at, phase.is_final()),
        progress: update
            .progress
            .as_ref()
            .map(|p| progress(p, phase))
            .or_else(|| old.progress.clone().map(|old| finish(old, phase))),
        conditions,
    }
}

/// Progress in the units of the API: percent, Quantities and Durations.
fn progress(status: &MigrationStatus, phase: MigrationPhase) -> MigrationProgress {
    let ms = |ms: u64| Duration::from_std(std::time::Duration::from_millis(ms));
    let all = status.bytes.0.saturating_add(status.remaining.0).max(1);
    let copied = status.bytes.0.saturating_mul(100) / all;
    // 100% is reported only once the guest runs on the destination.
    let percent = if status.phase == vm::MigrationPhase::Preparing {
        0
    } else {
        copied.min(99)
    };
    let progress = MigrationProgress {
        percent: Some(format!("{percent}%")),
        rounds: i32::try_from(status.rounds).ok(),
        transferred: Some(Quantity::from_bytes(status.bytes.0)),
        remaining: Some(Quantity::from_bytes(status.remaining.0)),
        predicted_downtime: status.downtime_ms_predicted.map(ms),
        measured_downtime: status.downtime_ms.map(ms),
        total: Some(ms(status.total_ms)),
    };
    finish(progress, phase)
}

fn finish(mut progress: MigrationProgress, phase: MigrationPhase) -> MigrationProgress {
    if phase == MigrationPhase::Succeeded {
        progress.percent = Some("100%".to_owned());
        progress.remaining = Some(Quantity::from_bytes(0));
    }
    progress
}

fn failover_status(
    old: &FailoverStatus,
    update: &FailoverUpdate,
    created: Option<Time>,
    now: Timestamp,
) -> FailoverStatus {
    let mut status = old.clone();
    let mut complete = |state: &str, reason: &str, message: &str| {
        let new = new_condition(condition::COMPLETE, state, reason, message, now);
        set_condition(&mut status.conditions, new);
    };
    match update {
        FailoverUpdate::Suspected { message } => {
            complete("Unknown", reason::NODE_SUSPECT, message);
            status.phase = Some(FailoverPhase::Suspected);
        }
        FailoverUpdate::TakenOver {
            target,
            epoch,
            proof,
        } => {
            complete("Unknown", reason::TAKEN_OVER, "the guest is starting");
            status.phase = Some(FailoverPhase::TakenOver);
            taken_over(&mut status, target, epoch.to_string(), *proof, now);
        }
        FailoverUpdate::Succeeded {
            target,
            epoch,
            proof,
        } => {
            complete("True", reason::SUCCEEDED, "the guest is running");
            status.phase = Some(FailoverPhase::Succeeded);
            taken_over(&mut status, target, epoch.to_string(), *proof, now);
            status.started_at = Some(Time(now));
        }
        FailoverUpdate::Withdrawn { message } => {
            complete("False", reason::NODE_RETURNED, message);
            status.phase = Some(FailoverPhase::Withdrawn);
        }
    }
    status.suspected_at = status.suspected_at.or(created).or(Some(Time(now)));
    status
}

fn taken_over(
    status: &mut FailoverStatus,
    target: &str,
    epoch: String,
    proof: Option<FenceProof>,
    now: Timestamp,
) {
    status.target = Some(target.to_owned());
    status.new_epoch = Some(epoch);
    status.proof = proof.map(proof_of).or_else(|| status.proof.clone());
    // The coordinator verifies the proof and transfers ownership in one step, so both times are equal.
    status.proved_at.get_or_insert(Time(now));
    status.taken_over_at.get_or_insert(Time(now));
}

fn proof_of(proof: FenceProof) -> FencingProof {
    let (kind, detail) = match proof {
        FenceProof::SafeTimeElapsed {
            watched_ms,
            required_ms,
        } => (
            ProofKind::SafeTimeElapsed,
            format!("no heartbeat for {watched_ms} ms; {required_ms} ms required"),
        ),
        FenceProof::Administrator(AdminConfirmation::Confirmed) => (
            ProofKind::Administrator,
            "manual fencing confirmation".to_owned(),
        ),
        FenceProof::Administrator(AdminConfirmation::OutOfServiceTaint) => (
            ProofKind::OutOfServiceTaint,
            "node.kubernetes.io/out-of-service".to_owned(),
        ),
        FenceProof::Rebooted => (ProofKind::Rebooted, "the node rebooted".to_owned()),
    };
    FencingProof { kind, detail }
}

#[cfg(test)]
mod tests {
    use bascule_types::{AttemptId, Bytes, Epoch};

    use super::*;

    fn update(phase: MigrationPhase) -> MigrationUpdate {
        MigrationUpdate {
            phase,
            source: Some("a".to_owned()),
            target: Some("b".to_owned()),
            source_epoch: Some(Epoch(4)),
            reason: reason::IN_PROGRESS,
            message: "memory is being copied".to_owned(),
            progress: None,
        }
    }

    fn copying() -> MigrationStatus {
        MigrationStatus {
            attempt: AttemptId::from_bytes([1; 16]),
            phase: vm::MigrationPhase::PreCopy,
            rounds: 3,
            bytes: Bytes::mib(300),
            remaining: Bytes::mib(100),
            downtime_ms_predicted: Some(40),
            downtime_ms: Some(12),
            total_ms: 1500,
            timings: vec![],
            failure: None,
        }
    }

    fn at(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    #[test]
    fn each_stage_gets_its_timestamp_once() {
        let old = VirtualMachineMigrationStatus::default();
        let placing = migration_status(&old, &update(MigrationPhase::Placing), Some(1), at(1));
        assert_eq!(
            (placing.started_at.is_some(), placing.placed_at.is_some()),
            (true, false)
        );
        let copying = migration_status(&placing, &update(MigrationPhase::Copying), Some(1), at(2));
        let done = migration_status(&copying, &update(MigrationPhase::Succeeded), Some(1), at(9));
        assert_eq!(done.started_at, placing.started_at);
        assert_eq!(done.placed_at.unwrap().0, at(2));
        assert_eq!(done.finished_at.unwrap().0, at(9));
        assert_eq!(done.conditions[0].status, "True");
    }

    #[test]
    fn progress_is_in_percent_and_reaches_100_only_on_success() {
        let mut running = update(MigrationPhase::Copying);
        running.progress = Some(copying());
        let old = VirtualMachineMigrationStatus::default();
        let status = migration_status(&old, &running, Some(1), at(1));
        let shown = status.progress.clone().unwrap();
        assert_eq!(shown.percent.as_deref(), Some("75%"));
        assert_eq!(shown.measured_downtime.unwrap().as_str(), "12ms");
        let done = migration_status(&status, &update(MigrationPhase::Succeeded), Some(1), at(2));
        let shown = done.progress.unwrap();
        assert_eq!(shown.percent.as_deref(), Some("100%"));
        assert_eq!(
            shown.measured_downtime.unwrap().as_str(),
            "12ms",
            "kept from before"
        );
    }

    #[test]
    fn a_failover_keeps_the_time_of_each_stage_and_its_proof() {
        let proof = Some(FenceProof::SafeTimeElapsed {
            watched_ms: 28,
            required_ms: 27,
        });
        let (target, epoch) = ("b".to_owned(), Epoch(6));
        let old = FailoverStatus::default();
        let suspected = FailoverUpdate::Suspected {
            message: "no heartbeat".to_owned(),
        };
        let status = failover_status(&old, &suspected, Some(Time(at(1))), at(2));
        let taken = FailoverUpdate::TakenOver {
            target: target.clone(),
            epoch,
            proof,
        };
        let status = failover_status(&status, &taken, None, at(30));
        let started = FailoverUpdate::Succeeded {
            target,
            epoch,
            proof,
        };
        let status = failover_status(&status, &started, None, at(33));
        let second = |time: &Option<Time>| time.as_ref().unwrap().0.as_second();
        assert_eq!(second(&status.suspected_at), 1);
        assert_eq!(second(&status.taken_over_at), 30);
        assert_eq!(second(&status.started_at), 33);
        assert_eq!(status.proof.unwrap().kind, ProofKind::SafeTimeElapsed);
        assert_eq!(status.conditions[0].status, "True");
    }
}
