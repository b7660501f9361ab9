//! The VirtualMachine controller: reconciles every VM after each watch event or changed node report, and
//! again at the time that its last plan set.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use bascule_crds::names::{condition, reason};
use bascule_crds::{VirtualMachine, VirtualMachineStatus};
use bascule_operator_core::{PlannerMemory, VmIntent, plan};
use kube::{Api, ResourceExt};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tracing::Instrument;

use crate::clock::now;
use crate::context::OperatorContext;
use crate::execute::{Execution, Refused};
use crate::kube_api::{apply_status, ignore_not_found, new_condition};
use crate::mac_index;
use crate::record_status::fail_orphaned_migrations;

/// The queue entry of one VM, by the VM's UID: the planner's memory, and the time of the next
/// reconciliation.
#[derive(Debug)]
struct QueueEntry {
    memory: Arc<Mutex<PlannerMemory>>,
    due: Instant,
}

/// Runs until the leader's tasks are aborted.
#[expect(clippy::too_many_lines, reason = "one loop with its state")]
pub(crate) async fn run(context: OperatorContext, changed: Arc<Notify>) {
    let permits = Arc::new(Semaphore::new(CONCURRENCY));
    let mut queue: HashMap<String, QueueEntry> = HashMap::new();
    let mut busy: HashSet<String> = HashSet::new();
    let mut running: JoinSet<(String, Duration)> = JoinSet::new();
    loop {
        let next = queue
            .iter()
            .filter(|(uid, _)| !busy.contains(*uid))
            .map(|(_, entry)| entry.due)
            .min()
            .unwrap_or_else(|| Instant::now() + REQUEUE_MAX);
        tokio::select! {
            () = changed.notified() => {
                // Watch events come in bursts.
                tokio::time::sleep(DEBOUNCE).await;
                for entry in queue.values_mut() {
                    entry.due = Instant::now();
                }
            }
            () = tokio::time::sleep_until(next) => {}
            Some(done) = running.join_next(), if !running.is_empty() => {
                let (uid, requeue) = outcome(done);
                busy.remove(&uid);
                if let Some(entry) = queue.get_mut(&uid) {
                    entry.due = entry.due.max(Instant::now() + MIN_PAUSE)
                        .min(Instant::now() + requeue);
                }
                continue;
            }
        }
        let vms = context.stores.vms.state();
        context.metrics.count_vms(vms.iter().map(AsRef::as_ref));
        context.metrics.observe_nodes(context.nodes.states().iter());
        if let Err(error) = fail_orphaned_migrations(&context).await {
            tracing::warn!(
                error = format!("{error:#}"),
                "cannot fail migrations of VMs that do not exist"
            );
        }
        queue.retain(|uid, _| vms.iter().any(|vm| vm.uid().as_ref() == Some(uid)));
        for vm in vms {
            let Some(uid) = vm.uid() else { continue };
            let entry = queue.entry(uid.clone()).or_insert_with(|| QueueEntry {
                memory: Arc::default(),
                due: Instant::now(),
            });
            if busy.contains(&uid) || entry.due > Instant::now() {
                continue;
            }
            entry.due = Instant::now() + REQUEUE_MAX;
            busy.insert(uid.clone());
            let (context, memory) = (context.clone(), Arc::clone(&entry.memory));
            let permits = Arc::clone(&permits);
            let migration = vm
                .status
                .as_ref()
                .and_then(|status| status.migration.clone());
            let span = tracing::info_span!(
                "vm",
                name = vm.name_any(),
                namespace = vm.namespace(),
                migration
            );
            running.spawn(
                async move {
                    let permit = permits.acquire().await;
                    let requeue = reconcile(&context, &vm, &memory).await;
                    drop(permit);
                    (uid, requeue)
                }
                .instrument(span),
            );
        }
    }
}

/// What a reconciliation returned. One that panicked ends this leader, as in a release build, which
/// aborts: nothing here knows which VM is not busy any more.
fn outcome<T>(done: Result<T, JoinError>) -> T {
    match done {
        Ok(outcome) => outcome,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

/// Observes, plans, executes and writes the status once. Returns the delay until the next
/// reconciliation.
async fn reconcile(
    context: &OperatorContext,
    vm: &VirtualMachine,
    shared_memory: &Mutex<PlannerMemory>,
) -> Duration {
    let Some(intent) = valid_intent(context, vm).await else {
        return REQUEUE_MAX;
    };
    let mut memory = shared_memory
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let rows = context.ownership.get(&intent.volume);
    let observed = crate::observe::observe(
        vm,
        &context.stores,
        &context.nodes.states(),
        rows.as_deref(),
        &memory,
        now(),
    );
    memory
        .reservations
        .clone_from(&observed.memory.reservations);
    let plan = plan(&intent, &observed, now());
    let actions = plan.actions.len();
    let mut execution = Execution {
        context,
        vm,
        intent: &intent,
        now: now(),
        memory: &mut memory,
    };
    let executed = execution.run(&plan.actions).await;
    let conflict = context.stores.macs.conflict(vm, crate::clock::timestamp());
    if let Some(news) = conflict.as_ref().filter(|c| mac_index::is_news(vm, c)) {
        execution
            .publish_event(&news.reason, &news.message, true)
            .await;
    }
    if executed.is_ok() && plan.report.ready.status == Some(true) {
        memory.error = None;
    }
    memory.unknown_since = plan.report.unknown_since;
    memory.target_lost = plan.report.target_lost;
    memory.panics = Some(plan.report.panics);
    (context.metrics.guest_panics).inc_by(plan.report.new_panics.into());
    let refusal = |memory: &PlannerMemory| memory.reservation_refusal.as_ref().map(|r| r.reason);
    let logged_before =
        observed.memory.error == memory.error && refusal(&observed.memory) == refusal(&memory);
    let reservations = memory.reservations.clone();
    *shared_memory.lock().unwrap_or_else(PoisonError::into_inner) = memory;
    let mut requeue = plan.requeue;
    if let Err(error) = executed {
        requeue = requeue.min(RETRY);
        log_failure(context, &error, actions, logged_before);
    }
    let mut status = crate::vm_status::status(
        vm,
        &intent,
        &observed,
        &plan.report,
        &reservations,
        crate::clock::timestamp(),
    );
    mac_index::set(&mut status.conditions, conflict);
    if vm.status.as_ref() != Some(&status)
        && let Err(error) = write_status(context, vm, &status).await
    {
        tracing::warn!(error = format!("{error:#}"), "cannot write the status");
        requeue = requeue.min(RETRY);
    }
    requeue
}

/// The intent; a spec that has none is reported.
async fn valid_intent(context: &OperatorContext, vm: &VirtualMachine) -> Option<VmIntent> {
    match crate::vm_intent::intent(vm) {
        Ok(intent) => Some(intent),
        Err(error) => {
            // The CRD's validation rules refuse such a spec; an earlier version of the CRD may not have.
            if let Err(error) = report_invalid(context, vm, &format!("{error:#}")).await {
                tracing::warn!(error = format!("{error:#}"), "cannot write the status");
            }
            None
        }
    }
}

/// Logs why a plan of `actions` actions was not carried out: a refusal that was logged before at debug level.
fn log_failure(
    context: &OperatorContext,
    error: &anyhow::Error,
    actions: usize,
    logged_before: bool,
) {
    let refused = error.is::<Refused>();
    let error = format!("{error:#}");
    if !refused {
        context.metrics.reconcile_errors.inc();
        tracing::warn!(error, actions, "reconcile error");
    } else if logged_before {
        tracing::debug!(error, "refused again");
    } else {
        tracing::info!(error, "refused");
    }
}

async fn report_invalid(
    context: &OperatorContext,
    vm: &VirtualMachine,
    message: &str,
) -> Result<()> {
    let mut status = vm.status.clone().unwrap_or_default();
    let mut ready = new_condition(
        condition::READY,
        "False",
        reason::INVALID_SPEC,
        message,
        crate::clock::timestamp(),
    );
    ready.observed_generation = vm.metadata.generation;
    bascule_crds::set_condition(&mut status.conditions, ready);
    if vm.status.as_ref() == Some(&status) {
        return Ok(());
    }
    write_status(context, vm, &status).await
}

async fn write_status(
    context: &OperatorContext,
    vm: &VirtualMachine,
    status: &VirtualMachineStatus,
) -> Result<()> {
    let namespace = vm.namespace().unwrap_or_default();
    let api: Api<VirtualMachine> = Api::namespaced(context.client.clone(), &namespace);
    ignore_not_found(apply_status(&api, &vm.name_any(), status).await)
}

/// Concurrent reconciliations; above one per core, because each may wait for a node that does not
/// respond.
const CONCURRENCY: usize = 32;
/// Delay after a watch event, to coalesce a burst into one reconciliation.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// Minimum delay between two reconciliations of one VM.
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// Resync period: maximum delay between two reconciliations of one VM.
const REQUEUE_MAX: Duration = Duration::from_secs(30);
/// Delay after a reconcile error.
const RETRY: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    /// All VMs counted as idle after it, and one that was being reconciled was reconciled twice at a time.
    #[tokio::test]
    async fn a_reconciliation_that_panics_ends_the_leader() {
        let mut leader: JoinSet<()> = JoinSet::new();
        leader.spawn(async {
            let mut running: JoinSet<()> = JoinSet::new();
            running.spawn(async { panic!("an invariant is broken") });
            while let Some(done) = running.join_next().await {
                outcome(done);
            }
        });
        let ended = leader.join_next().await.unwrap();
        assert!(ended.unwrap_err().is_panic());
    }
}
