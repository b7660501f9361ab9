//! The labels and annotations of a VirtualMachine that its reservation pods carry too, so that
//! Kubernetes' own selectors (anti-affinity, topology spread, disruption budgets) can name VMs.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use bascule_crds::VirtualMachine;
use bascule_crds::names::{GROUP, LABEL_VM};
use k8s_openapi::api::core::v1::{Affinity, Pod, PodAffinityTerm};
use kube::ResourceExt;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// What a VirtualMachine's reservation pods carry of its metadata.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CopiedMetadata {
    /// All labels but Bascule's own, which the operator reads on pods.
    pub(crate) labels: BTreeMap<String, String>,
    /// Only the allow-listed ones: an annotation on a pod may give it something that its author need
    /// not be allowed to have, such as a network or a profile of its container runtime.
    pub(crate) annotations: BTreeMap<String, String>,
}

impl CopiedMetadata {
    pub(crate) fn of(vm: &VirtualMachine) -> Self {
        let copy = |all: &BTreeMap<String, String>, wanted: fn(&str) -> bool| {
            let some = all.iter().filter(|(key, _)| wanted(key));
            some.map(|(key, value)| (key.clone(), value.clone()))
                .collect()
        };
        Self {
            labels: copy(vm.labels(), |key| !is_reserved(key)),
            annotations: copy(vm.annotations(), |key| {
                ANNOTATION_PREFIXES
                    .iter()
                    .any(|prefix| key.starts_with(prefix))
            }),
        }
    }

    /// The value of [`ANNOTATION_COPIED`].
    pub(crate) fn record(&self) -> Result<String> {
        serde_json::to_string(self).context("serialize the copied metadata")
    }

    /// Whether the pod was last given exactly these. What others have put on it since does not
    /// count: two writers must not overwrite each other endlessly.
    pub(crate) fn is_on(&self, pod: &Pod) -> bool {
        recorded(pod) == *self
    }
}

/// The merge patch that brings a reservation pod up to date. It removes only what was copied before,
/// and keys that others have put on the pod stay.
pub(crate) fn patch(vm: &VirtualMachine, pod: &Pod) -> Result<Value> {
    let (old, new) = (recorded(pod), CopiedMetadata::of(vm));
    let mut annotations = changes(&old.annotations, &new.annotations);
    annotations.insert(ANNOTATION_COPIED.to_owned(), json!(new.record()?));
    Ok(json!({"metadata": {
        "uid": pod.metadata.uid,
        "labels": changes(&old.labels, &new.labels),
        "annotations": annotations,
    }}))
}

/// Adds to every anti-affinity term of the VM that other pods of the same VM do not count: while it
/// moves it has two, and the one that it leaves must not keep the other from a whole zone.
pub(crate) fn except_itself(mut affinity: Affinity) -> Affinity {
    let Some(anti) = &mut affinity.pod_anti_affinity else {
        return affinity;
    };
    let required = anti
        .required_during_scheduling_ignored_during_execution
        .iter_mut()
        .flatten();
    let preferred = anti
        .preferred_during_scheduling_ignored_during_execution
        .iter_mut()
        .flatten();
    for term in required.chain(preferred.map(|weighted| &mut weighted.pod_affinity_term)) {
        if may_except(term) {
            term.mismatch_label_keys
                .get_or_insert_default()
                .push(LABEL_VM.to_owned());
        }
    }
    affinity
}

/// The label holds a name, which is unique in the VM's own namespace only; and the API server refuses
/// `mismatchLabelKeys` without a selector, and keys that the term has already.
fn may_except(term: &PodAffinityTerm) -> bool {
    let Some(selector) = &term.label_selector else {
        return false;
    };
    let expressions = selector.match_expressions.iter().flatten();
    let selected = expressions.map(|expression| &expression.key);
    let keys = [&term.match_label_keys, &term.mismatch_label_keys];
    let mut named = selected
        .chain(selector.match_labels.iter().flatten().map(|(key, _)| key))
        .chain(keys.into_iter().flatten().flatten());
    let elsewhere = term.namespaces.as_ref().is_some_and(|n| !n.is_empty())
        || term.namespace_selector.is_some();
    !elsewhere && named.all(|key| key != LABEL_VM)
}

fn recorded(pod: &Pod) -> CopiedMetadata {
    let text = pod.annotations().get(ANNOTATION_COPIED);
    text.and_then(|text| serde_json::from_str(text).ok())
        .unwrap_or_default()
}

/// Values to set, and null for keys to remove. Never a key of Bascule's, whatever the record says: a
/// tenant may have written it.
fn changes(
    old: &BTreeMap<String, String>,
    new: &BTreeMap<String, String>,
) -> BTreeMap<String, Value> {
    let gone = old.keys().filter(|key| !new.contains_key(*key));
    gone.map(|key| (key.clone(), Value::Null))
        .chain(new.iter().map(|(key, value)| (key.clone(), json!(value))))
        .filter(|(key, _)| !is_reserved(key))
        .collect()
}

/// Whether the key is in Bascule's domain, or in one below it.
fn is_reserved(key: &str) -> bool {
    let domain = key.split_once('/').map_or("", |(domain, _)| domain);
    domain == GROUP
        || domain
            .strip_suffix(GROUP)
            .is_some_and(|rest| rest.ends_with('.'))
}

/// Annotation on a reservation pod: what was copied to it, as JSON.
pub(crate) const ANNOTATION_COPIED: &str = "bascule.dev/copied";
/// Annotations that say whether a pod may be moved for the sake of a node: by the cluster autoscaler,
/// Karpenter and the descheduler.
const ANNOTATION_PREFIXES: [&str; 3] = [
    "cluster-autoscaler.kubernetes.io/",
    "karpenter.sh/",
    "descheduler.alpha.kubernetes.io/",
];

#[cfg(test)]
mod tests {
    use super::*;

    fn vm(labels: Value, annotations: Value) -> VirtualMachine {
        let mut vm: VirtualMachine = serde_json::from_value(json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
            },
        }))
        .unwrap();
        vm.metadata.labels = serde_json::from_value(labels).unwrap();
        vm.metadata.annotations = serde_json::from_value(annotations).unwrap();
        vm
    }

    fn pod_of(vm: &VirtualMachine) -> Pod {
        let copied = CopiedMetadata::of(vm);
        let mut annotations = copied.annotations.clone();
        annotations.insert(ANNOTATION_COPIED.to_owned(), copied.record().unwrap());
        let mut pod = Pod::default();
        pod.metadata.labels = Some(copied.labels);
        pod.metadata.annotations = Some(annotations);
        pod
    }

    #[test]
    fn all_labels_but_bascules_and_only_allowed_annotations_are_copied() {
        let vm = vm(
            json!({
                "app": "db", "app.kubernetes.io/name": "db", "notbascule.dev/x": "1",
                "bascule.dev/role": "reservation", "bascule.dev/purpose": "migration",
                "bascule.dev/virtual-machine": "other", "sub.bascule.dev/x": "1",
            }),
            json!({
                "cluster-autoscaler.kubernetes.io/safe-to-evict": "false",
                "k8s.v1.cni.cncf.io/networks": "secret", "bascule.dev/spec": "{}",
                "kubectl.kubernetes.io/last-applied-configuration": "{}",
            }),
        );
        let copied = CopiedMetadata::of(&vm);
        let labels: Vec<&str> = copied.labels.keys().map(String::as_str).collect();
        assert_eq!(
            labels,
            ["app", "app.kubernetes.io/name", "notbascule.dev/x"]
        );
        let annotations: Vec<&str> = copied.annotations.keys().map(String::as_str).collect();
        assert_eq!(
            annotations,
            ["cluster-autoscaler.kubernetes.io/safe-to-evict"]
        );
    }

    #[test]
    fn a_changed_label_is_set_a_removed_one_goes_and_those_of_others_stay() {
        let before = vm(json!({"app": "db", "tier": "one"}), json!({}));
        let after = vm(
            json!({"app": "web"}),
            json!({"karpenter.sh/do-not-disrupt": "true"}),
        );
        let mut pod = pod_of(&before);
        pod.labels_mut()
            .insert("topology.kubernetes.io/zone".to_owned(), "a".to_owned());
        assert!(CopiedMetadata::of(&before).is_on(&pod));
        assert!(!CopiedMetadata::of(&after).is_on(&pod));
        let patch = patch(&after, &pod).unwrap();
        assert_eq!(
            patch["metadata"]["labels"],
            json!({"app": "web", "tier": null})
        );
        let annotations = &patch["metadata"]["annotations"];
        assert_eq!(annotations["karpenter.sh/do-not-disrupt"], "true");
        let record = annotations[ANNOTATION_COPIED].as_str().unwrap();
        assert_eq!(record, CopiedMetadata::of(&after).record().unwrap());
    }

    #[test]
    fn a_forged_record_removes_no_label_that_the_operator_reads() {
        let vm = vm(json!({}), json!({}));
        let mut pod = pod_of(&vm);
        let forged =
            json!({"labels": {"bascule.dev/role": "x"}, "annotations": {"bascule.dev/spec": "x"}});
        pod.annotations_mut()
            .insert(ANNOTATION_COPIED.to_owned(), forged.to_string());
        let patch = patch(&vm, &pod).unwrap();
        assert_eq!(patch["metadata"]["labels"], json!({}));
        assert!(
            patch["metadata"]["annotations"]
                .get("bascule.dev/spec")
                .is_none()
        );
    }

    #[test]
    fn a_vm_is_not_kept_away_by_the_reservation_that_it_leaves() {
        let term = |more: Value| {
            let mut term = json!({
                "topologyKey": "topology.kubernetes.io/zone",
                "labelSelector": {"matchLabels": {"app": "db"}},
            });
            for (key, value) in more.as_object().unwrap() {
                term[key] = value.clone();
            }
            term
        };
        let keys = |term: Value| {
            let affinity: Affinity = serde_json::from_value(json!({"podAntiAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": [term],
                "preferredDuringSchedulingIgnoredDuringExecution":
                    [{"weight": 1, "podAffinityTerm": term}],
            }}))
            .unwrap();
            let anti = except_itself(affinity).pod_anti_affinity.unwrap();
            let required = anti.required_during_scheduling_ignored_during_execution;
            let preferred = anti.preferred_during_scheduling_ignored_during_execution;
            let required = required.unwrap()[0].mismatch_label_keys.clone();
            let preferred = &preferred.unwrap()[0].pod_affinity_term;
            assert_eq!(required, preferred.mismatch_label_keys);
            required
        };
        assert_eq!(keys(term(json!({}))), Some(vec![LABEL_VM.to_owned()]));
        for other in [
            json!({"namespaces": ["other"]}),
            json!({"namespaceSelector": {}}),
            json!({"labelSelector": null}),
            json!({"labelSelector": {"matchLabels": {(LABEL_VM): "db"}}}),
            json!({"labelSelector": {"matchExpressions": [{"key": LABEL_VM, "operator": "Exists"}]}}),
        ] {
            assert_eq!(keys(term(other.clone())), None, "{other}");
        }
        let named = keys(term(json!({"matchLabelKeys": [LABEL_VM]})));
        assert_eq!(named, None);
    }
}
