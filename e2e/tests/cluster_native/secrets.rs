//! User data that a guest takes from a Secret: who lets the operator read it, when it is read, and where its
//! text is.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, NAMESPACE, SYSTEM_NAMESPACE};
use bascule_lab::Lab;
use serde_json::Value;

use super::CLUSTER;
use super::bad_input::await_ready_says;

#[test]
fn user_data_comes_from_a_secret_and_is_shown_nowhere() {
    let name = "user_data_comes_from_a_secret_and_is_shown_nowhere";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        let _granted = Granted(cluster);
        let from = "spec:\n  cloudInit: {userDataFrom: {secretKeyRef: {name: seed, key: user}}}\n";
        let document = cluster.document("seeded", 85);
        lab.apply(&document.replacen("spec:\n", from, 1)).unwrap();
        let vm = cluster.handle("seeded", 85);
        let says = |words: &str| {
            let object = ["vm", "seeded", "-n", NAMESPACE];
            await_ready_says(cluster, &object, "SecretUnavailable", words);
        };
        says("spec.cloudInit.userDataFrom: the operator may not read Secret \"seed\"");
        lab.apply(&grant()).unwrap();
        says("spec.cloudInit.userDataFrom: Secret \"seed\" does not exist");
        put(lab, "other", FIRST);
        says("Secret \"seed\" has no key \"user\"");
        put(lab, "user", "password: hunter2");
        says("key \"user\" of Secret \"seed\": userData must begin with");
        put(lab, "user", FIRST);
        vm.wait_ready(READY_LIMIT).unwrap();
        let mut talk = vm.talk().unwrap();
        assert_eq!(given(lab, &vm).unwrap(), FIRST);

        // A guest that moves has its disk in use.
        put(lab, "user", SECOND);
        for mode in ["Live", "Quick"] {
            vm.migrate(mode, None).unwrap();
            talk.ping().unwrap();
            assert_eq!(given(lab, &vm).unwrap(), FIRST, "{mode}");
        }
        talk.check().unwrap();
        let names = ["userDataFrom", "seed", "seeded"];
        assert_shown_nowhere(lab, &vm, names, &[MARK, "hunter2"]);

        run(lab, "Stopped");
        lab.wait_for("the guest to stop", READY_LIMIT, || {
            let phase = vm.object()?["status"]["phase"].clone();
            ensure!(phase == "Stopped", "it is {phase}");
            Ok(())
        })
        .unwrap();
        run(lab, "Always");
        lab.wait_for("the guest to have the changed text", READY_LIMIT, || {
            let text = given(lab, &vm)?;
            ensure!(text == SECOND, "it has {text:?}");
            Ok(())
        })
        .unwrap();
        vm.talk().unwrap().ping().unwrap();
        vm.delete().unwrap();
    });
}

/// The user data in the configuration of the VM's process, which makes the guest's disk of it.
fn given(lab: &Lab, vm: &ClusterVm<'_>) -> Result<String> {
    let uid = vm.object()?["metadata"]["uid"].clone();
    let uid = uid.as_str().context("no UID")?;
    let file = format!("/run/bascule/vms/{uid}/config.json");
    let node = lab.node(&vm.node()?)?;
    let config: Value = serde_json::from_str(&node.exec(&["cat", &file])?)?;
    let text = config["cloud_init"]["user_data"].as_str();
    text.map(str::to_owned).context("no user data")
}

/// None of `marks` is in what the API shows, nor in what the operator, the node daemons and the VM's process log. These
/// have the `names`, one each of API, operator and node daemons.
pub(super) fn assert_shown_nowhere(
    lab: &Lab,
    vm: &ClusterVm<'_>,
    names: [&str; 3],
    marks: &[&str],
) {
    let kinds = "vm,vmmig,pods,events,configmaps,leases,sharedvolumes";
    let all = ["get", kinds, "--all-namespaces", "-o", "json"];
    let mut shown = vec![lab.kubectl(&all).unwrap()];
    for component in ["operator", "node"] {
        let label = format!("-lapp.kubernetes.io/component={component}");
        let logs = ["logs", "-n", SYSTEM_NAMESPACE, &label, "--tail=-1"];
        shown.push(lab.kubectl(&logs).unwrap());
    }
    // The names are there.
    for (text, name) in shown.iter().zip(names) {
        assert!(text.contains(name), "no {name} in {text}");
    }
    let uid = vm.object().unwrap()["metadata"]["uid"].clone();
    let log = format!("/run/bascule/vms/{}/vm.log", uid.as_str().unwrap());
    let node = lab.node(&vm.node().unwrap()).unwrap();
    shown.push(node.exec(&["cat", &log]).unwrap());
    for text in shown {
        for mark in marks {
            assert!(!text.contains(mark), "the Secret's {mark} is in {text}");
        }
    }
}

pub(super) fn put(lab: &Lab, key: &str, text: &str) {
    lab.apply(&format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: seed, namespace: {NAMESPACE}}}\n\
         stringData: {{{key}: \"{text}\"}}\n"
    ))
    .unwrap();
}

fn run(lab: &Lab, policy: &str) {
    let patch = format!("{{\"spec\": {{\"runPolicy\": \"{policy}\"}}}}");
    let args = [
        "patch",
        "vm",
        "seeded",
        "-n",
        NAMESPACE,
        "--type=merge",
        "-p",
        &patch,
    ];
    lab.kubectl(&args).unwrap();
}

/// As docs/cloud-init.md shows it.
pub(super) fn grant() -> String {
    format!(
        "apiVersion: rbac.authorization.k8s.io/v1\nkind: Role\nmetadata: {{name: guest-secrets, namespace: {NAMESPACE}}}\n\
         rules:\n- {{apiGroups: [\"\"], resources: [secrets], resourceNames: [seed], verbs: [get]}}\n---\n\
         apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {{name: guest-secrets, namespace: {NAMESPACE}}}\n\
         roleRef: {{apiGroup: rbac.authorization.k8s.io, kind: Role, name: guest-secrets}}\n\
         subjects:\n- {{kind: ServiceAccount, name: bascule-operator, namespace: {SYSTEM_NAMESPACE}}}\n"
    )
}

/// Takes the right back, and the Secret, also where the scenario fails.
pub(super) struct Granted<'a>(pub(super) &'a Installation);

impl Drop for Granted<'_> {
    fn drop(&mut self) {
        let all = [
            "secret/seed",
            "rolebinding/guest-secrets",
            "role/guest-secrets",
        ];
        let delete = ["delete", "-n", NAMESPACE, "--ignore-not-found"];
        if let Err(error) = self.0.lab().kubectl(&[&delete[..], &all].concat()) {
            eprintln!("{error:#}");
        }
    }
}

/// In every text.
const MARK: &str = "correct-horse";
const FIRST: &str = "#cloud-config of correct-horse 1";
const SECOND: &str = "#cloud-config of correct-horse 2";
/// As the start of a virtual machine.
const READY_LIMIT: Duration = Duration::from_secs(120);
