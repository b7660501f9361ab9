//! Demo on one machine: a three-node cluster, a virtual machine, a drain, a power cut.
//!
//! Everything is done as a user would do it (helm, kubectl) and seen as a client of the guest sees
//! it. The lab is taken down at the end, also when this is interrupted, unless `--keep` is given.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use bascule_e2e::kubernetes::scenarios::{self, Drained, PowerCut};
use bascule_e2e::kubernetes::{ClusterVm, Installation};
use bascule_lab::progress::{Steps, say};
use bascule_lab::up::prepare;
use bascule_lab::{Lab, Options, Tier, images_from_env};
use clap::Parser;

/// Shows what Bascule does, with figures.
#[derive(Debug, Parser)]
#[command(name = "bascule-demo", version)]
struct Args {
    /// Leave the cluster up, to look around; `make demo-down` removes it
    #[arg(long)]
    keep: bool,
    /// Native nodes and the probe guest instead of emulated nodes and Debian: faster, but without
    /// the power cut, which needs a watchdog
    #[arg(long)]
    native: bool,
    /// Number of the first step and of all steps: `make demo` has done others before
    #[arg(long, value_name = "NEXT/TOTAL", default_value = "1/7")]
    steps: Steps,
}

fn main() -> ExitCode {
    match demo(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn demo(args: &Args) -> Result<()> {
    let (tier, nodes) = if args.native {
        (Tier::Native, 2)
    } else {
        (Tier::Emulated, 3)
    };
    let mut options = Options::new("demo".parse()?, tier, nodes);
    options.images = images_from_env();
    options.ephemeral = !args.keep;
    let begin = Instant::now();
    let mut steps = args.steps;
    let what = "preparing Kubernetes and the nodes' system (usually 18 min the first time, then 0)";
    steps.step(what, || prepare(tier))?;
    let what = format!("starting a Kubernetes cluster of {nodes} nodes (usually 2 min)");
    let lab = steps.step(&what, || Lab::up(&options))?;
    let what = "installing Bascule with helm (usually 1 min)";
    let cluster = steps.step(what, || Installation::on(lab))?;
    let what = "attaching the SharedVolume on every node (usually 1 min)";
    steps.step(what, || cluster.volume())?;
    let what = "starting a virtual machine (usually 2 min)";
    let vm = steps.step(what, || match tier {
        Tier::Emulated => cluster.firmware_vm("web", 100),
        Tier::Native => cluster.vm("web", 100),
    })?;
    say(&format!(
        "{} runs on {} and responds on {}",
        vm.name,
        vm.node()?,
        vm.address
    ));
    let drained = drain(&mut steps, &cluster, &vm)?;
    let cut = match tier {
        Tier::Emulated => Some(power_cut(&mut steps, &cluster, &vm)?),
        Tier::Native => None,
    };
    summary(&drained, cut.as_ref());
    println!("{}", cluster.overview()?);
    say(&format!(
        "the demo took {:.0} s",
        begin.elapsed().as_secs_f64()
    ));
    if args.keep {
        say("the cluster stays up: `make demo-down` removes it");
    }
    Ok(())
}

fn drain(steps: &mut Steps, cluster: &Installation, vm: &ClusterVm<'_>) -> Result<Drained> {
    let source = vm.node()?;
    let drained = steps.step(&format!("kubectl drain {source} (usually 1 min)"), || {
        scenarios::drain_moves_vms_live(cluster, &source, &[vm])
    })?;
    say(&format!(
        "the guest is on {}; its TCP session survived",
        vm.node()?
    ));
    Ok(drained)
}

fn power_cut(steps: &mut Steps, cluster: &Installation, vm: &ClusterVm<'_>) -> Result<PowerCut> {
    let what = format!(
        "cutting the power of {}, until the guest responds elsewhere (usually 2 min)",
        vm.node()?
    );
    let cut = steps.step(&what, || scenarios::power_cut(cluster, vm))?;
    say(&format!(
        "the guest is on {}; every acknowledged record is on its disk",
        cut.to
    ));
    Ok(cut)
}

fn summary(drained: &Drained, cut: Option<&PowerCut>) {
    println!("\nThe drain, as the client saw it:");
    let row = |what: &str, value: String| println!("  {what:<24} {value}");
    row("drain took", format!("{:.1} s", drained.took.as_secs_f64()));
    for guest in &drained.guests {
        let (seen, moved) = (&guest.seen, &guest.moved);
        row("longest outage", format!("{} ms", seen.gap_max.as_millis()));
        row("packets lost", format!("{} of {}", seen.lost, seen.sent));
        let downtime = moved.downtime.as_deref().unwrap_or("-");
        row("blackout measured by VMM", downtime.to_owned());
        row(&moved.mode, format!("{} to {}", moved.source, moved.target));
        for (stage, after) in &guest.stages {
            row(stage, format!("after {:.0} s", after.as_secs_f64()));
        }
    }
    if let Some(cut) = cut {
        println!("The power cut, seconds after it:");
        for (stage, after) in cut.takeover.stages(cut.cut_at) {
            row(stage, format!("{} s", after.as_secs()));
        }
        let outage = cut.outage.as_secs_f64();
        row("guest responding", format!("{outage:.1} s"));
        row("proof", cut.takeover.detail.clone());
    }
    println!();
}
