//! The whole story on one machine: a three-node cluster, a virtual machine, a drain, a power cut.
//!
//! Everything is done as a user would do it (helm, kubectl) and seen as a client of the guest sees
//! it. The lab is taken down at the end, also when this is interrupted, unless `--keep` is given.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bascule_e2e::FlowSummary;
use bascule_e2e::kubernetes::{ClusterVm, Installation, Moved, NAMESPACE};
use bascule_lab::lab::images_from_env;
use bascule_lab::progress::{say, step};
use bascule_lab::{Lab, Options, Tier};
use clap::Parser;
use serde_json::Value;

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

/// What the client saw of the drain.
struct Drained {
    took: Duration,
    seen: FlowSummary,
    moved: Option<Moved>,
}

/// What the client saw of the power cut.
struct Cut {
    outage: Duration,
    stages: Vec<(&'static str, String)>,
    proof: String,
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
    let mut talk = vm.talk()?;
    let source = vm.node()?;
    let flow = vm.flow()?;
    let took = step(&format!("kubectl drain {source}"), || {
        cluster.drain(&source)
    })?;
    let target = vm.wait_elsewhere(&source, Duration::from_secs(60))?;
    let seen = flow.finish()?;
    talk.ping()
        .context("the TCP session did not survive the move")?;
    say(&format!(
        "the guest is on {target}; the TCP session of before goes on"
    ));
    cluster.uncordon(&source)?;
    Ok(Drained {
        took,
        seen,
        moved: vm.moves()?.pop(),
    })
}

fn power_cut(cluster: &Installation, vm: &ClusterVm<'_>) -> Result<Cut> {
    let mut talk = vm.talk()?;
    let promised = talk.append().context("write a record")?;
    let node = vm.node()?;
    let plug = Instant::now();
    cluster.lab().node(&node)?.cut()?;
    say(&format!("pulled the plug of {node}"));
    let (mut after, outage) = step("the guest answering again, elsewhere", || {
        vm.wait_elsewhere(&node, Duration::from_secs(300))?;
        Ok((vm.talk()?, plug.elapsed()))
    })?;
    let found = after.check().context("the guest's disk is damaged")?;
    anyhow::ensure!(
        found >= promised,
        "record {promised} was flushed, and only {found} are there"
    );
    say(&format!(
        "the guest is on {}; every flushed record is there",
        vm.node()?
    ));
    let records = cluster.lab().get(&["failover", "-n", NAMESPACE])?;
    let record = records["items"].as_array().and_then(|items| items.last());
    let status = record.map_or(Value::Null, |record| record["status"].clone());
    let text = |field: &str| status[field].as_str().unwrap_or("-").to_owned();
    let stages = ["suspectedAt", "provedAt", "takenOverAt", "startedAt"];
    Ok(Cut {
        outage,
        stages: stages
            .into_iter()
            .map(|stage| (stage, text(stage)))
            .collect(),
        proof: status["proof"]["detail"].as_str().unwrap_or("-").to_owned(),
    })
}

fn summary(drained: &Drained, cut: Option<&Cut>) {
    println!("\nThe move, as the client saw it:");
    println!(
        "  drain took               {:.1} s",
        drained.took.as_secs_f64()
    );
    println!(
        "  longest silence          {} ms",
        drained.seen.gap_max.as_millis()
    );
    println!(
        "  packets lost             {} of {}",
        drained.seen.lost, drained.seen.sent
    );
    if let Some(moved) = &drained.moved {
        println!(
            "  blackout by our timers   {}",
            moved.downtime.as_deref().unwrap_or("-")
        );
        println!("  {} to {}, {}", moved.source, moved.target, moved.mode);
    }
    if let Some(cut) = cut {
        println!("The power cut:");
        println!(
            "  cut to guest answering   {:.1} s",
            cut.outage.as_secs_f64()
        );
        for (stage, at) in &cut.stages {
            println!("  {stage:<24} {at}");
        }
        println!("  proof                    {}", cut.proof);
    }
    println!();
}
