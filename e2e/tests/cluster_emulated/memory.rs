//! A node that runs out of memory.

use std::time::Duration;

use anyhow::{Context, Result};
use bascule_e2e::kubernetes::NAMESPACE;
use bascule_lab::Node;

use crate::CLUSTER;

/// First the kubelet evicts, then the kernel kills: a pod without a request goes, the guest does not.
#[test]
fn node_memory_pressure_spares_the_guest() {
    CLUSTER.with_resident("spared", |cluster, vm| {
        let lab = cluster.lab();
        let name = vm.node().unwrap();
        let node = lab.node(&name).unwrap();
        let tenure = vm.tenure().unwrap();
        let taken = vm.times_taken_over().unwrap();
        let mut talk = vm.talk().unwrap();
        for (pod, beyond_mib, ends) in [("pressing", -150_i64, "Evicted"), ("bursting", 300, "")] {
            let size_mib = available_mib(&node).unwrap() + beyond_mib;
            let hog = format!("bs={size_mib}M");
            let dd = ["dd", "if=/dev/zero", "of=/dev/null", hog.as_str()];
            cluster.pod(pod, &name, &dd).unwrap();
            let seen = lab
                .wait_for(&format!("{pod} to lose its memory"), PRESSURE_LIMIT, || {
                    talk.ping()?;
                    talk.append()?;
                    let pod = lab.get(&["pod", pod, "-n", NAMESPACE])?;
                    let failed = pod["status"]["phase"] == "Failed";
                    anyhow::ensure!(failed, "it is {}", pod["status"]["phase"]);
                    Ok(pod["status"].clone())
                })
                .unwrap();
            let reason = seen["reason"].as_str().unwrap_or_default();
            assert!(reason.contains(ends), "{pod} ended otherwise: {seen}");
            println!("{pod} with {size_mib} MiB: {}", seen["message"]);
            cluster.delete_pod(pod).unwrap();
        }
        talk.check().unwrap();
        vm.wait_ready(Duration::from_secs(120)).unwrap();
        assert_eq!(vm.tenure().unwrap(), tenure, "it stayed where it was");
        assert_eq!(vm.times_taken_over().unwrap(), taken);
    });
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
