//! The status of a SharedVolume.

use std::collections::BTreeMap;

use anyhow::Result;
use bascule_crds::names::condition;
use bascule_crds::{
    KeptDisk, NodeAccess, NodeAccessState, Quantity, SharedVolume, SharedVolumeStatus,
    UnclaimedVirtualMachine, set_condition,
};
use bascule_ipc::volume::{PathState, Rows, WatchdogKind};
use bascule_operator_core::{NodeOnVolume, Stream, VolumeObserved, VolumePlan};
use bascule_types::Owner;
use jiff::Timestamp;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::{Api, ResourceExt};

use crate::context::OperatorContext;
use crate::kube_api::{api_owner, apply_status, condition_status, ignore_not_found, new_condition};
use crate::node_clients::NodeState;
use crate::ownership_cache::volume_status;

/// The inputs of the status.
pub(super) struct Reported<'a> {
    pub(super) plan: &'a VolumePlan,
    pub(super) observed: &'a VolumeObserved,
    pub(super) states: &'a BTreeMap<String, NodeState>,
    pub(super) rows: Option<&'a Rows>,
}

/// Writes the status if it differs from the present one.
pub(super) async fn report(
    context: &OperatorContext,
    volume: &SharedVolume,
    reported: &Reported<'_>,
) -> Result<()> {
    if reported.plan.report.keep {
        return Ok(());
    }
    // Read again: this reconciliation may have written `volumeId` or `formattingNode`.
    let api: Api<SharedVolume> = Api::all(context.client.clone());
    let name = volume.name_any();
    let current = context.stores.volumes.find(|sv| sv.name_any() == name);
    let old = current.and_then(|sv| sv.status.clone()).unwrap_or_default();
    let vms = context.stores.vms.state();
    let claimed = |uid: &str| vms.iter().any(|vm| vm.uid().as_deref() == Some(uid));
    let mut status = status_of(volume, &old, reported, claimed, crate::clock::timestamp());
    if status == old {
        return Ok(());
    }
    // Applied by `patch_status` only.
    status.volume_id = None;
    status.formatting_node = None;
    ignore_not_found(apply_status(&api, &name, &status).await)
}

fn status_of(
    volume: &SharedVolume,
    old: &SharedVolumeStatus,
    reported: &Reported<'_>,
    claimed: impl Fn(&str) -> bool,
    now: Timestamp,
) -> SharedVolumeStatus {
    let name = volume.name_any();
    let mut conditions = old.conditions.clone();
    for (type_, new) in [
        (condition::READY, &reported.plan.report.ready),
        (condition::FENCING_AVAILABLE, &reported.plan.report.fencing),
    ] {
        let state = condition_status(new.status);
        let mut new = new_condition(type_, state, new.reason, &new.message, now);
        new.observed_generation = volume.metadata.generation;
        set_condition(&mut conditions, new);
    }
    let any = reported.states.values().find_map(|state| {
        let up = state.stream == Stream::Up;
        volume_status(state, &name).filter(|_| up)
    });
    let nodes: Vec<NodeAccess> = reported
        .observed
        .nodes
        .iter()
        .map(|node| node_access(node, reported.states.get(&node.name), &name, old, now))
        .collect();
    let direct = nodes
        .iter()
        .filter(|node| node.state == NodeAccessState::Direct)
        .count();
    let coordinator = reported.observed.nodes.iter().find(|node| node.coordinator);
    SharedVolumeStatus {
        observed_generation: volume.metadata.generation,
        volume_id: old.volume_id.clone(),
        formatting_node: old.formatting_node.clone(),
        coordinator: coordinator.map(|node| node.name.clone()),
        capacity: any
            .map(|s| Quantity::from_bytes(s.capacity.0))
            .or_else(|| old.capacity.clone()),
        free: any
            .map(|s| Quantity::from_bytes(s.capacity.0.saturating_sub(s.allocated.0)))
            .or_else(|| old.free.clone()),
        direct_nodes: i32::try_from(direct).ok(),
        nodes,
        kept_disks: reported
            .rows
            .map_or_else(|| old.kept_disks.clone(), kept_disks),
        unclaimed_virtual_machines: reported.rows.map_or_else(
            || old.unclaimed_virtual_machines.clone(),
            |rows| unclaimed(rows, reported, claimed),
        ),
        conditions,
    }
}

fn node_access(
    node: &NodeOnVolume,
    state: Option<&NodeState>,
    volume: &str,
    old: &SharedVolumeStatus,
    now: Timestamp,
) -> NodeAccess {
    let earlier = old.nodes.iter().find(|n| n.name == node.name);
    if let (Stream::Unknown, Some(earlier)) = (node.stream, earlier) {
        // This operator has not connected to the node yet.
        return earlier.clone();
    }
    let up = node.stream == Stream::Up;
    let access = match node.path {
        Some(PathState::Direct) if up && node.owner.is_some() => NodeAccessState::Direct,
        Some(PathState::Paused) if up => NodeAccessState::Paused,
        _ => NodeAccessState::Unavailable,
    };
    let reason = match access {
        NodeAccessState::Direct => String::new(),
        _ if !up => match state.and_then(|state| state.error.as_deref()) {
            Some(why) => format!("bascule-node is unreachable: {why}"),
            None => "bascule-node is unreachable".to_owned(),
        },
        _ => node
            .reason
            .clone()
            .unwrap_or_else(|| "not attached".to_owned()),
    };
    let before = earlier.filter(|n| n.state == access);
    let watchdog = state
        .and_then(|state| volume_status(state, volume))
        .map(|status| status.watchdog);
    NodeAccess {
        name: node.name.clone(),
        state: access,
        reason,
        holder: node
            .owner
            .map(api_owner)
            .or_else(|| earlier.filter(|_| !up)?.holder.clone()),
        watchdog: watchdog == Some(WatchdogKind::Hardware),
        kvm_error: state
            .and_then(|state| state.report.as_ref())
            .and_then(|report| report.kvm_error.clone())
            .unwrap_or_default(),
        since: before.and_then(|n| n.since.clone()).or(Some(Time(now))),
    }
}

fn kept_disks(rows: &Rows) -> Vec<KeptDisk> {
    let mut kept: Vec<KeptDisk> = rows
        .disks
        .iter()
        .filter(|disk| disk.vm.is_none())
        .filter_map(|disk| {
            let (namespace, name) = disk.name.as_str().split_once('/')?;
            Some(KeptDisk {
                namespace: namespace.to_owned(),
                name: name.to_owned(),
                size: Quantity::from_bytes(disk.size.0),
            })
        })
        .collect();
    kept.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
    kept.truncate(LISTED_MAX);
    kept
}

fn unclaimed(
    rows: &Rows,
    reported: &Reported<'_>,
    claimed: impl Fn(&str) -> bool,
) -> Vec<UnclaimedVirtualMachine> {
    let node = |owner: Option<Owner>| {
        let holder = reported
            .observed
            .nodes
            .iter()
            .find(|n| owner.is_some() && n.owner == owner)?;
        Some(holder.name.clone())
    };
    let mut unclaimed: Vec<UnclaimedVirtualMachine> = rows
        .vms
        .iter()
        .filter(|row| !claimed(&row.vm.to_string()))
        .map(|row| UnclaimedVirtualMachine {
            uid: row.vm.to_string(),
            name: row.name.to_string(),
            node: node(row.owner),
        })
        .collect();
    unclaimed.truncate(LISTED_MAX);
    unclaimed
}

/// Maximum length of these lists in the CRD's schema.
const LISTED_MAX: usize = 200;

#[cfg(test)]
mod tests {
    use bascule_types::{Bytes, DiskId, DiskRole, DiskRow, RowName, VmUid};

    use super::*;

    #[test]
    fn kept_disks_are_those_without_a_virtual_machine() {
        let disk = |name: &str, vm| DiskRow {
            disk: DiskId::random(),
            name: RowName::new(name).unwrap(),
            vm,
            size: Bytes::gib(1),
            role: DiskRole::Data,
            importing: false,
            importer: None,
            extents: vec![],
        };
        let rows = Rows {
            disks: vec![
                disk("shop/b.root", None),
                disk("shop/a.root", Some(VmUid::random())),
            ],
            ..Rows::default()
        };
        let kept = kept_disks(&rows);
        assert_eq!(kept.len(), 1);
        assert_eq!(
            (kept[0].namespace.as_str(), kept[0].name.as_str()),
            ("shop", "b.root")
        );
    }
}
