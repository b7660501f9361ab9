//! The SharedVolume controller: reconciles all volumes periodically, one after the other.

mod status;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_crds::names::{ANNOTATION_CONFIRM_FENCED, FIELD_MANAGER, VOLUME_FINALIZER};
use bascule_crds::{Initialize, SharedVolume};
use bascule_ipc::volume::{FencingMode, Rows};
use bascule_node_api::command::{Backing, Command, FormatOptions, Outcome, RejectReason};
use bascule_operator_core::{
    FormatState, Moment, NodeOnVolume, Stream, VolumeAction, VolumeIntent, VolumeObserved,
    plan_volume,
};
use bascule_types::{Bytes, Generation, Owner, SlotId};
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::{Api, ResourceExt};
use serde_json::json;

use self::status::{Reported, report};
use crate::clock::now;
use crate::context::OperatorContext;
use crate::execute::Refused;
use crate::kube_api::ignore_not_found;
use crate::node_clients::NodeState;
use crate::ownership_cache::{coordinates, volume_status};

/// What the controller remembers of one volume between reconciliations.
#[derive(Debug, Default)]
struct Memory {
    format: FormatState,
    /// The message of the last failed attach or format, by node.
    attach_errors: BTreeMap<String, String>,
    refusals: Refusals,
    /// Since when no node's report stream has been up.
    unreachable_since: Option<Moment>,
}

/// The refusals of one reconciliation and of the one before. Each is logged once for as long as it lasts.
#[derive(Debug, Default)]
struct Refusals {
    before: BTreeSet<String>,
    now: BTreeSet<String>,
}

impl Refusals {
    /// Begins a reconciliation.
    fn begin(&mut self) {
        self.before = std::mem::take(&mut self.now);
    }

    /// Whether there was no such refusal, neither before nor earlier in this reconciliation.
    fn is_news(&mut self, text: &str) -> bool {
        self.now.insert(text.to_owned()) && !self.before.contains(text)
    }
}

/// Runs until the leader's tasks are aborted.
pub(crate) async fn run(context: OperatorContext) {
    let mut memories: HashMap<String, Memory> = HashMap::new();
    loop {
        let mut requeue = REQUEUE_MAX;
        let volumes = context.stores.volumes.state();
        memories.retain(|uid, _| {
            volumes
                .iter()
                .any(|volume| volume.uid().as_ref() == Some(uid))
        });
        for volume in volumes {
            let memory = memories
                .entry(volume.uid().unwrap_or_default())
                .or_default();
            requeue = requeue.min(reconcile(&context, &volume, memory).await);
        }
        tokio::time::sleep(requeue).await;
    }
}

async fn reconcile(
    context: &OperatorContext,
    volume: &SharedVolume,
    memory: &mut Memory,
) -> Duration {
    let states = context.nodes.states();
    let rows = context.ownership.get(&volume.name_any());
    let intent = intent(volume);
    let mut observed = observe(context, volume, &states, rows.as_deref(), memory);
    let reachable = observed.nodes.iter().any(|node| node.stream == Stream::Up);
    memory.unreachable_since = match reachable {
        true => None,
        false => Some(memory.unreachable_since.unwrap_or_else(now)),
    };
    observed.no_report_for = memory.unreachable_since.map(|since| now().since(since));
    let plan = plan_volume(&intent, &observed);
    memory.refusals.begin();
    for action in &plan.actions {
        tracing::debug!(volume = intent.name, ?action, "execute");
        let executed = execute(context, volume, memory, action).await;
        if let Err(error) = executed {
            log_failure(context, &intent.name, memory, action, &error);
        }
    }
    let reported = Reported {
        plan: &plan,
        observed: &observed,
        states: &states,
        rows: rows.as_deref(),
    };
    if let Err(error) = report(context, volume, &reported).await {
        tracing::warn!(
            volume = intent.name,
            error = format!("{error:#}"),
            "cannot write the status"
        );
    }
    plan.requeue
}

/// A refusal is logged once, at INFO: the volume's conditions report it. Any other error is a WARN and
/// counts as a reconcile error.
fn log_failure(
    context: &OperatorContext,
    volume: &str,
    memory: &mut Memory,
    action: &VolumeAction,
    error: &anyhow::Error,
) {
    let text = format!("{error:#}");
    if !error.is::<Refused>() {
        context.metrics.reconcile_errors.inc();
        tracing::warn!(volume, ?action, error = text, "reconcile error");
    } else if memory.refusals.is_news(&text) {
        tracing::info!(volume, ?action, error = text, "refused");
    } else {
        tracing::debug!(volume, ?action, error = text, "refused again");
    }
}

fn intent(volume: &SharedVolume) -> VolumeIntent {
    let status = volume.status.clone().unwrap_or_default();
    let id = volume.spec.volume_id.clone().or(status.volume_id);
    let confirmations = volume
        .annotations()
        .get(ANNOTATION_CONFIRM_FENCED)
        .cloned()
        .unwrap_or_default();
    VolumeIntent {
        name: volume.name_any(),
        fencing: fencing(volume),
        initialize: volume.spec.initialize == Initialize::IfBlank,
        volume: id.and_then(|id| id.parse().ok()),
        formatting_node: status.formatting_node,
        trust_taint: volume.spec.fencing.trust_out_of_service_taint,
        confirmed: confirmations.split(',').filter_map(confirmed).collect(),
        deleting: volume.metadata.deletion_timestamp.is_some(),
        finalizer: volume
            .finalizers()
            .iter()
            .any(|finalizer| finalizer == VOLUME_FINALIZER),
    }
}

const fn fencing(volume: &SharedVolume) -> Option<FencingMode> {
    match volume.spec.fencing.mode {
        bascule_crds::FencingMode::Watchdog => Some(FencingMode::Watchdog),
        bascule_crds::FencingMode::LeaseOnly => Some(FencingMode::LeaseOnly),
        bascule_crds::FencingMode::PersistentReservation => None,
    }
}

/// Parses `<node>/<slot>/<generation>` of a manual fencing confirmation. Slot and generation count; the
/// node's name is for readers only.
fn confirmed(text: &str) -> Option<Owner> {
    let mut parts = text.trim().rsplit('/');
    let generation = Generation(parts.next()?.parse().ok()?);
    let slot = SlotId(parts.next()?.parse().ok()?);
    Some(Owner { slot, generation })
}

fn observe(
    context: &OperatorContext,
    volume: &SharedVolume,
    states: &BTreeMap<String, NodeState>,
    rows: Option<&Rows>,
    memory: &Memory,
) -> VolumeObserved {
    let name = volume.name_any();
    let peers = crate::observe::peers(&name, states);
    let before = volume
        .status
        .as_ref()
        .map_or(&[][..], |status| &status.nodes);
    let mut nodes: Vec<NodeOnVolume> = context
        .stores
        .nodes
        .state()
        .iter()
        .filter_map(|node| {
            let state = states.get(&node.name_any())?;
            let mut view = node_view(node, state, &name, memory);
            // Slots of nodes that have not reported to this operator yet: seen by their peers.
            let slot = peers.iter().find(|peer| Some(peer.node) == view.uid);
            view.owner = view.owner.or_else(|| slot.map(|peer| peer.owner));
            // Nodes that never ran bascule-node are left out.
            let known = before.iter().any(|old| old.name == view.name);
            (state.report.is_some() || slot.is_some() || known).then_some(view)
        })
        .collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    let uses = |vm: &bascule_crds::VirtualMachine| vm.spec.volume == name;
    VolumeObserved {
        nodes,
        format: memory.format.clone(),
        in_use: context.stores.vms.find(uses).is_some(),
        fenced: rows
            .map(|rows| rows.fences.iter().map(|f| f.victim).collect())
            .unwrap_or_default(),
        no_report_for: None,
    }
}

fn node_view(node: &Node, state: &NodeState, volume: &str, memory: &Memory) -> NodeOnVolume {
    let name = node.name_any();
    let report = state.report.as_ref();
    let attached = report.and_then(|report| report.volumes.iter().find(|v| v.name == volume));
    let status = volume_status(state, volume);
    let broken = attached.and_then(|attached| attached.status.as_ref().err().cloned());
    let taints = node.spec.as_ref().and_then(|spec| spec.taints.as_ref());
    NodeOnVolume {
        // Where it is attached, the one of its slot: the Node object may have been registered anew.
        uid: match (report, attached) {
            (Some(report), Some(_)) => Some(report.uid_on(volume)),
            _ => node.uid().and_then(|uid| uid.parse().ok()),
        },
        stream: state.stream,
        out_of_service: taints
            .into_iter()
            .flatten()
            .any(|taint| taint.key == OUT_OF_SERVICE),
        attached: attached.is_some(),
        volume: status.map(|status| status.volume),
        path: status.map(|status| status.path),
        reason: status
            .and_then(|status| status.reason.clone())
            .or(broken)
            .or_else(|| memory.attach_errors.get(&name).cloned()),
        owner: status.and_then(|status| status.owner),
        coordinator: status.is_some_and(coordinates),
        name,
    }
}

async fn execute(
    context: &OperatorContext,
    volume: &SharedVolume,
    memory: &mut Memory,
    action: &VolumeAction,
) -> Result<()> {
    let name = volume.name_any();
    match action {
        VolumeAction::AddFinalizer => finalizer(context, volume, true).await,
        VolumeAction::RemoveFinalizer => finalizer(context, volume, false).await,
        VolumeAction::ChooseFormatter { node } => {
            patch_status(context, volume, json!({"formattingNode": node})).await
        }
        VolumeAction::RecordVolume { volume: id } => {
            patch_status(context, volume, json!({"volumeId": id.to_string()})).await
        }
        VolumeAction::Format { node } => format(context, volume, memory, node).await,
        VolumeAction::Attach { node } => {
            let known = volume.spec.volume_id.clone();
            let known = known.or_else(|| volume.status.as_ref()?.volume_id.clone());
            let command = Command::AttachVolume {
                name,
                backing: backing(volume)?,
                volume: known.and_then(|id| id.parse().ok()),
                cluster: context.cluster_id,
            };
            let outcome = context.nodes.execute(node, &command).await?;
            if let Outcome::Rejected { message, .. } = outcome {
                memory.attach_errors.insert(node.clone(), message.clone());
                return Err(Refused(format!("{node}: {message}")).into());
            }
            memory.attach_errors.remove(node);
            Ok(())
        }
        VolumeAction::Detach { node } => rejected(
            context
                .nodes
                .execute(node, &Command::DetachVolume { name })
                .await?,
        ),
        VolumeAction::Change { via, change } => {
            let command = Command::Change {
                volume: name.clone(),
                change: change.clone(),
            };
            let outcome = context.nodes.execute(via, &command).await?;
            context.ownership.refresh(&name).await;
            rejected(outcome)
        }
    }
}

async fn format(
    context: &OperatorContext,
    volume: &SharedVolume,
    memory: &mut Memory,
    node: &str,
) -> Result<()> {
    let name = volume.name_any();

    let command = Command::FormatVolume {
        backing: backing(volume)?,
        cluster: context.cluster_id,
        options: options(volume)?,
    };
    match context.nodes.execute(node, &command).await? {
        Outcome::Formatted { volume: id } => {
            memory.format = FormatState::NotBlank;
            patch_status(context, volume, json!({"volumeId": id.to_string()})).await
        }
        Outcome::Rejected {
            reason: RejectReason::NotBlank,
            message,
        } => {
            tracing::info!(volume = name, node, message, "not formatted");
            memory.format = FormatState::NotBlank;
            Ok(())
        }
        Outcome::Rejected { message, .. } => {
            memory
                .attach_errors
                .insert(node.to_owned(), message.clone());
            let message = format!("{node} cannot format the volume: {message}");
            memory.format = FormatState::Failed {
                message: message.clone(),
            };
            // Nothing was written to the device, so another node may try.
            patch_status(context, volume, json!({"formattingNode": null})).await?;
            Err(Refused(message).into())
        }
        other => bail!("unexpected outcome {other:?}"),
    }
}

fn rejected(outcome: Outcome) -> Result<()> {
    let message = match outcome {
        Outcome::Rejected { message, .. } => message,
        Outcome::Refused(refusal) => refusal.to_string(),
        Outcome::Unknown => "no coordinator responded".to_owned(),
        _ => return Ok(()),
    };
    Err(Refused(message).into())
}

async fn finalizer(context: &OperatorContext, volume: &SharedVolume, wanted: bool) -> Result<()> {
    let mut finalizers = volume.finalizers().to_vec();
    finalizers.retain(|finalizer| finalizer != VOLUME_FINALIZER);
    if wanted {
        finalizers.push(VOLUME_FINALIZER.to_owned());
    }
    let patch = json!({"metadata": {
        "finalizers": finalizers,
        "resourceVersion": volume.resource_version(),
    }});
    let api: Api<SharedVolume> = Api::all(context.client.clone());
    let outcome = api
        .patch(
            &volume.name_any(),
            &PatchParams::default(),
            &Patch::Merge(&patch),
        )
        .await;
    ignore_not_found(outcome)
}

/// Writes `volumeId` or `formattingNode`, conditional on the resource version that was read, because
/// later decisions depend on it.
async fn patch_status(
    context: &OperatorContext,
    volume: &SharedVolume,
    mut fields: serde_json::Value,
) -> Result<()> {
    // A patch of one of the two fields must not drop the other.
    let status = volume.status.clone().unwrap_or_default();
    for (key, value) in [
        ("formattingNode", status.formatting_node),
        ("volumeId", status.volume_id),
    ] {
        if !fields.as_object().is_some_and(|set| set.contains_key(key)) && value.is_some() {
            fields[key] = json!(value);
        }
    }
    let patch = json!({
        "metadata": {"resourceVersion": volume.resource_version()},
        "status": fields,
    });
    let api: Api<SharedVolume> = Api::all(context.client.clone());
    let params = PatchParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    api.patch_status(&volume.name_any(), &params, &Patch::Merge(&patch))
        .await
        .context("write the status")?;
    Ok(())
}

fn backing(volume: &SharedVolume) -> Result<Backing> {
    let backing = &volume.spec.backing;
    match (&backing.device, &backing.file) {
        (Some(device), None) => Ok(Backing::Device {
            path: PathBuf::from(&device.path),
        }),
        (None, Some(file)) => Ok(Backing::File {
            path: PathBuf::from(&file.path),
            size: None,
        }),
        _ => bail!("spec.backing: set exactly one of device and file"),
    }
}

fn options(volume: &SharedVolume) -> Result<FormatOptions> {
    let timing = &volume.spec.timing;
    let ms = |duration: &bascule_crds::Duration| -> Result<u64> {
        u64::try_from(duration.to_std()?.as_millis()).context("spec.timing")
    };
    let lease = ms(&timing.lease)?;
    Ok(FormatOptions {
        fencing: fencing(volume).context("spec.fencing.mode")?,
        lease_ms: Some(lease),
        // Without an enforced persistent reservation, a watcher waits for three lease durations.
        watch_ms: Some(lease * 3),
        watchdog_ms: Some(ms(&timing.watchdog_timeout)?),
        settle_ms: Some(ms(&timing.settle)?),
        extent: Some(Bytes(volume.spec.extent_size.to_bytes()?)),
        allow_software_watchdog: volume.spec.fencing.allow_softdog,
        allow_out_of_service_taint: volume.spec.fencing.trust_out_of_service_taint,
    })
}

const OUT_OF_SERVICE: &str = "node.kubernetes.io/out-of-service";
/// Maximum delay between two reconciliations of all volumes.
const REQUEUE_MAX: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_refusal_is_news_once_for_as_long_as_it_lasts() {
        let mut refusals = Refusals::default();
        let mut news = |texts: &[&str]| -> Vec<bool> {
            refusals.begin();
            texts.iter().map(|text| refusals.is_news(text)).collect()
        };
        // Two nodes that refuse were news at each reconciliation, because only one was remembered.
        assert_eq!(news(&["n1: busy", "n2: busy"]), [true, true]);
        assert_eq!(news(&["n1: busy", "n2: busy"]), [false, false]);
        // One that is over and comes back was no news at all.
        assert_eq!(news(&["n2: busy"]), [false]);
        assert_eq!(news(&["n1: busy", "n2: busy"]), [true, false]);
    }

    #[test]
    fn a_fencing_confirmation_names_slot_and_generation() {
        let owner = Owner {
            slot: SlotId(2),
            generation: Generation(7),
        };
        assert_eq!(confirmed("node-2/2/7"), Some(owner));
        assert_eq!(confirmed(" node-2/2/7 "), Some(owner));
        assert_eq!(confirmed("node-2"), None);
        assert_eq!(confirmed("node-2/x/7"), None);
    }
}
