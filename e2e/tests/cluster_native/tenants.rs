//! What namespaces and the authors of VMs bring along: quotas, labels, the addresses of other VMs.

use std::time::Duration;

use anyhow::ensure;
use bascule_e2e::kubernetes::NAMESPACE;

use super::CLUSTER;

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

/// A watch event and a reconciliation, with room for a busy machine.
const SAID_LIMIT: Duration = Duration::from_secs(60);
