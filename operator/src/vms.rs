//! The rounds of the leader: every virtual machine is looked at whenever something has changed, and
//! when its own plan asked for it.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::Result;
use bascule_crds::VirtualMachine;
use bascule_crds::names::{condition, reason};
use bascule_operator_core::{History, plan};
use jiff::Timestamp;
use kube::api::Patch;
use kube::{Api, ResourceExt};
use serde_json::json;
use tokio::sync::{Notify, Semaphore};
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::Instrument;

use crate::execute::{Cluster, Execution, Refused, apply};
use crate::run::now;

/// What the operator remembers of one virtual machine, and when it looks at it next.
#[derive(Debug)]
struct Slot {
    memory: Arc<Mutex<History>>,
    due: Instant,
}

/// Goes round for ever.
#[expect(clippy::too_many_lines, reason = "one loop with its state")]
pub(crate) async fn rounds(cluster: Cluster, changed: Arc<Notify>) {
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
        let vms = cluster.stores.vms.state();
        cluster.metrics.count_vms(vms.iter().map(AsRef::as_ref));
        cluster.metrics.observe_nodes(cluster.nodes.states().iter());
        if let Err(error) = crate::records::refuse_strays(&cluster).await {
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
            let (cluster, memory) = (cluster.clone(), Arc::clone(&slot.memory));
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
                    let requeue = look_at(&cluster, &vm, &memory).await;
                    drop(permit);
                    (uid, requeue)
                }
                .instrument(span),
            );
        }
    }
}

/// Observes, plans, executes and reports once. Says when to look again.
async fn look_at(cluster: &Cluster, vm: &VirtualMachine, memory: &Mutex<History>) -> Duration {
    let intent = match crate::intent::intent(vm) {
        Ok(intent) => intent,
        Err(error) => {
            // The schema lets no such thing in; an older schema may have.
            if let Err(error) = report_invalid(cluster, vm, &format!("{error:#}")).await {
                tracing::warn!(error = format!("{error:#}"), "status");
            }
            return REQUEUE_MAX;
        }
    };
    let mut history = memory
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .clone();
    let rows = cluster.rows.get(&intent.volume);
    let observed = crate::observe::observe(
        vm,
        &cluster.stores,
        &cluster.nodes.states(),
        rows.as_deref(),
        &history,
        now(),
    );
    let plan = plan(&intent, &observed, now());
    let actions = plan.actions.len();
    let mut execution = Execution {
        context: cluster,
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
            cluster.metrics.plan_failures.inc();
            tracing::warn!(error, actions, "the plan was not carried out");
        } else if told_before {
            tracing::debug!(error, "refused again");
        } else {
            tracing::info!(error, "refused");
        }
    }
    let status = crate::report::status(vm, &intent, &observed, &plan.report, Timestamp::now());
    if vm.status.as_ref() != Some(&status)
        && let Err(error) = write(cluster, vm, &json!(status)).await
    {
        tracing::warn!(error = format!("{error:#}"), "status");
        requeue = requeue.min(RETRY);
    }
    requeue
}

async fn report_invalid(cluster: &Cluster, vm: &VirtualMachine, message: &str) -> Result<()> {
    let mut status = vm.status.clone().unwrap_or_default();
    let mut ready = crate::records::condition_of(
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
    write(cluster, vm, &json!(status)).await
}

async fn write(cluster: &Cluster, vm: &VirtualMachine, status: &serde_json::Value) -> Result<()> {
    let namespace = vm.namespace().unwrap_or_default();
    let api: Api<VirtualMachine> = Api::namespaced(cluster.client.clone(), &namespace);
    let patch = json!({
        "apiVersion": "bascule.dev/v1alpha1",
        "kind": "VirtualMachine",
        "status": status,
    });
    match api
        .patch_status(&vm.name_any(), &apply(), &Patch::Apply(&patch))
        .await
    {
        // It was deleted in the meantime.
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => Ok(other.map(drop)?),
    }
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
