//! A node that runs out of memory.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::NAMESPACE;
use bascule_lab::Node;

use crate::CLUSTER;

/// The kubelet evicts pods without requests, and the OOM killer's scores rank a guest and its
/// bascule-volume and bascule-watchdog after every pod's processes.
#[test]
fn node_memory_pressure_spares_the_guest() {
    CLUSTER.with_resident("spared", |cluster, vm| {
        let lab = cluster.lab();
        let name = vm.node().unwrap();
        let node = lab.node(&name).unwrap();
        let before = vm.slot_and_epoch().unwrap();
        let taken = vm.times_taken_over().unwrap();
        let mut talk = vm.talk().unwrap();
        // Some more than the kubelet wants to see free.
        let size_mib = available_mib(&node).unwrap() - 150;
        let hog = format!("bs={size_mib}M");
        let dd = ["dd", "if=/dev/zero", "of=/dev/null", hog.as_str()];
        cluster.pod("hog", &name, &dd).unwrap();
        let seen = lab.wait_for("the hog to be evicted", PRESSURE_LIMIT, || {
            talk.ping()?;
            talk.append()?;
            let pod = lab.get(&["pod", "hog", "-n", NAMESPACE])?;
            let failed = pod["status"]["phase"] == "Failed";
            ensure!(failed, "it is {}", pod["status"]["phase"]);
            Ok(pod["status"].clone())
        });
        assert_eq!(seen.unwrap()["reason"], "Evicted");
        cluster.delete_pod("hog").unwrap();

        let scores = oom_scores(&node).unwrap();
        let of = |programs: &[&str]| -> Vec<u32> {
            let wanted = |(program, _): &&(String, u32)| programs.contains(&program.as_str());
            scores
                .iter()
                .filter(wanted)
                .map(|(_, score)| *score)
                .collect()
        };
        let last = of(&["bascule-vm", "bascule-volume", "bascule-watchdo"]);
        let first = of(&["bascule-node", "bascule-hold"]);
        // One VM, one volume, and the watchdog with its holder.
        assert!(last.len() == 4 && first.len() >= 2, "{scores:?}");
        assert!(last.iter().max() < first.iter().min(), "{scores:?}");

        lab.wait_for("the pressure to end", PRESSURE_LIMIT, || {
            let node = lab.get(&["node", &name])?;
            let taints = node["spec"]["taints"].to_string();
            ensure!(!taints.contains("memory-pressure"), "{taints}");
            Ok(())
        })
        .unwrap();
        talk.check().unwrap();
        vm.wait_ready(READY_LIMIT).unwrap();
        assert_eq!(
            vm.slot_and_epoch().unwrap(),
            before,
            "it stayed where it was"
        );
        assert_eq!(vm.times_taken_over().unwrap(), taken);
    });
}

/// OOM score of each process, with its name (at most 15 bytes).
fn oom_scores(node: &Node<'_>) -> Result<Vec<(String, u32)>> {
    let each = "for p in /proc/[0-9]*; do echo $(cat $p/oom_score $p/comm); done 2>/dev/null";
    let table = node.exec(&["sh", "-c", each])?;
    let parse = |line: &str| {
        let (score, program) = line.split_once(' ')?;
        Some((program.to_owned(), score.parse().ok()?))
    };
    Ok(table.lines().filter_map(parse).collect())
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
