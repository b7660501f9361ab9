//! A power cut on a volume without hardware fencing: no takeover without a manual fencing
//! confirmation, and a takeover with it. The first takes the operator's leader with it, the second does not.

use std::time::{Duration, Instant};

use bascule_e2e::kubernetes::{Beside, ClusterVm, Installation, NAMESPACE, VOLUME};
use serde_json::Value;

use super::CLUSTER;

#[test]
fn a_manual_fencing_confirmation_restarts_the_guest_of_a_lost_node_elsewhere() {
    CLUSTER.with_vm("confirmed", 20, |cluster, vm| {
        let proof = lose_node(cluster, vm, Beside::Leader, |_, command| {
            // Runs exactly the command that the Failover shows.
            let words: Vec<&str> = command.split_whitespace().skip(1).collect();
            cluster.lab().kubectl(&words).unwrap();
        });
        assert_eq!(proof, "Administrator");
        let forget = format!("{CONFIRM}-");
        cluster
            .lab()
            .kubectl(&["annotate", "sv", VOLUME, &forget])
            .unwrap();
    });
}

#[test]
fn the_out_of_service_taint_confirms_fencing_where_the_volume_trusts_it() {
    CLUSTER.with_vm("taint", 21, |cluster, vm| {
        let lab = cluster.lab();
        let taint = "node.kubernetes.io/out-of-service=nodeshutdown:NoExecute";
        let proof = lose_node(cluster, vm, Beside::Standby, |node, _| {
            lab.kubectl(&["taint", "node", node, taint]).unwrap();
        });
        assert_eq!(proof, "OutOfServiceTaint");
    });
}

/// Cuts the power of the guest's node, checks that no takeover happens, calls `confirm` with the node
/// and the command that the Failover shows, and checks that the guest runs elsewhere with every
/// acknowledged record. Powers the node on again and returns the kind of the fence proof.
fn lose_node(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
    beside: Beside,
    confirm: impl FnOnce(&str, &str),
) -> String {
    let lab = cluster.lab();
    let promised = vm.talk().unwrap().append().unwrap();
    let node = vm.place(beside).unwrap();
    let epoch = epoch(vm);
    lab.node(&node).unwrap().cut().unwrap();
    let cut = Instant::now();

    let command = lab
        .wait_for(
            "the Failover to say what it waits for",
            SUSPECT_LIMIT,
            || asked_for(&record(cluster, &vm.name)?),
        )
        .unwrap();
    println!(
        "{node}, the node of the operator's {beside:?}, was suspected {:?} after the cut",
        cut.elapsed()
    );
    assert!(command.contains(&format!("{CONFIRM}={node}/")), "{command}");
    let waiting = record(cluster, &vm.name).unwrap();
    assert_eq!(waiting["status"]["phase"], "Suspected", "{waiting}");
    assert!(waiting["status"]["takenOverAt"].is_null(), "{waiting}");
    assert_eq!(
        self::epoch(vm),
        epoch,
        "the volume refuses a takeover without a proof"
    );

    confirm(&node, &command);
    vm.wait_elsewhere(&node, TAKEOVER_LIMIT).unwrap();
    let mut talk = vm.talk().unwrap();
    let found = talk.check().unwrap();
    assert!(
        found >= promised,
        "{promised} records were acknowledged, {found} are on the disk"
    );
    let closed = lab
        .wait_for("the Failover to be closed", TAKEOVER_LIMIT, || {
            let closed = record(cluster, &vm.name)?;
            let phase = &closed["status"]["phase"];
            anyhow::ensure!(phase == "Succeeded", "it is {phase}");
            Ok(closed)
        })
        .unwrap();

    let back = lab.node(&node).unwrap();
    back.boot().unwrap();
    back.wait_ready(BOOT_LIMIT).unwrap();
    untaint(cluster, &node);
    cluster.wait_volume().unwrap();
    talk.ping().unwrap();
    assert_ne!(
        vm.node().unwrap(),
        node,
        "the guest did not return with the node"
    );
    let proof = closed["status"]["proof"]["kind"]
        .as_str()
        .unwrap_or_default();
    proof.to_owned()
}

/// The latest Failover of a virtual machine.
fn record(cluster: &Installation, vm: &str) -> anyhow::Result<Value> {
    let order = "--sort-by=.metadata.creationTimestamp";
    let list = cluster.lab().get(&["failover", "-n", NAMESPACE, order])?;
    let items = list["items"].as_array().into_iter().flatten();
    let mut of_vm = items.filter(|item| item["spec"]["virtualMachine"] == vm);
    of_vm
        .next_back()
        .cloned()
        .ok_or_else(|| anyhow::anyhow!("there is none yet"))
}

/// The command that a waiting Failover tells an administrator to run.
fn asked_for(record: &Value) -> anyhow::Result<String> {
    let conditions = record["status"]["conditions"].as_array();
    let complete = conditions
        .into_iter()
        .flatten()
        .find(|c| c["type"] == "Complete");
    let message = complete
        .and_then(|c| c["message"].as_str())
        .unwrap_or_default();
    let at = message.find("kubectl annotate");
    let at = at.ok_or_else(|| anyhow::anyhow!("it says {message:?}"))?;
    Ok(message[at..].to_owned())
}

fn epoch(vm: &ClusterVm<'_>) -> String {
    let object = vm.object().unwrap();
    object["status"]["ownership"]["epoch"].to_string()
}

fn untaint(cluster: &Installation, node: &str) {
    let taint = "node.kubernetes.io/out-of-service-";
    // A node that has none makes kubectl fail.
    drop(cluster.lab().kubectl(&["taint", "node", node, taint]));
}

const CONFIRM: &str = "bascule.dev/confirm-fenced";
/// The volume's lease and one poll; with the leader lost, its Lease. On a busy machine.
const SUSPECT_LIMIT: Duration = Duration::from_secs(120);
const TAKEOVER_LIMIT: Duration = Duration::from_secs(90);
const BOOT_LIMIT: Duration = Duration::from_secs(60);
