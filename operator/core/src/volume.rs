//! Plans one SharedVolume: it is formatted once, attached on every node, and an administrator's fencing
//! confirmation is forwarded to its coordinator.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::volume::{FencingMode, PathState};
use bascule_types::{AdminConfirmation, Change, NodeUid, Owner, VolumeId};

use crate::{Condition, Stream};

#[cfg(test)]
mod tests;

/// A SharedVolume's spec, and what its status has recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VolumeIntent {
    pub name: String,
    /// None for a declared mode that is not implemented; the volume is then refused.
    pub fencing: Option<FencingMode>,
    /// Whether a blank device may be formatted.
    pub initialize: bool,
    /// The volume id that must be on the device: from the spec, or recorded when it was found.
    pub volume: Option<VolumeId>,
    pub formatting_node: Option<String>,
    /// Whether the out-of-service taint counts as a manual fencing confirmation.
    pub trust_taint: bool,
    /// The owners that an administrator confirmed as fenced.
    pub confirmed: Vec<Owner>,
    pub deleting: bool,
    pub finalizer: bool,
}

/// The observed state of one SharedVolume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VolumeObserved {
    /// The nodes that run `bascule-node`, sorted by name.
    pub nodes: Vec<NodeOnVolume>,
    pub format: FormatState,
    /// Whether any VirtualMachine names it.
    pub in_use: bool,
    /// The owners with a fence proof on the volume.
    pub fenced: Vec<Owner>,
    /// For how long no node has reported; none while at least one does.
    pub no_report_for: Option<Duration>,
}

/// The outcome of formatting, in this operator's memory.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum FormatState {
    /// No node was asked.
    #[default]
    NotAsked,
    /// The device holds a volume or other data; attaching tells which.
    NotBlank,
    Failed {
        /// For users.
        message: String,
    },
}

/// A node's relation to one volume.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct NodeOnVolume {
    pub name: String,
    pub uid: Option<NodeUid>,
    pub stream: Stream,
    /// Whether the node has the out-of-service taint.
    pub out_of_service: bool,
    pub attached: bool,
    /// The id of the volume that the node found on the device.
    pub volume: Option<VolumeId>,
    /// None while not attached.
    pub path: Option<PathState>,
    /// Why the path is not direct, or why attaching failed; for users.
    pub reason: Option<String>,
    pub owner: Option<Owner>,
    pub coordinator: bool,
}

/// One action for a volume. All are idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum VolumeAction {
    AddFinalizer,
    RemoveFinalizer,
    /// Record in the status which node formats the device, before it does. Fails when another node was
    /// recorded in the meantime.
    ChooseFormatter {
        node: String,
    },
    Format {
        node: String,
    },
    /// Record the volume id in the status.
    RecordVolume {
        volume: VolumeId,
    },
    Attach {
        node: String,
    },
    Detach {
        node: String,
    },
    /// Request a metadata change through node `via`.
    Change {
        via: String,
        change: Change,
    },
}

/// The actions and the status that follow from one observation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePlan {
    /// Executed in this order; after a failure the later ones are still tried.
    pub actions: Vec<VolumeAction>,
    /// The status to write.
    pub report: VolumeReport,
    /// When to plan again if no watch or report triggers it earlier.
    pub requeue: Duration,
}

/// A SharedVolume's conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeReport {
    /// Nothing has been known for less than 30 s: the status stays as it is, and the conditions below
    /// are not written.
    pub keep: bool,
    /// The Ready condition.
    pub ready: Condition,
    /// The FencingAvailable condition.
    pub fencing: Condition,
}

/// Plans the next actions and the status of one SharedVolume.
#[must_use]
pub fn plan_volume(intent: &VolumeIntent, observed: &VolumeObserved) -> VolumePlan {
    let mut actions = vec![];
    if intent.deleting {
        delete(intent, observed, &mut actions);
    } else if !intent.finalizer {
        actions.push(VolumeAction::AddFinalizer);
    } else if intent.fencing.is_some() {
        if intent.volume.is_some() {
            attach(observed, &mut actions);
        } else {
            find(intent, observed, &mut actions);
        }
        register(observed, &mut actions);
        confirm(intent, observed, &mut actions);
    }
    let busy = !actions.is_empty() || intent.volume.is_none() || intent.deleting;
    VolumePlan {
        actions,
        report: VolumeReport {
            keep: !intent.deleting
                && intent.volume.is_some()
                && observed
                    .no_report_for
                    .is_some_and(|elapsed| elapsed < UNKNOWN_AFTER),
            ready: ready(intent, observed),
            fencing: fencing(intent),
        },
        requeue: if busy {
            Duration::from_secs(2)
        } else {
            Duration::from_secs(15)
        },
    }
}

/// The volume id is not known yet: format the device if it is blank, or find out what it holds.
fn find(intent: &VolumeIntent, observed: &VolumeObserved, actions: &mut Vec<VolumeAction>) {
    if let Some(found) = observed.nodes.iter().find_map(|node| node.volume) {
        return actions.push(VolumeAction::RecordVolume { volume: found });
    }
    let up = |node: &&NodeOnVolume| node.stream == Stream::Up;
    if intent.initialize && observed.format != FormatState::NotBlank {
        let chosen = observed
            .nodes
            .iter()
            .filter(up)
            .find(|node| Some(&node.name) == intent.formatting_node.as_ref());
        if let Some(node) = chosen {
            actions.push(VolumeAction::Format {
                node: node.name.clone(),
            });
        } else if let (None, Some(node)) = (&intent.formatting_node, first_able(observed)) {
            actions.push(VolumeAction::ChooseFormatter {
                node: node.name.clone(),
            });
        }
        // An unreachable chosen node may have formatted the device: no other node replaces it, but
        // others may attach and find the volume.
        if chosen.is_some() || intent.formatting_node.is_none() {
            return;
        }
    }
    for node in observed
        .nodes
        .iter()
        .filter(up)
        .filter(|node| !node.attached)
    {
        actions.push(VolumeAction::Attach {
            node: node.name.clone(),
        });
    }
}

/// The first node that reports, preferably one that has reported no error of the device.
fn first_able(observed: &VolumeObserved) -> Option<&NodeOnVolume> {
    let mut up = observed
        .nodes
        .iter()
        .filter(|node| node.stream == Stream::Up);
    up.clone()
        .find(|node| node.reason.is_none())
        .or_else(|| up.next())
}

fn attach(observed: &VolumeObserved, actions: &mut Vec<VolumeAction>) {
    for node in &observed.nodes {
        if node.stream == Stream::Up && !node.attached {
            actions.push(VolumeAction::Attach {
                node: node.name.clone(),
            });
        }
    }
}

/// Requests a slot for each attached node without one. Any node that holds a slot can forward the request.
fn register(observed: &VolumeObserved, actions: &mut Vec<VolumeAction>) {
    for node in observed
        .nodes
        .iter()
        .filter(|node| node.attached && node.volume.is_some() && node.owner.is_none())
    {
        let Some(uid) = node.uid else { continue };
        let via = reachable(observed).unwrap_or(&node.name);
        let change = Change::RegisterNode { node: uid };
        actions.push(VolumeAction::Change {
            via: via.to_owned(),
            change,
        });
    }
}

/// A manual fencing confirmation, from the annotation or the taint, goes to the coordinator once.
fn confirm(intent: &VolumeIntent, observed: &VolumeObserved, actions: &mut Vec<VolumeAction>) {
    let Some(via) = reachable(observed) else {
        return;
    };
    let by_taint = observed.nodes.iter().filter(|node| {
        // A node that still reports is not out of service, whatever its taint says.
        intent.trust_taint && node.out_of_service && node.stream != Stream::Up
    });
    let confirmations = intent
        .confirmed
        .iter()
        .map(|owner| (*owner, AdminConfirmation::Confirmed))
        .chain(
            by_taint
                .filter_map(|node| node.owner)
                .map(|owner| (owner, AdminConfirmation::OutOfServiceTaint)),
        );
    for (victim, confirmation) in
        confirmations.filter(|(victim, _)| !observed.fenced.contains(victim))
    {
        let change = Change::ConfirmFenced {
            victim,
            confirmation,
        };
        actions.push(VolumeAction::Change {
            via: via.to_owned(),
            change,
        });
    }
}

fn delete(intent: &VolumeIntent, observed: &VolumeObserved, actions: &mut Vec<VolumeAction>) {
    if !intent.finalizer || observed.in_use {
        return;
    }
    let attached: Vec<&NodeOnVolume> = observed
        .nodes
        .iter()
        .filter(|n| n.attached && n.stream == Stream::Up)
        .collect();
    for node in &attached {
        actions.push(VolumeAction::Detach {
            node: node.name.clone(),
        });
    }
    // An unreachable node does not delay the deletion: without guests nothing is written.
    if attached.is_empty() {
        actions.push(VolumeAction::RemoveFinalizer);
    }
}

fn reachable(observed: &VolumeObserved) -> Option<&str> {
    let mut nodes = observed.nodes.iter().filter(|node| {
        node.stream == Stream::Up && node.path == Some(PathState::Direct) && node.owner.is_some()
    });
    nodes
        .clone()
        .find(|node| node.coordinator)
        .or_else(|| nodes.next())
        .map(|node| node.name.as_str())
}

fn ready(intent: &VolumeIntent, observed: &VolumeObserved) -> Condition {
    let no = |reason, message: String| Condition::new(Some(false), reason, message);
    if intent.deleting && observed.in_use {
        let message = "VirtualMachines still live on it: delete them first".to_owned();
        return no(reason::IN_USE, message);
    }
    if intent.fencing.is_none() {
        return no(reason::FENCING_NOT_IMPLEMENTED, NOT_IMPLEMENTED.to_owned());
    }
    let direct = observed.nodes.iter().filter(|node| {
        node.stream == Stream::Up && node.path == Some(PathState::Direct) && node.owner.is_some()
    });
    let count = direct.count();
    if count > 0 {
        let message = format!(
            "{count} of {} nodes reach it directly",
            observed.nodes.len()
        );
        return Condition::new(Some(true), reason::ATTACHED, message);
    }
    if intent.volume.is_some() && observed.no_report_for.is_some() {
        let message = "no node has reported yet; guests may be running";
        return Condition::new(None, reason::UNKNOWN, message);
    }
    let mut node_errors: Vec<String> = observed
        .nodes
        .iter()
        .filter_map(|node| {
            node.reason
                .as_ref()
                .map(|why| format!("{}: {why}", node.name))
        })
        .collect();
    if let FormatState::Failed { message } = &observed.format {
        node_errors.insert(0, message.clone());
    }
    node_errors.truncate(NODE_ERRORS_MAX);
    let why = node_errors.join("; ");
    if intent.volume.is_none() && intent.initialize && observed.format == FormatState::NotAsked {
        return no(
            reason::FORMATTING,
            format!("being formatted. {why}").trim_end().to_owned(),
        );
    }
    if intent.volume.is_none() && observed.format == FormatState::NotBlank {
        let message =
            format!("the device holds something that is no volume of this cluster. {why}");
        return no(reason::NOT_BLANK, message.trim_end().to_owned());
    }
    if intent.volume.is_none() {
        let message = format!("no volume was found on the device, and it is not formatted. {why}");
        return no(reason::NOT_FORMATTED, message.trim_end().to_owned());
    }
    no(
        reason::NOT_ATTACHED,
        format!("no node reaches it. {why}").trim_end().to_owned(),
    )
}

fn fencing(intent: &VolumeIntent) -> Condition {
    match intent.fencing {
        None => Condition::new(
            Some(false),
            reason::FENCING_NOT_IMPLEMENTED,
            NOT_IMPLEMENTED,
        ),
        Some(FencingMode::Watchdog) => {
            let message = "a node that cannot hold its lease is reset by its watchdog";
            Condition::new(Some(true), reason::FENCING_IN_FORCE, message)
        }
        Some(FencingMode::LeaseOnly) => {
            let message = "a takeover needs a manual fencing confirmation";
            Condition::new(Some(true), reason::FENCING_MANUAL, message)
        }
    }
}

const NOT_IMPLEMENTED: &str =
    "fencing PersistentReservation does not exist yet: use Watchdog or LeaseOnly";
/// As for virtual machines: see `UNKNOWN_AFTER` of the plan's report.
const UNKNOWN_AFTER: Duration = Duration::from_secs(30);
/// Bounds the length of the condition's message.
const NODE_ERRORS_MAX: usize = 5;
