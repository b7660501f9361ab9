//! Benchmarks on an emulated cluster, as an administrator and the guests' clients see them.

use std::time::Duration;

use anyhow::{Context, Result};
use bascule_e2e::kubernetes::scenarios::{self, Drained, PowerCut, SAFE_TIME};
use bascule_e2e::kubernetes::{ClusterVm, Installation};
use bascule_lab::{Lab, Tier};

/// Drains a node with one and with three VMs, measures the operator's memory, and cuts a node's power.
pub(crate) fn run() -> Result<()> {
    let cluster = Installation::on(Lab::for_test(Tier::Emulated, NODES)?)?;
    cluster.volume()?;
    let first = cluster.vm("one", 100)?;
    let node = first.node()?;
    let one = scenarios::drain_moves_vms_live(&cluster, &node, &[&first])?;
    let three = drain_three(&cluster, &first)?;
    let operators = operators_resident_kib(&cluster)?;
    let cut = scenarios::power_cut(&cluster, &first)?;
    print_drains(&one, &three);
    print_cut(&cut);
    println!("\noperator, resident memory of each replica");
    for (node, kib) in operators {
        println!("{node:<34}{:>12.1} MiB", f64::from(kib) / 1024.0);
    }
    Ok(())
}

/// Starts two more VMs on the node of the first and drains it of all three.
fn drain_three(cluster: &Installation, first: &ClusterVm<'_>) -> Result<Drained> {
    let node = first.node()?;
    let all: Vec<String> = cluster.lab().nodes().map(|node| node.name()).collect();
    let others = || all.iter().filter(|other| **other != node);
    others().try_for_each(|other| cluster.cordon(other))?;
    let (second, third) = (cluster.vm("two", 101)?, cluster.vm("three", 102)?);
    others().try_for_each(|other| cluster.uncordon(other))?;
    let drained = scenarios::drain_moves_vms_live(cluster, &node, &[first, &second, &third])?;
    second.delete()?;
    third.delete()?;
    Ok(drained)
}

fn operators_resident_kib(cluster: &Installation) -> Result<Vec<(String, u32)>> {
    let mut found = Vec::new();
    for node in cluster.lab().nodes() {
        let script = "for pid in $(pidof bascule-operator); do \
                      awk '/^VmRSS:/ { print $2 }' /proc/$pid/status; done";
        let said = node.exec(&["sh", "-c", script])?;
        for kib in said.lines() {
            let kib = kib.trim().parse().context("read VmRSS")?;
            found.push((node.name(), kib));
        }
    }
    anyhow::ensure!(!found.is_empty(), "no node runs an operator");
    Ok(found)
}

fn print_drains(one: &Drained, three: &Drained) {
    println!("\ndrain of an emulated node, Debian guests of 256 MiB");
    println!("{:<34}{:>12}{:>12}{:>8}", "virtual machines", 1, 3, "ratio");
    let row = |name: &str, one: Duration, three: Duration| {
        let (one, three) = (one.as_secs_f64(), three.as_secs_f64());
        let ratio = three / one;
        println!("{name:<34}{one:>12.2}{three:>12.2}{ratio:>8.2}");
    };
    let outage = |drained: &Drained| {
        let gaps = drained.guests.iter().map(|guest| guest.seen.gap_max);
        gaps.max().unwrap_or_default()
    };
    row("kubectl drain (s)", one.took, three.took);
    row("longest outage of a guest (s)", outage(one), outage(three));
    println!("\nstages of the one VM's move, after the begin of kubectl drain");
    for (stage, after) in one.guests.iter().flat_map(|guest| &guest.stages) {
        let (after, whole) = (after.as_secs_f64(), one.took.as_secs_f64());
        println!("{stage:<34}{after:>12.1}{:>12.2}", after / whole);
    }
}

fn print_cut(cut: &PowerCut) {
    println!("\npower cut to guest answering, emulated nodes (T_safe = 1.00)");
    println!("{:<34}{:>12}{:>12}", "", "after (s)", "of T_safe");
    let row = |stage: &str, after: Duration| {
        let ratio = after.as_secs_f64() / SAFE_TIME.as_secs_f64();
        println!("{stage:<34}{:>12.1}{ratio:>12.2}", after.as_secs_f64());
    };
    for (stage, after) in cut.takeover.stages(cut.cut_at) {
        row(stage, after);
    }
    row("guest responding", cut.outage);
}

const NODES: u8 = 3;
