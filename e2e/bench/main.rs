//! `bascule-bench`: benchmarks, each figure beside a baseline of the same run.
//!
//! Live migration: `bascule-vm` and QEMU each migrate the same probe guest between two processes on
//! this machine, over the loopback address, with the same limits. The blackout is what a client
//! sees: the longest gap between two ticks on the guest's console and between two packets of a 1 kHz
//! flow, both over the whole migration.
//!
//! Disk: the virtio-blk device beside fio on the same file ([`disk`]). Metadata: changes of a volume beside flushes of
//! the same file system ([`metadata`]).
#![forbid(unsafe_code)]

mod bascule;
mod cluster;
mod disk;
mod measure;
mod metadata;
mod qemu;
mod table;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use bascule_e2e::kvm_or_skip;
use clap::Parser;

use crate::measure::{Load, Outcome};

/// Migrates the probe guest live with Bascule and with QEMU, reads and writes a disk beside fio, changes a volume's
/// metadata, and prints the figures; then drains emulated nodes, cuts a node's power, and prints the figures.
#[derive(Debug, Parser)]
#[command(name = "bascule-bench", version)]
struct Options {
    /// Number of migrations or disk runs per row of a table; the median of each figure is printed.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Measure only this.
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Measure live migration only under this load.
    #[arg(long, value_enum)]
    load: Option<Load>,
    /// Guest RAM in MiB.
    #[arg(long, default_value_t = 2048)]
    memory_mib: u32,
    /// The blackout that both sides aim at, in milliseconds.
    #[arg(long, default_value_t = 300)]
    downtime_ms: u64,
    /// The directory of the file that stands for the disk; by default that for temporary files.
    #[arg(long)]
    disk_directory: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// Live migration on this machine's /dev/kvm, beside QEMU's.
    Migration,
    /// Requests of a virtio-blk driver, beside fio's on the same file.
    Disk,
    /// Changes of a volume's metadata, beside flushes on the same file system.
    Metadata,
    /// Drain and power cut on a cluster of emulated nodes, beside the safe time.
    Cluster,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bascule-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let wanted = |part| options.only.is_none_or(|only| only == part);
    if wanted(Part::Disk) {
        disk::run(options.disk_directory.as_deref(), options.runs)?;
    }
    if wanted(Part::Metadata) {
        metadata::run()?;
    }
    let needs_kvm = wanted(Part::Migration) || wanted(Part::Cluster);
    if !needs_kvm || !kvm_or_skip("bascule-bench") {
        return Ok(());
    }
    if wanted(Part::Migration) {
        migrations(options)?;
    }
    if wanted(Part::Cluster) {
        cluster::run()?;
    }
    Ok(())
}

fn migrations(options: &Options) -> Result<()> {
    let downtime = Duration::from_millis(options.downtime_ms);
    let all = [Load::Idle, Load::Rewriting];
    for load in all
        .into_iter()
        .filter(|load| options.load.is_none_or(|only| only == *load))
    {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        // Turn by turn, so that a machine that is busy for a while is so for both.
        for run in 1..=options.runs {
            eprintln!("{load}, run {run} of {}", options.runs);
            let outcome = bascule::migrate(load, options.memory_mib, downtime);
            ours.push(outcome.with_context(|| format!("Bascule, {load}"))?);
            let outcome = qemu::migrate(load, options.memory_mib, downtime);
            theirs.push(outcome.with_context(|| format!("QEMU, {load}"))?);
        }
        table::print(load, &Outcome::median(&ours)?, &Outcome::median(&theirs)?);
    }
    Ok(())
}
