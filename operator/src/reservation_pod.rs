//! Reservation pods: building them, and reading them back for the planner. A reservation pod holds a
//! VM's CPU and memory in the scheduler (KubeVirt: virt-launcher pod); the guest itself does not
//! run in it.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bascule_crds::VirtualMachine;
use bascule_crds::names::{LABEL_PURPOSE, LABEL_ROLE, LABEL_VM, ROLE_RESERVATION};
use bascule_node_api::command::VmSpec;
use bascule_operator_core::{self as core, ForeignPod, PodPhase, Purpose, ReservationRecord};
use k8s_openapi::api::core::v1::{
    Affinity, Capabilities, Container, NodeAffinity, NodeSelector, NodeSelectorRequirement,
    NodeSelectorTerm, Pod, PodSecurityContext, PodSpec, ResourceRequirements, SeccompProfile,
    SecurityContext, Toleration,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::ObjectMeta;
use kube::{Resource, ResourceExt};

use crate::cli::Args;
use crate::clock::moment;
use crate::copied_metadata::{ANNOTATION_COPIED, CopiedMetadata, except_itself};
use crate::vm_intent::grace;

/// What a reservation pod is built from.
#[derive(Debug)]
pub(crate) struct Reservation<'a> {
    pub(crate) vm: &'a VirtualMachine,
    pub(crate) name: &'a str,
    pub(crate) purpose: &'a Purpose,
    pub(crate) pin: Option<&'a str>,
    pub(crate) avoid: &'a [String],
    /// The spec of the running guest, or of the one to be started: CPU and memory requests follow it.
    pub(crate) spec: &'a VmSpec,
}

/// Builds the pod object.
pub(crate) fn build(reservation: &Reservation<'_>, args: &Args) -> Result<Pod> {
    let vm = reservation.vm;
    let owner = OwnerReference {
        // `kubectl drain` refuses pods without a controller unless forced.
        controller: Some(true),
        block_owner_deletion: Some(false),
        ..vm.owner_ref(&()).context("the VirtualMachine has no UID")?
    };
    let purpose = match reservation.purpose {
        Purpose::Current => CURRENT,
        Purpose::Migration(_) => MIGRATION,
    };
    let copied = CopiedMetadata::of(vm);
    let mut annotations = BTreeMap::from([(ANNOTATION_COPIED.to_owned(), copied.record()?)]);
    annotations.extend(copied.annotations);
    let mut labels = copied.labels;
    labels.extend([
        (LABEL_ROLE.to_owned(), ROLE_RESERVATION.to_owned()),
        (LABEL_VM.to_owned(), vm.name_any()),
        (LABEL_PURPOSE.to_owned(), purpose.to_owned()),
    ]);
    Ok(Pod {
        metadata: ObjectMeta {
            name: Some(reservation.name.to_owned()),
            namespace: vm.namespace(),
            labels: Some(labels),
            annotations: Some(annotations),
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: Some(pod_spec(reservation, args)?),
        status: None,
    })
}

fn pod_spec(reservation: &Reservation<'_>, args: &Args) -> Result<PodSpec> {
    let placement = &reservation.vm.spec.placement;
    let mut tolerations = placement.tolerations.clone();
    // An isolated node or a failed kubelet must not evict the VM: no `tolerationSeconds`.
    for taint in [
        "node.kubernetes.io/not-ready",
        "node.kubernetes.io/unreachable",
    ] {
        tolerations.push(toleration(taint, "NoExecute"));
    }
    if reservation.pin.is_some() {
        // The guest runs on that node already, so its reservation may be bound to a cordoned node.
        tolerations.push(toleration("node.kubernetes.io/unschedulable", "NoSchedule"));
    }
    Ok(PodSpec {
        affinity: Some(affinity(placement.affinity.clone(), reservation)),
        automount_service_account_token: Some(false),
        containers: vec![container(reservation, args)],
        enable_service_links: Some(false),
        node_selector: Some(placement.node_selector.clone()).filter(|s| !s.is_empty()),
        priority_class_name: Some(placement.priority_class_name.clone())
            .filter(|name| !name.is_empty()),
        restart_policy: Some("Always".to_owned()),
        security_context: Some(PodSecurityContext {
            run_as_non_root: Some(true),
            run_as_user: Some(NON_ROOT),
            run_as_group: Some(NON_ROOT),
            seccomp_profile: Some(SeccompProfile {
                type_: "RuntimeDefault".to_owned(),
                ..SeccompProfile::default()
            }),
            ..PodSecurityContext::default()
        }),
        termination_grace_period_seconds: i64::try_from(grace(reservation.vm)?.as_secs()).ok(),
        tolerations: Some(tolerations),
        topology_spread_constraints: Some(placement.topology_spread_constraints.clone())
            .filter(|constraints| !constraints.is_empty()),
        ..PodSpec::default()
    })
}

fn container(reservation: &Reservation<'_>, args: &Args) -> Container {
    let ratio = u64::from(args.allocation_ratio_milli.max(1));
    let cpu_milli = (u64::from(reservation.spec.cpus) * 1_000_000).div_ceil(ratio);
    let memory = reservation.spec.memory.0.saturating_add(OVERHEAD_BYTES);
    let resources = |cpu_milli: u64| {
        BTreeMap::from([
            ("cpu".to_owned(), Quantity(format!("{cpu_milli}m"))),
            ("memory".to_owned(), Quantity(memory.to_string())),
        ])
    };
    Container {
        name: "hold".to_owned(),
        image: Some(args.image.clone()),
        image_pull_policy: Some(args.image_pull_policy.clone()),
        command: Some(vec!["/usr/bin/bascule-hold".to_owned()]),
        resources: Some(ResourceRequirements {
            // A quota on limits refuses a pod without them, and a LimitRange gives such a pod its
            // own, which may be less than the request. The hold process comes near neither. One
            // thousandth of a CPU more than the request keeps the pod out of QoS class Guaranteed,
            // for which a kubelet with static CPU policy would set whole CPUs aside.
            limits: Some(resources(cpu_milli + 1)),
            requests: Some(resources(cpu_milli)),
            ..ResourceRequirements::default()
        }),
        security_context: Some(SecurityContext {
            allow_privilege_escalation: Some(false),
            capabilities: Some(Capabilities {
                drop: Some(vec!["ALL".to_owned()]),
                add: None,
            }),
            read_only_root_filesystem: Some(true),
            ..SecurityContext::default()
        }),
        termination_message_policy: Some("FallbackToLogsOnError".to_owned()),
        ..Container::default()
    }
}

/// The user's affinity, restricted to the pinned node or to nodes other than those to avoid. Selector
/// terms are ORed, so every term gets the requirement.
fn affinity(requested: Option<Affinity>, reservation: &Reservation<'_>) -> Affinity {
    let field = |operator: &str, node: &str| NodeSelectorRequirement {
        key: "metadata.name".to_owned(),
        operator: operator.to_owned(),
        values: Some(vec![node.to_owned()]),
    };
    let fields: Vec<NodeSelectorRequirement> = match reservation.pin {
        Some(pin) => vec![field("In", pin)],
        None => reservation
            .avoid
            .iter()
            .map(|node| field("NotIn", node))
            .collect(),
    };
    let mut affinity = except_itself(requested.unwrap_or_default());
    if fields.is_empty() {
        return affinity;
    }
    let node = affinity
        .node_affinity
        .get_or_insert_with(NodeAffinity::default);
    let required = node
        .required_during_scheduling_ignored_during_execution
        .get_or_insert_with(NodeSelector::default);
    if required.node_selector_terms.is_empty() {
        required
            .node_selector_terms
            .push(NodeSelectorTerm::default());
    }
    for term in &mut required.node_selector_terms {
        term.match_fields
            .get_or_insert_default()
            .extend(fields.iter().cloned());
    }
    affinity
}

fn toleration(key: &str, effect: &str) -> Toleration {
    Toleration {
        key: Some(key.to_owned()),
        operator: Some("Exists".to_owned()),
        effect: Some(effect.to_owned()),
        ..Toleration::default()
    }
}

/// Whether the pod has this VirtualMachine as an owner.
pub(crate) fn belongs_to(pod: &Pod, vm: &VirtualMachine) -> bool {
    pod.metadata.namespace == vm.metadata.namespace
        && pod
            .owner_references()
            .iter()
            .any(|owner| Some(&owner.uid) == vm.metadata.uid.as_ref())
}

/// The pod of this VirtualMachine as the planner sees it. Labels and annotations are only displayed: a
/// tenant may have written them. A pod's affinity cannot be changed.
pub(crate) fn view(
    pod: &Pod,
    record: &ReservationRecord,
    vm: &VirtualMachine,
    now: core::Moment,
) -> core::Pod {
    let status = pod.status.clone().unwrap_or_default();
    let condition = |type_: &str| {
        status
            .conditions
            .iter()
            .flatten()
            .find(|condition| condition.type_ == type_)
    };
    let disruption = condition("DisruptionTarget").filter(|c| c.status == "True");
    let phase = match status.phase.as_deref() {
        Some("Running") => PodPhase::Running,
        Some("Failed" | "Succeeded")
            if disruption.is_some() || status.reason.as_deref() == Some("Evicted") =>
        {
            PodPhase::Evicted
        }
        Some("Failed" | "Succeeded") => PodPhase::Failed,
        _ => PodPhase::Pending,
    };
    let deleted = pod.metadata.deletion_timestamp.as_ref().map(|at| {
        // `deletionTimestamp` is the end of the grace period; the budgets count from the request.
        let grace = pod.metadata.deletion_grace_period_seconds.unwrap_or(0);
        core::Moment(
            moment(&at.0)
                .0
                .saturating_sub(u64::try_from(grace).unwrap_or(0) * 1000),
        )
    });
    let evicted = (phase == PodPhase::Evicted).then(|| {
        let at = disruption.and_then(|c| c.last_transition_time.as_ref());
        at.map_or(now, |at| moment(&at.0))
    });
    let scheduled = condition("PodScheduled").filter(|c| c.status == "False");
    core::Pod {
        uid: pod.uid().unwrap_or_default(),
        name: pod.name_any(),
        purpose: record.purpose.clone(),
        phase,
        node: pod.spec.as_ref().and_then(|spec| spec.node_name.clone()),
        leaving_since: deleted.or(evicted),
        deleting: deleted.is_some(),
        unschedulable: scheduled
            .filter(|c| c.reason.as_deref() == Some("Unschedulable"))
            .map(|c| c.message.clone().unwrap_or_default()),
        avoid: avoided(pod),
        digest: record.digest,
        copies_current: CopiedMetadata::of(vm).is_on(pod),
    }
}

/// The pod as one that the operator has no record of.
pub(crate) fn foreign(pod: &Pod) -> ForeignPod {
    let created = pod.metadata.creation_timestamp.as_ref();
    ForeignPod {
        uid: pod.uid().unwrap_or_default(),
        name: pod.name_any(),
        created: created.map(|at| moment(&at.0)).unwrap_or_default(),
        deleting: pod.metadata.deletion_timestamp.is_some(),
    }
}

/// The nodes that the pod's affinity excludes by name.
fn avoided(pod: &Pod) -> Vec<String> {
    let affinity = pod.spec.as_ref().and_then(|spec| spec.affinity.as_ref());
    let required = affinity
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|node| {
            node.required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    // Every term has them: the first will do.
    let term = required.and_then(|required| required.node_selector_terms.first());
    let fields = term.and_then(|term| term.match_fields.as_ref());
    let excluding = fields
        .into_iter()
        .flatten()
        .filter(|f| f.operator == "NotIn");
    excluding
        .flat_map(|f| f.values.clone().unwrap_or_default())
        .collect()
}

/// Value of the purpose label: the guest runs on the pod's node, or will be started there.
pub(crate) const CURRENT: &str = "current";
/// Value of the purpose label: the target of a migration.
const MIGRATION: &str = "migration";
/// UID and GID "nonroot" of distroless images.
const NON_ROOT: i64 = 65532;
/// Memory request beyond guest RAM: bascule-vm (about 30 MiB expected), its share of bascule-volume,
/// and page tables.
const OVERHEAD_BYTES: u64 = 64 << 20;

#[cfg(test)]
mod tests {
    use bascule_operator_core::SpecDigest;
    use clap::Parser;

    use super::*;
    use crate::vm_intent::vm_spec;

    fn vm() -> VirtualMachine {
        serde_json::from_value(serde_json::json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {
                "name": "web", "namespace": "shop",
                "uid": "6fa459ea-ee8a-4ca4-894e-db77e160355e",
            },
            "spec": {
                "memory": "512Mi", "volume": "san", "cpu": {"cores": 2},
                "boot": {"kernel": {"hostFile": {"name": "k"}}},
                "placement": {
                    "tolerations": [{"key": "gpu", "operator": "Exists"}],
                    "affinity": {"nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
                            {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]},
                            {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]},
                        ]},
                    }},
                },
            },
        }))
        .unwrap()
    }

    fn pod(pin: Option<&str>, avoid: &[String], purpose: &Purpose) -> Pod {
        let vm = vm();
        let args = Args::parse_from(["o", "--pod-name", "o-0", "--image", "bascule:test"]);
        let reservation = Reservation {
            vm: &vm,
            name: "web-e1-0",
            purpose,
            pin,
            avoid,
            spec: &vm_spec(&vm).unwrap(),
        };
        build(&reservation, &args).unwrap()
    }

    fn record(purpose: Purpose) -> ReservationRecord {
        ReservationRecord {
            uid: String::new(),
            name: "web-e1-0".to_owned(),
            purpose,
            digest: SpecDigest([3; 32]),
            made: core::Moment(0),
        }
    }

    /// What a tenant writes on a reservation pod changes nothing.
    #[test]
    fn labels_and_annotations_of_a_pod_are_not_believed() {
        let mut pod = pod(None, &["a".to_owned()], &Purpose::Current);
        let before = view(&pod, &record(Purpose::Current), &vm(), core::Moment(5));
        let forged = [
            ("bascule.dev/purpose", "migration"),
            ("bascule.dev/migration", "go"),
            ("bascule.dev/avoid", "b"),
            ("bascule.dev/spec-digest", "00"),
            ("bascule.dev/spec", "{}"),
        ];
        for (key, value) in forged {
            pod.labels_mut().insert(key.to_owned(), value.to_owned());
            pod.annotations_mut()
                .insert(key.to_owned(), value.to_owned());
        }
        let after = view(&pod, &record(Purpose::Current), &vm(), core::Moment(5));
        assert_eq!(after, before);
    }

    #[test]
    fn a_reservation_is_controlled_by_its_vm_and_its_grace_period_covers_all_stages() {
        let pod = pod(None, &[], &Purpose::Current);
        assert!(belongs_to(&pod, &vm()));
        assert_eq!(
            pod.owner_references()[0].controller,
            Some(true),
            "kubectl drain refuses it otherwise"
        );
        let spec = pod.spec.unwrap();
        assert_eq!(
            spec.termination_grace_period_seconds,
            Some(300 + 180 + 120 + 60)
        );
    }

    #[test]
    fn it_requests_cores_divided_by_the_allocation_ratio_and_all_memory() {
        let pod = pod(None, &[], &Purpose::Current);
        let requests = pod.spec.unwrap().containers[0]
            .resources
            .clone()
            .unwrap()
            .requests
            .unwrap();
        assert_eq!(requests["cpu"].0, "500m");
        assert_eq!(
            requests["memory"].0,
            ((512_u64 << 20) + OVERHEAD_BYTES).to_string()
        );
    }

    /// Regression: in a namespace with a quota on limits.memory, no reservation could be made, and in
    /// one with a LimitRange the default limit was less than the request.
    #[test]
    fn its_limits_are_there_for_quotas_and_leave_it_burstable() {
        let pod = pod(None, &[], &Purpose::Current);
        let resources = pod.spec.unwrap().containers[0].resources.clone().unwrap();
        let (requests, limits) = (resources.requests.unwrap(), resources.limits.unwrap());
        assert_eq!(limits["memory"], requests["memory"]);
        assert_eq!(
            (requests["cpu"].0.as_str(), limits["cpu"].0.as_str()),
            ("500m", "501m")
        );
    }

    #[test]
    fn it_satisfies_the_restricted_pod_security_standard() {
        let spec = pod(None, &[], &Purpose::Current).spec.unwrap();
        let context = spec.security_context.unwrap();
        assert_eq!(context.run_as_non_root, Some(true));
        assert_eq!(context.seccomp_profile.unwrap().type_, "RuntimeDefault");
        let context = spec.containers[0].security_context.clone().unwrap();
        assert_eq!(context.allow_privilege_escalation, Some(false));
        assert_eq!(context.capabilities.unwrap().drop.unwrap(), ["ALL"]);
    }

    #[test]
    fn it_tolerates_unreachable_nodes_and_when_pinned_cordoned_ones() {
        let taints = |pod: Pod| -> Vec<String> {
            let tolerations = pod.spec.unwrap().tolerations.unwrap();
            assert!(tolerations.iter().all(|t| t.toleration_seconds.is_none()));
            tolerations.into_iter().filter_map(|t| t.key).collect()
        };
        let free = taints(pod(None, &[], &Purpose::Current));
        assert!(free.contains(&"node.kubernetes.io/unreachable".to_owned()));
        assert!(free.contains(&"gpu".to_owned()));
        assert!(!free.contains(&"node.kubernetes.io/unschedulable".to_owned()));
        let pinned = taints(pod(Some("n"), &[], &Purpose::Current));
        assert!(pinned.contains(&"node.kubernetes.io/unschedulable".to_owned()));
    }

    #[test]
    fn nodes_to_avoid_are_excluded_in_every_selector_term() {
        let pod = pod(None, &["a".to_owned(), "b".to_owned()], &Purpose::Current);
        let affinity = pod.spec.unwrap().affinity.unwrap().node_affinity.unwrap();
        let terms = affinity
            .required_during_scheduling_ignored_during_execution
            .unwrap()
            .node_selector_terms;
        assert_eq!(terms.len(), 2);
        for term in terms {
            assert_eq!(term.match_fields.unwrap().len(), 2);
            assert_eq!(term.match_expressions.unwrap().len(), 1);
        }
    }

    #[test]
    fn it_round_trips_through_the_pod_object() {
        let purpose = Purpose::Migration("go".to_owned());
        let pod = pod(None, &["a".to_owned()], &purpose);
        let view = view(&pod, &record(purpose.clone()), &vm(), core::Moment(5));
        assert!(view.copies_current);
        assert_eq!(view.avoid, ["a"]);
        assert_eq!((view.purpose, view.digest), (purpose, SpecDigest([3; 32])));
        assert_eq!((view.phase, view.leaving_since), (PodPhase::Pending, None));
    }

    #[test]
    fn a_node_pressure_eviction_is_distinguished_from_other_failures() {
        let mut pod = pod(None, &[], &Purpose::Current);
        let status = |value| serde_json::from_value(value).unwrap();
        pod.status = Some(status(
            serde_json::json!({"phase": "Failed", "reason": "Evicted"}),
        ));
        let seen = view(&pod, &record(Purpose::Current), &vm(), core::Moment(5));
        assert_eq!(
            (seen.phase, seen.leaving_since),
            (PodPhase::Evicted, Some(core::Moment(5)))
        );
        pod.status = Some(status(serde_json::json!({"phase": "Failed"})));
        let seen = view(&pod, &record(Purpose::Current), &vm(), core::Moment(5));
        assert_eq!((seen.phase, seen.leaving_since), (PodPhase::Failed, None));
    }
}
