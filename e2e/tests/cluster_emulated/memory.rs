//! A node that runs out of memory.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{Installation, NAMESPACE, Talk};
use bascule_lab::Node;
use serde_json::Value;

use crate::CLUSTER;

/// First the kubelet evicts what requested nothing, then, with more wanted than there is, what uses
/// more than it requested goes: the guest does not.
#[test]
fn node_memory_pressure_spares_the_guest() {
    CLUSTER.with_resident("spared", |cluster, vm| {
        let name = vm.node().unwrap();
        let tenure = vm.tenure().unwrap();
        let taken = vm.times_taken_over().unwrap();
        let mut talk = vm.talk().unwrap();

        let pressing = hog(cluster, &name, &mut talk, "pressing", -150, None).unwrap();
        assert_eq!(pressing["reason"], "Evicted", "{pressing}");
        println!("{}", pressing["message"]);
        // A node under pressure lets in only pods with a request.
        let bursting = hog(cluster, &name, &mut talk, "bursting", 300, Some("64Mi")).unwrap();
        let ended = &bursting["containerStatuses"][0]["state"]["terminated"];
        assert_eq!(ended["exitCode"], 128 + SIGKILL, "{bursting}");

        talk.check().unwrap();
        vm.wait_ready(READY_LIMIT).unwrap();
        assert_eq!(vm.tenure().unwrap(), tenure, "it stayed where it was");
        assert_eq!(vm.times_taken_over().unwrap(), taken);
    });
}

/// The end of a pod that takes `beyond_mib` more than the node has available. The guest answers and
/// writes all the while.
fn hog(
    cluster: &Installation,
    node: &str,
    talk: &mut Talk,
    pod: &str,
    beyond_mib: i64,
    request: Option<&str>,
) -> Result<Value> {
    let lab = cluster.lab();
    let size_mib = available_mib(&lab.node(node)?)? + beyond_mib;
    let size = format!("bs={size_mib}M");
    let dd = ["dd", "if=/dev/zero", "of=/dev/null", &size];
    cluster.pod(pod, node, &dd, request)?;
    let end = lab.wait_for(&format!("{pod} to lose its memory"), PRESSURE_LIMIT, || {
        talk.ping()?;
        talk.append()?;
        let pod = lab.get(&["pod", pod, "-n", NAMESPACE])?;
        let failed = pod["status"]["phase"] == "Failed";
        ensure!(failed, "it is {}", pod["status"]["phase"]);
        Ok(pod["status"].clone())
    });
    cluster.delete_pod(pod)?;
    println!("{pod}: {size_mib} MiB");
    end
}

/// What the kubelet calls available: free memory and what of the page cache is not in use.
fn available_mib(node: &Node<'_>) -> Result<i64> {
    let info = node.exec(&["cat", "/proc/meminfo"])?;
    let kib = |field: &str| -> Result<i64> {
        let line = info.lines().find_map(|line| line.strip_prefix(field));
        let number = line.with_context(|| format!("no {field}"))?;
        let number = number.trim_end_matches("kB").trim();
        number.parse().with_context(|| format!("{field} {number}"))
    };
    Ok((kib("MemFree:")? + kib("Inactive(file):")?) / 1024)
}

/// The kubelet looks every ten seconds; an emulated node under pressure is slow.
const PRESSURE_LIMIT: Duration = Duration::from_secs(300);
/// The guest was not away.
const READY_LIMIT: Duration = Duration::from_secs(120);
const SIGKILL: i64 = 9;
