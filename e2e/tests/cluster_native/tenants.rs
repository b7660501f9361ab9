//! What namespaces and the authors of VMs bring along: quotas, labels, the addresses of other VMs.

use std::time::Duration;

use anyhow::ensure;
use bascule_e2e::kubernetes::{Installation, NAMESPACE};

use super::CLUSTER;
use super::bad_input::await_ready_says;

#[test]
fn a_quota_without_room_is_quoted_in_the_condition() {
    CLUSTER.with(
        "a_quota_without_room_is_quoted_in_the_condition",
        |cluster| {
            let lab = cluster.lab();
            lab.apply(
                "apiVersion: v1\nkind: Namespace\nmetadata: {name: tight}\n---\n\
                 apiVersion: v1\nkind: ResourceQuota\nmetadata: {name: memory, namespace: tight}\n\
                 spec: {hard: {limits.memory: 100Mi}}\n",
            )
            .unwrap();
            let document = cluster.document("cramped", 71);
            let here = format!("namespace: {NAMESPACE}");
            assert!(document.contains(&here), "{document}");
            lab.apply(&document.replacen(&here, "namespace: tight", 1))
                .unwrap();
            lab.wait_for("the quota to be quoted", SAID_LIMIT, || {
                let told = lab.get(&["vm", "cramped", "-n", "tight"])?["status"].to_string();
                let quoted = told.contains("QuotaExceeded") && told.contains("limits.memory");
                ensure!(quoted && told.contains("exceeded quota: memory"), "{told}");
                Ok(())
            })
            .unwrap();
            lab.kubectl(&["delete", "namespace", "tight", "--timeout=60s"])
                .unwrap();
        },
    );
}

#[test]
fn a_reservation_has_its_vms_labels_and_two_vms_with_one_mac_are_told() {
    CLUSTER.with_vm("labelled", 72, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let labelled = ["vm", "labelled", "-n", NAMESPACE];
        let pods_of = |selector: &str| {
            lab.kubectl(&["get", "pods", "-n", NAMESPACE, "-o", "name", "-l", selector])
        };
        for (label, selector) in [
            ("app=db", "app=db"),
            ("app=web", "app=web"),
            ("app-", "!app"),
        ] {
            lab.kubectl(&[&["label", "--overwrite"], &labelled[..], &[label]].concat())
                .unwrap();
            let selector = format!("bascule.dev/virtual-machine=labelled,{selector}");
            lab.wait_for(&selector, SAID_LIMIT, || {
                ensure!(!pods_of(&selector)?.trim().is_empty(), "no such pod");
                Ok(())
            })
            .unwrap();
        }

        let mac = lab.get(&labelled).unwrap()["status"]["interfaces"][0]["mac"].clone();
        let with_mac = format!("bridge: lan, mac: {mac}");
        let twin = (cluster.document("twin", 73))
            .replacen("bridge: lan", &with_mac, 1)
            .replacen("spec:\n", "spec:\n  runPolicy: Stopped\n", 1);
        lab.apply(&twin).unwrap();
        let conflicts = |name: &str| -> anyhow::Result<bool> {
            let object = lab.get(&["vm", name, "-n", NAMESPACE])?;
            let conditions = object["status"]["conditions"].as_array();
            let mut conditions = conditions.into_iter().flatten();
            Ok(conditions.any(|condition| condition["type"] == "MacConflict"))
        };
        for name in ["labelled", "twin"] {
            lab.wait_for("both to be told", SAID_LIMIT, || {
                ensure!(conflicts(name)?, "{name} is not told");
                let about = format!("involvedObject.name={name},reason=DuplicateMac");
                let events = ["get", "events", "-n", NAMESPACE, "-o", "name"];
                let events = lab.kubectl(&[&events[..], &["--field-selector", &about]].concat())?;
                ensure!(!events.trim().is_empty(), "no event about {name}");
                Ok(())
            })
            .unwrap();
        }
        lab.kubectl(&["delete", "vm", "twin", "-n", NAMESPACE, "--timeout=60s"])
            .unwrap();
        lab.wait_for("the condition to go", SAID_LIMIT, || {
            ensure!(!conflicts("labelled")?, "it is still there");
            Ok(())
        })
        .unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
    });
}

#[test]
fn limits_quota_and_anti_affinity_of_a_namespace_are_obeyed_and_named() {
    let name = "limits_quota_and_anti_affinity_of_a_namespace_are_obeyed_and_named";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        let _limits = Limits::set(cluster);
        // The LimitRange's defaults are less than a virtual machine needs; the reservation has its own.
        lab.apply(&anti_affine(cluster, "db-a", 74)).unwrap();
        let vm = cluster.handle("db-a", 74);
        vm.wait_ready(READY_LIMIT).unwrap();
        let mut talk = vm.talk().unwrap();
        let large = cluster.document("large", 75);
        lab.apply(&large.replacen("memory: 128Mi", "memory: 256Mi", 1))
            .unwrap();
        let large = ["vm", "large", "-n", NAMESPACE];
        let words = "maximum memory usage per Container is 250Mi";
        await_ready_says(cluster, &large, "QuotaExceeded", words);
        lab.kubectl(&["delete", "vm", "large", "-n", NAMESPACE, "--timeout=60s"])
            .unwrap();

        let home = vm.node().unwrap();
        let impatient = ["drain", &home, "--ignore-daemonsets", "--timeout=1s"];
        lab.kubectl(&[&impatient[..], &["--delete-emptydir-data"]].concat())
            .expect_err("there is no room for a second reservation");
        lab.wait_for("the migration to name the quota", SAID_LIMIT, || {
            let moves = vm.moves()?;
            let [only] = &moves[..] else {
                anyhow::bail!("not one migration: {moves:?}")
            };
            let why = only.why.as_deref().unwrap_or_default();
            let named =
                why.contains("QuotaExceeded") && why.contains("exceeded quota: room-for-one");
            ensure!(named, "{why}");
            Ok(())
        })
        .unwrap();
        talk.ping().unwrap();
        lab.apply(&quota("800Mi")).unwrap();
        cluster.drain(&home).unwrap();
        let now = vm.wait_elsewhere(&home, READY_LIMIT).unwrap();
        cluster.uncordon(&home).unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        let moves = vm.moves().unwrap();
        let ended = [(moves[0].mode.as_str(), moves[0].phase.as_str(), moves.len())];
        assert_eq!(ended, [("Live", "Succeeded", 1)], "{moves:?}");

        lab.apply(&anti_affine(cluster, "db-b", 75)).unwrap();
        let second = cluster.handle("db-b", 75);
        second.wait_ready(READY_LIMIT).unwrap();
        assert_ne!(second.node().unwrap(), now, "they share a node");
        lab.apply(&anti_affine(cluster, "db-c", 76)).unwrap();
        let third = ["vm", "db-c", "-n", NAMESPACE];
        await_ready_says(cluster, &third, "Unschedulable", "anti-affinity");
        let all = ["vm", "db-a", "db-b", "db-c", "-n", NAMESPACE];
        let delete = [&["delete", "--timeout=90s"], &all[..]].concat();
        let run = lab.kubectl_run().unwrap().args(delete);
        run.deadline(READY_LIMIT).done().unwrap();
    });
}

/// A virtual machine that shares no node with others of its kind.
fn anti_affine(cluster: &Installation, name: &str, number: u8) -> String {
    let placement = "spec:\n  placement:\n    affinity:\n      podAntiAffinity:\n        \
                     requiredDuringSchedulingIgnoredDuringExecution:\n        - labelSelector: \
                     {matchLabels: {app: db}}\n          topologyKey: kubernetes.io/hostname\n";
    let document = cluster.document(name, number);
    document
        .replacen("metadata: {", "metadata: {labels: {app: db}, ", 1)
        .replacen("spec:\n", placement, 1)
}

/// Room for this much memory; a reservation of these scenarios has 192Mi.
fn quota(memory: &str) -> String {
    format!(
        "apiVersion: v1\nkind: ResourceQuota\nmetadata: {{name: room-for-one, namespace: {NAMESPACE}}}\n\
         spec: {{hard: {{limits.memory: {memory}}}}}\n"
    )
}

/// A quota with room for one reservation and a LimitRange. Both are deleted when this is dropped, because
/// other scenarios use the namespace too.
struct Limits<'a>(&'a Installation);

impl<'a> Limits<'a> {
    fn set(cluster: &'a Installation) -> Self {
        let limits = Self(cluster);
        let range = format!(
            "apiVersion: v1\nkind: LimitRange\nmetadata: {{name: small, namespace: {NAMESPACE}}}\n\
             spec: {{limits: [{{type: Container, max: {{memory: 250Mi}}, \
             default: {{memory: 64Mi, cpu: 10m}}, defaultRequest: {{memory: 32Mi, cpu: 5m}}}}]}}\n"
        );
        let documents = format!("{}---\n{range}", quota("300Mi"));
        cluster.lab().apply(&documents).unwrap();
        limits
    }
}

impl Drop for Limits<'_> {
    fn drop(&mut self) {
        let both = ["resourcequota/room-for-one", "limitrange/small"];
        let delete = ["delete", "-n", NAMESPACE, "--ignore-not-found"];
        let delete = [&delete[..], &both].concat();
        if let Err(error) = self.0.lab().kubectl(&delete) {
            eprintln!("{error:#}");
        }
    }
}

/// A watch event and a reconciliation, with room for a busy machine.
const SAID_LIMIT: Duration = Duration::from_secs(60);
/// As a drain's, or the start of a virtual machine.
const READY_LIMIT: Duration = Duration::from_secs(120);
