//! What to do next for one SharedVolume: see that it is formatted once, attached everywhere, and
//! that an administrator's fencing confirmation reaches it.

use std::time::Duration;

use bascule_crds::names::reason;
use bascule_ipc::volume::{FencingMode, PathState};
use bascule_types::{AdminConfirmation, Change, NodeUid, Owner, VolumeId};

use crate::{Condition, Stream};

#[cfg(test)]
mod tests;

/// A SharedVolume as its author wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeIntent {
    /// Its name.
    pub name: String,
    /// The fencing mode; none for one that does not exist yet and is refused.
    pub fencing: Option<FencingMode>,
    /// Whether a blank device may be formatted.
    pub initialize: bool,
    /// The identity that must be there: asked for, or found before.
    pub volume: Option<VolumeId>,
    /// The node that was chosen to format it.
    pub formatting_node: Option<String>,
    /// Whether the out-of-service taint counts.
    pub trust_taint: bool,
    /// The owners that an administrator has declared dead.
    pub confirmed: Vec<Owner>,
    /// Whether it is being deleted.
    pub deleting: bool,
    /// Whether our finalizer is on it.
    pub finalizer: bool,
}

/// What is known of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct VolumeObserved {
    /// The nodes that run our daemon, in the order of their names.
    pub nodes: Vec<NodeOnVolume>,
    /// What the formatting node said.
    pub format: FormatState,
    /// Whether VirtualMachines name it.
    pub in_use: bool,
    /// The owners that are on record as fenced.
    pub fenced: Vec<Owner>,
    /// For how long no node has reported; none while one does.
    pub no_report_for: Option<Duration>,
}

/// What became of formatting, as far as this operator remembers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum FormatState {
    /// Not asked.
    #[default]
    NotAsked,
    /// There is a volume, or something else: attaching will tell.
    NotBlank,
    /// It failed.
    Failed {
        /// Why.
        message: String,
    },
}

/// A node, as far as one volume is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeOnVolume {
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: Option<NodeUid>,
    /// The stream of its reports.
    pub stream: Stream,
    /// Whether it bears the out-of-service taint.
    pub out_of_service: bool,
    /// Whether the volume is attached there.
    pub attached: bool,
    /// The volume that it found.
    pub volume: Option<VolumeId>,
    /// Its path, when attached.
    pub path: Option<PathState>,
    /// Why the path is not direct, or why attaching failed.
    pub reason: Option<String>,
    /// Its slot and generation.
    pub owner: Option<Owner>,
    /// Whether it is the coordinator.
    pub coordinator: bool,
}

/// One thing to do for a volume. All are idempotent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum VolumeAction {
    /// Put our finalizer on the SharedVolume.
    AddFinalizer,
    /// Take it off.
    RemoveFinalizer,
    /// Write down, before anything else, which node is going to format it. Fails when another was
    /// written down in the meantime.
    ChooseFormatter {
        /// The node.
        node: String,
    },
    /// Format it.
    Format {
        /// The node.
        node: String,
    },
    /// Write down its identity.
    RecordVolume {
        /// The identity.
        volume: VolumeId,
    },
    /// Attach it.
    Attach {
        /// The node.
        node: String,
    },
    /// Detach it.
    Detach {
        /// The node.
        node: String,
    },
    /// Ask for a metadata change.
    Change {
        /// Through this node.
        via: String,
        /// The change.
        change: Change,
    },
}

/// What to do next, and what to say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumePlan {
    /// In this order; a failure does not keep the later ones from being tried.
    pub actions: Vec<VolumeAction>,
    /// The status to write.
    pub report: VolumeReport,
    /// When to look again even if nothing changes.
    pub requeue: Duration,
}

/// A SharedVolume's conditions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeReport {
    /// Nothing is known at present, and it has not been for long: what the status says stays as it
    /// is, and nothing below counts.
    pub keep: bool,
    /// The summary.
    pub ready: Condition,
    /// Whether the fencing that was asked for is in force.
    pub fencing: Condition,
}

/// What to do next for one SharedVolume.
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

/// The volume's identity is not known yet: format the device if it is blank, or learn what is there.
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
        // A chosen node that is away may have formatted it: no other node is chosen in its place, but
        // others may look.
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

/// The first node that answers, preferably one that had no trouble with the device yet.
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

/// A node that is attached and has no slot gets one. Any node that has joined can ask for it.
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

/// An administrator's fencing confirmation, from the annotation or the taint, goes to the coordinator once.
fn confirm(intent: &VolumeIntent, observed: &VolumeObserved, actions: &mut Vec<VolumeAction>) {
    let Some(via) = reachable(observed) else {
        return;
    };
    let by_taint = observed.nodes.iter().filter(|node| {
        // A node that still answers is not out of service, whatever its taint says.
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
    // A node that does not answer is no reason to wait: without guests nothing is written.
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
        let message = "no node has reported yet; guests may well be running";
        return Condition::new(None, reason::UNKNOWN, message);
    }
    let mut complaints: Vec<String> = observed
        .nodes
        .iter()
        .filter_map(|node| {
            node.reason
                .as_ref()
                .map(|why| format!("{}: {why}", node.name))
        })
        .collect();
    if let FormatState::Failed { message } = &observed.format {
        complaints.insert(0, message.clone());
    }
    complaints.truncate(COMPLAINTS_MAX);
    let why = complaints.join("; ");
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
            let message = "a takeover needs an administrator's fencing confirmation";
            Condition::new(Some(true), reason::FENCING_MANUAL, message)
        }
    }
}

const NOT_IMPLEMENTED: &str =
    "fencing PersistentReservation does not exist yet: use Watchdog or LeaseOnly";
/// As for virtual machines: see `UNKNOWN_AFTER` of the plan's report.
const UNKNOWN_AFTER: Duration = Duration::from_secs(30);
/// What fits a condition that people read.
const COMPLAINTS_MAX: usize = 5;
