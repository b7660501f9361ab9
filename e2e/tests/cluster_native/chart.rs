//! The chart: rendering, validation of values, and guests that survive its upgrade and removal.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, ensure};
use bascule_e2e::kubernetes::{Installation, NAMESPACE, SYSTEM_NAMESPACE};
use bascule_lab::command::Run;
use bascule_lab::tools::Tools;
use serde_json::Value;

use super::CLUSTER;
use super::private_ca::PrivateSource;

#[test]
fn the_chart_lints_and_renders_with_every_value_set() {
    helm(&["lint", "--strict", &chart()]).unwrap();
    let rendered = helm(&[
        "template",
        "bascule",
        &chart(),
        "--set=node.bridges.lan=br0",
        "--set=node.hostFiles.debian=/var/lib/images/debian.raw",
        "--set=node.allowSources={10.0.0.0/8}",
        "--set=node.allowSoftdog=true",
        "--set-json=allocationRatio=1.5",
        "--set=operator.address=[fd00::1]:7409",
        "--set=operator.leaseSeconds=11",
        "--set=node.migrationPorts=50000-50063",
        "--set=node.vmUsers=70000-80000",
        "--set=node.transparentHugePages=false",
        "--set=networkPolicy.enabled=true",
        "--set=networkPolicy.apiServerPorts={8443}",
        "--set=imagePullSecrets={pull}",
    ])
    .unwrap();
    for wanted in [
        "--bridge=lan=br0",
        "--host-file=debian=/var/lib/images/debian.raw",
        "--allow-source=10.0.0.0/8",
        "--allow-softdog",
        "\"1500\"",
        "[fd00::1]:7409",
        "BASCULE_LEASE_SECONDS, value: \"11\"",
        "--migration-ports=50000-50063",
        "--vm-users=70000-80000",
        "--no-huge-pages",
        "ipFamilyPolicy: PreferDualStack",
        "kind: NetworkPolicy",
        "port: 8443",
        "kind: APIService",
        "name: pull",
    ] {
        assert!(rendered.contains(wanted), "{wanted} is not in {rendered}");
    }
}

#[test]
fn a_bad_value_is_refused_and_named() {
    for (value, name) in [
        ("allocationRatio=0", "allocationRatio"),
        ("operator.replicas=0", "replicas"),
        ("operator.replicas=two", "replicas"),
        ("operator.leaseSeconds=2", "leaseSeconds"),
        ("operator.leaseSeconds=15s", "leaseSeconds"),
        ("operator.address=nowhere", "address"),
        ("operator.address=fd00::1:7409", "address"),
        ("operator.address=[fd00::1]", "address"),
        ("node.migrationPorts=any", "migrationPorts"),
        ("node.vmUsers=nobody", "vmUsers"),
        ("node.transparentHugePages=2M", "transparentHugePages"),
        ("networkPolicy.apiServerPorts={0}", "apiServerPorts"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.repository=", "repository"),
        ("log.format=xml", "format"),
        ("node.bridges.lan=a-bridge-name-that-is-too-long", "bridges"),
        ("node.bridges.LAN=br0", "LAN"),
        ("node.hostFiles.debian=images/debian.raw", "hostFiles"),
        ("node.allowSources={everything}", "allowSources"),
        ("node.watchdogDevice=watchdog", "watchdogDevice"),
        ("console.enabled=perhaps", "enabled"),
        ("nodes.bridges.lan=br0", "nodes"),
    ] {
        let refused = helm(&["template", "bascule", &chart(), "--set", value]);
        let error = format!("{:#}", refused.expect_err(value));
        assert!(error.contains(name), "{value}: {error}");
    }
}

/// Least privilege: the operator has only the rights it uses, the nodes have none.
#[test]
fn the_charts_roles_grant_what_is_used_and_nothing_else() {
    let rendered = helm(&["template", "bascule", &chart(), "--namespace", "away"]).unwrap();
    let documents: Vec<Value> = rendered
        .split("\n---\n")
        .filter_map(|document| serde_saphyr::from_str(document).ok())
        .collect();
    let of_kind = |kind: &'static str| documents.iter().filter(move |d| d["kind"] == kind);
    for role in of_kind("ClusterRole").chain(of_kind("Role")) {
        for rule in role["rules"].as_array().unwrap() {
            let text = rule.to_string();
            assert!(!text.contains('*'), "a wildcard: {text}");
            assert!(
                !text.contains("escalate") && !text.contains("bind"),
                "{text}"
            );
        }
    }
    let everywhere: Vec<String> = of_kind("ClusterRole").flat_map(rights).collect();
    for right in &everywhere {
        let (verb, resource) = right.split_once(' ').unwrap();
        let secret = resource.starts_with("secrets") || resource.starts_with("configmaps");
        assert!(!secret, "{right} in every namespace");
        let changes = !["get", "list", "watch"].contains(&verb);
        assert!(!(changes && resource.starts_with("nodes")), "{right}");
        assert!(
            !resource.starts_with("pods/"),
            "{right}: no exec, no attach"
        );
    }
    // What a role of Kubernetes' own gets from the chart: the operator believes every status.
    let aggregated = of_kind("ClusterRole").filter(|role| {
        let labels = role["metadata"]["labels"].to_string();
        labels.contains("rbac.authorization.k8s.io/aggregate-to-")
    });
    let users: Vec<String> = aggregated.flat_map(rights).collect();
    assert!(
        users.contains(&"create virtualmachines".to_owned()),
        "{users:?}"
    );
    for right in &users {
        let (verb, resource) = right.split_once(' ').unwrap();
        let console = ["virtualmachines/console", "virtualmachines/log"].contains(&resource);
        assert!(console || !resource.contains('/'), "{right}");
        assert!(!resource.starts_with("sharedvolumes"), "{right}");
        let changes = !["get", "list", "watch"].contains(&verb);
        assert!(!(changes && resource.starts_with("failovers")), "{right}");
    }
    let own: Vec<String> = of_kind("Role").flat_map(rights).collect();
    for right in own.iter().filter(|right| right.contains("secrets")) {
        let named = right.ends_with("secrets bascule-ca");
        assert!(named || right == "create secrets", "{right}");
    }
    for role in of_kind("Role") {
        assert_eq!(role["metadata"]["namespace"], "away");
    }
    let bound: Vec<&Value> = of_kind("RoleBinding")
        .chain(of_kind("ClusterRoleBinding"))
        .flat_map(|binding| binding["subjects"].as_array().unwrap())
        .map(|subject| &subject["name"])
        .collect();
    assert_eq!(bound, ["bascule-operator"; 3], "the nodes have no rights");
}

/// Serial output may hold secrets.
#[test]
fn the_role_view_reads_no_serial_output() {
    let rendered = helm(&["template", "bascule", &chart()]).unwrap();
    let documents = rendered.split("\n---\n");
    let documents = documents.filter_map(|document| serde_saphyr::from_str(document).ok());
    let view = documents.filter(|role: &Value| {
        let labels = role["metadata"]["labels"].to_string();
        role["kind"] == "ClusterRole" && labels.contains("aggregate-to-view")
    });
    let view: Vec<String> = view.flat_map(|role| rights(&role)).collect();
    assert!(view.contains(&"get virtualmachines".to_owned()), "{view:?}");
    for right in view {
        assert!(!right.contains('/'), "{right}");
    }
}

#[test]
fn the_api_accepts_every_example() {
    CLUSTER.with("the_api_accepts_every_example", |cluster| {
        let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
        let mut count = 0;
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            // The service unit is checked by a unit test.
            if path.extension().is_none_or(|extension| extension != "yaml") {
                continue;
            }
            let text = std::fs::read_to_string(&path).unwrap();
            // This cluster has a SharedVolume `gold`, whose backing is immutable, and no namespace `shop`.
            let text = text.replace("metadata: {name: gold}", "metadata: {name: example}");
            let text = text.replace("namespace: shop", &format!("namespace: {NAMESPACE}"));
            let args = ["apply", "--server-side", "--dry-run=server", "-f", "-"];
            let run = cluster.lab().kubectl_run().unwrap().args(args).stdin(text);
            run.done()
                .unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
            count += 1;
        }
        assert!(count >= 4, "{count} examples");
    });
}

#[test]
fn upgrade_and_uninstall_leave_guests_running() {
    CLUSTER.with_vm("steady", 30, |cluster, vm| {
        let lab = cluster.lab();
        let doomed = cluster.vm("doomed", 31).unwrap();
        let mut talk = vm.talk().unwrap();
        let mut doomed_talk = doomed.talk().unwrap();
        talk.ping().unwrap();
        let process = processes(cluster);
        assert_eq!(process.len(), 2, "{process:?}");

        let source = PrivateSource::new(lab).unwrap();
        let imported = cluster.document("private", 33);
        lab.apply(&imported.replacen("size: 64Mi", &source.disk(), 1))
            .unwrap();
        await_import(cluster, &source, "to be refused", |status| {
            let conditions = status["conditions"].to_string();
            ensure!(conditions.contains("certificate"), "{conditions}");
            Ok(())
        });
        upgrade(cluster, &source);
        let trusted = "to succeed with the chart's authority";
        await_import(cluster, &source, trusted, |status| {
            let mut disks = status["disks"].as_array().into_iter().flatten();
            let disk = disks.find(|disk| disk["name"] == "data");
            let state = disk.map(|disk| disk["state"].clone());
            ensure!(state == Some("Ready".into()), "{status}");
            Ok(())
        });
        cluster.handle("private", 33).delete().unwrap();
        talk.ping().unwrap();
        vm.wait_ready(SETTLE_LIMIT).unwrap();
        uninstall(cluster);
        talk.ping().unwrap();
        doomed_talk.ping().unwrap();
        assert_eq!(
            processes(cluster),
            process,
            "the same processes keep running"
        );
        assert_eq!(
            vm.object().unwrap()["status"]["phase"],
            "Running",
            "the object stays"
        );

        // No operator runs: the deleted object waits for its finalizer, and the guest keeps running.
        let delete = ["delete", "vm", "doomed", "-n", NAMESPACE, "--wait=false"];
        lab.kubectl(&delete).unwrap();
        doomed_talk.ping().unwrap();
        doomed_talk.check().unwrap();
        let waiting = doomed.object().unwrap();
        assert!(
            waiting["metadata"]["deletionTimestamp"].is_string(),
            "{waiting}"
        );
        assert_eq!(processes(cluster), process);

        lab.install_bascule(&["--set=log.format=text"]).unwrap();
        lab.wait_for("the pending deletion to complete", SETTLE_LIMIT, || {
            let left = lab.kubectl(&["get", "vm", "-n", NAMESPACE, "-o", "name"])?;
            ensure!(!left.contains("doomed"), "{left}");
            Ok(())
        })
        .unwrap();
        vm.wait_ready(SETTLE_LIMIT).unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
        let kept = processes(cluster);
        assert_eq!(kept.len(), 1, "{kept:?}");
        assert!(
            process.contains(&kept[0]),
            "it was found again, not started again"
        );
        cluster.wait_volume().unwrap();
    });
}

/// Waits for a status of the VM one of whose disks has the source with a private authority.
fn await_import(
    cluster: &Installation,
    source: &PrivateSource,
    what: &str,
    expected: impl Fn(&Value) -> Result<()>,
) {
    let lab = cluster.lab();
    let what = format!("the import over TLS {what}");
    lab.wait_for(&what, SETTLE_LIMIT, || {
        source.answer_waiting();
        let vm = lab.get(&["vm", "private", "-n", NAMESPACE])?;
        expected(&vm["status"])
    })
    .unwrap();
}

/// With changed values: every pod of the installation rolls.
fn upgrade(cluster: &Installation, source: &PrivateSource) {
    let lab = cluster.lab();
    let before = pods(cluster);
    let authority = source.authority();
    lab.install_bascule(&[
        "--set=log.format=text",
        "--set=log.level=debug",
        &format!("--set-file=node.images.caBundle={}", authority.display()),
    ])
    .unwrap();
    let replaced = lab.wait_for("every pod to be replaced", SETTLE_LIMIT, || {
        let after = pods(cluster);
        ensure!(before.iter().all(|pod| !after.contains(pod)), "{after:?}");
        Ok(())
    });
    replaced.unwrap();
}

/// helm's notes say before that guests keep running, and at the end what remains.
fn uninstall(cluster: &Installation) {
    let lab = cluster.lab();
    let notes = lab
        .helm(&["get", "notes", "bascule", "-n", SYSTEM_NAMESPACE])
        .unwrap();
    assert!(
        notes.contains("`helm uninstall` does not stop virtual machines"),
        "{notes}"
    );
    let said = lab
        .helm(&["uninstall", "bascule", "-n", SYSTEM_NAMESPACE, "--wait"])
        .unwrap();
    assert!(
        said.contains("virtualmachines.bascule.dev"),
        "what stays is listed: {said}"
    );
    lab.wait_for("the programs' pods to be gone", SETTLE_LIMIT, || {
        let left = pods(cluster);
        ensure!(left.is_empty(), "{left:?}");
        Ok(())
    })
    .unwrap();
}

#[test]
fn a_namespace_with_a_virtual_machine_can_be_deleted() {
    CLUSTER.with(
        "a_namespace_with_a_virtual_machine_can_be_deleted",
        |cluster| {
            let lab = cluster.lab();
            lab.kubectl(&["create", "namespace", "shop"]).unwrap();
            let document = cluster
                .document("tenant", 32)
                .replace(&format!("namespace: {NAMESPACE}"), "namespace: shop");
            lab.apply(&document).unwrap();
            lab.wait_for("the tenant's virtual machine to run", SETTLE_LIMIT, || {
                let vm = lab.get(&["vm", "tenant", "-n", "shop"])?;
                ensure!(vm["status"]["phase"] == "Running", "{}", vm["status"]);
                Ok(())
            })
            .unwrap();
            let delete = lab.kubectl_run().unwrap();
            let delete = delete.args(["delete", "namespace", "shop", "--timeout=120s"]);
            delete.deadline(Duration::from_secs(130)).done().unwrap();
            assert_eq!(
                processes(cluster),
                Vec::<String>::new(),
                "nothing runs on unseen"
            );
        },
    );
}

fn helm(args: &[&str]) -> Result<String> {
    Run::new(Tools::ensure()?.path("helm")?).args(args).text()
}

fn chart() -> String {
    let checkout = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let checkout = checkout.map_or_else(PathBuf::new, Path::to_owned);
    checkout
        .join("charts/bascule")
        .to_string_lossy()
        .into_owned()
}

/// `verb resource` for everything that a role grants; with the name, where it is restricted to one.
fn rights(role: &Value) -> Vec<String> {
    let list = |rule: &Value, key: &str| -> Vec<String> {
        let items = rule[key].as_array().into_iter().flatten();
        items
            .filter_map(|item| item.as_str().map(str::to_owned))
            .collect()
    };
    let mut rights = vec![];
    for rule in role["rules"].as_array().into_iter().flatten() {
        let names = list(rule, "resourceNames").join(" ");
        for resource in list(rule, "resources") {
            for verb in list(rule, "verbs") {
                rights.push(format!("{verb} {resource} {names}").trim_end().to_owned());
            }
        }
    }
    rights
}

/// The UIDs of the installation's pods.
fn pods(cluster: &Installation) -> Vec<String> {
    let label = "-lapp.kubernetes.io/name=bascule";
    let pods = cluster
        .lab()
        .get(&["pods", "-n", SYSTEM_NAMESPACE, label])
        .unwrap();
    let items = pods["items"].as_array().unwrap().iter();
    items
        .map(|pod| pod["metadata"]["uid"].to_string())
        .collect()
}

/// Every guest's process: its node, its process id there, and when that began.
fn processes(cluster: &Installation) -> Vec<String> {
    let list = "for p in $(pgrep -x bascule-vm); do \
                echo $p $(cut -d' ' -f22 /proc/$p/stat); done";
    let mut found = vec![];
    for node in cluster.lab().nodes() {
        let lines = node.exec(&["sh", "-c", list]).unwrap();
        found.extend(lines.lines().map(|line| format!("{} {line}", node.name())));
    }
    found
}

/// A rollout, a leader election, a guest's shutdown.
const SETTLE_LIMIT: Duration = Duration::from_secs(180);
