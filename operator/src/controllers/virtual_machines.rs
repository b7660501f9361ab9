//! The rounds of the leader: every virtual machine is looked at whenever something has changed, and
//! when its own plan asked for it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use bascule_crds::names::{condition, reason};
use bascule_crds::{VirtualMachine, VirtualMachineStatus};
use bascule_operator_core::{History, plan};
use jiff::Timestamp;
use kube::{Api, ResourceExt};
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use crate::clock::now;
use crate::context::OperatorContext;
use crate::execute::{Execution, Refused};
use crate::kube_api::{apply_status, ignore_not_found, new_condition};
use crate::record_status::refuse_strays;

/// What the operator remembers of one virtual machine, and when it looks at it next.
#[derive(Debug)]
struct Slot {
    memory: Arc<Mutex<History>>,
    due: Instant,
}

/// Goes round for ever.
#[expect(clippy::too_many_lines, reason = "one loop with its state")]
pub(crate) async fn run(context: OperatorContext, changed: Arc<Notify>) {
    let permits = Arc::new(Semaphore::new(CONCURRENCY));
    let mut slots: HashMap<String, Slot> = HashMap::new();
    let mut busy: HashSet<String> = HashSet::new();
    let mut running: JoinSet<(String, Duration)> = JoinSet::new();
    loop {
        let next = slots
            .iter()
            .filter(|(uid, _)| !busy.contains(*uid))
            .map(|(_, slot)| slot.due)
            .min()
            .unwrap_or_else(|| Instant::now() + REQUEUE_MAX);
        tokio::select! {
            () = changed.notified() => {
                // Changes come in bursts.
                tokio::time::sleep(DEBOUNCE).await;
                for slot in slots.values_mut() {
                    slot.due = Instant::now();
                }
            }
            () = tokio::time::sleep_until(next) => {}
            Some(done) = running.join_next(), if !running.is_empty() => {
                if let Ok((uid, requeue)) = done {
                    busy.remove(&uid);
                    if let Some(slot) = slots.get_mut(&uid) {
                        slot.due = slot.due.max(Instant::now() + MIN_PAUSE)
                            .min(Instant::now() + requeue);
                    }
                } else {
                    // A task that panicked left its name behind.
                    busy.clear();
                }
                continue;
            }
        }
        let vms = context.stores.vms.state();
        context.metrics.count_vms(vms.iter().map(AsRef::as_ref));
        context.metrics.observe_nodes(context.nodes.states().iter());
        if let Err(error) = refuse_strays(&context).await {
            tracing::warn!(
                error = format!("{error:#}"),
                "migrations of no virtual machine"
            );
        }
        slots.retain(|uid, _| vms.iter().any(|vm| vm.uid().as_ref() == Some(uid)));
        for vm in vms {
            let Some(uid) = vm.uid() else { continue };
            let slot = slots.entry(uid.clone()).or_insert_with(|| Slot {
                memory: Arc::default(),
                due: Instant::now(),
            });
            if busy.contains(&uid) || slot.due > Instant::now() {
                continue;
            }
            slot.due = Instant::now() + REQUEUE_MAX;
            busy.insert(uid.clone());
            let (context, memory) = (context.clone(), Arc::clone(&slot.memory));
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

/// Observes, plans, executes and reports once. Says when to look again.
async fn reconcile(
    context: &OperatorContext,
    vm: &VirtualMachine,
    memory: &Mutex<History>,
) -> Duration {
    let intent = match crate::vm_intent::intent(vm) {
        Ok(intent) => intent,
        Err(error) => {
            // The schema lets no such thing in; an older schema may have.
            if let Err(error) = report_invalid(context, vm, &format!("{error:#}")).await {
                tracing::warn!(error = format!("{error:#}"), "status");
            }
            return REQUEUE_MAX;
        }
    };
    let mut history = memory
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let rows = context.ownership.get(&intent.volume);
    let observed = crate::observe::observe(
        vm,
        &context.stores,
        &context.nodes.states(),
        rows.as_deref(),
        &history,
        now(),
    );
    let plan = plan(&intent, &observed, now());
    let actions = plan.actions.len();
    let mut execution = Execution {
        context,
        vm,
        intent: &intent,
        now: now(),
        memory: &mut history,
    };
    let executed = execution.run(&plan.actions).await;
    if executed.is_ok() && plan.report.ready.status == Some(true) {
        history.error = None;
    }
    history.unknown_since = plan.report.unknown_since;
    history.target_lost = plan.report.target_lost;
    let told_before = observed.history.error == history.error;
    *memory.lock().unwrap_or_else(PoisonError::into_inner) = history;
    let mut requeue = plan.requeue;
    if let Err(error) = executed {
        requeue = requeue.min(RETRY);
        let refused = error.is::<Refused>();
        let error = format!("{error:#}");
        if !refused {
            context.metrics.plan_failures.inc();
            tracing::warn!(error, actions, "the plan was not carried out");
        } else if told_before {
            tracing::debug!(error, "refused again");
        } else {
            tracing::info!(error, "refused");
        }
    }
    let status = crate::vm_status::status(vm, &intent, &observed, &plan.report, Timestamp::now());
    if vm.status.as_ref() != Some(&status)
        && let Err(error) = write_status(context, vm, &status).await
    {
        tracing::warn!(error = format!("{error:#}"), "status");
        requeue = requeue.min(RETRY);
    }
    requeue
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
        Timestamp::now(),
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

/// Calls under way at once: a plan waits for nodes that do not answer.
const CONCURRENCY: usize = 32;
/// A burst of watch events.
const DEBOUNCE: Duration = Duration::from_millis(30);
/// Between two looks at one virtual machine.
const MIN_PAUSE: Duration = Duration::from_millis(50);
/// What no watch announces is noticed after this at the latest.
const REQUEUE_MAX: Duration = Duration::from_secs(30);
/// After a plan that could not be carried out.
const RETRY: Duration = Duration::from_secs(1);
