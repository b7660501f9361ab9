//! The whole story on one machine: a three-node cluster, a virtual machine, a drain, a power cut.
//!
//! Everything is done as a user would do it (helm, kubectl) and seen as a client of the guest sees
//! it. The lab is taken down at the end, also when this is interrupted, unless `--keep` is given.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::Result;
use bascule_e2e::kubernetes::scenarios::{self, Drained, PowerCut};
use bascule_e2e::kubernetes::{ClusterVm, Installation};
use bascule_lab::progress::{say, step};
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
    let cluster = Installation::on(Lab::up(&options)?)?;
    step("attaching the SharedVolume on every node", || {
        cluster.volume()
    })?;
    let vm = step("starting a virtual machine", || cluster.vm("web", 100))?;
    say(&format!(
        "{} runs on {} and answers on {}",
        vm.name,
        vm.node()?,
        vm.address
    ));
    let drained = drain(&cluster, &vm)?;
    let cut = match tier {
        Tier::Emulated => Some(power_cut(&cluster, &vm)?),
        Tier::Native => None,
    };
    summary(&drained, cut.as_ref());
    println!("{}", cluster.overview()?);
    say(&format!(
        "the whole story took {:.0} s",
        begin.elapsed().as_secs_f64()
    ));
    if args.keep {
        say("the cluster stays up: `make demo-down` removes it");
    }
    Ok(())
}

fn drain(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<Drained> {
    let source = vm.node()?;
    let drained = step(&format!("kubectl drain {source}"), || {
        scenarios::drain_moves_vms_live(cluster, &source, &[vm])
    })?;
    say(&format!(
        "the guest is on {}; the TCP session of before goes on",
        vm.node()?
    ));
    Ok(drained)
}

fn power_cut(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<PowerCut> {
    let what = format!(
        "pulling the plug of {}, the guest answering elsewhere",
        vm.node()?
    );
    let cut = step(&what, || scenarios::power_cut(cluster, vm))?;
    say(&format!(
        "the guest is on {}; every flushed record is there",
        cut.to
    ));
    Ok(cut)
}

fn summary(drained: &Drained, cut: Option<&PowerCut>) {
    println!("\nThe move, as the client saw it:");
    let row = |what: &str, value: String| println!("  {what:<24} {value}");
    row("drain took", format!("{:.1} s", drained.took.as_secs_f64()));
    for guest in &drained.guests {
        let (seen, moved) = (&guest.seen, &guest.moved);
        row(
            "longest silence",
            format!("{} ms", seen.gap_max.as_millis()),
        );
        row("packets lost", format!("{} of {}", seen.lost, seen.sent));
        let downtime = moved.downtime.as_deref().unwrap_or("-");
        row("blackout by our timers", downtime.to_owned());
        row(&moved.mode, format!("{} to {}", moved.source, moved.target));
    }
    if let Some(cut) = cut {
        println!("The power cut, from the plug on:");
        for (stage, after) in cut.takeover.stages(cut.plug) {
            row(stage, format!("{} s", after.as_secs()));
        }
        let outage = cut.outage.as_secs_f64();
        row("guest answering", format!("{outage:.1} s"));
        row("proof", cut.takeover.detail.clone());
    }
    println!();
}
