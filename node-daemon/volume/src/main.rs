//! One process per attached SharedVolume: heartbeat, fencing, coordinator; and the offline tools
//! format, check and repair.
#![forbid(unsafe_code)]
#![warn(clippy::print_stdout, clippy::print_stderr)]

use std::io::IsTerminal as _;
use std::process::ExitCode;

use bascule_volume::offline_tools::{CheckArgs, FormatArgs};
use bascule_volume::output::complain;
use bascule_volume::repair_command::RepairArgs;
use bascule_volume::serve_command::ServeArgs;
use bascule_volume::{offline_tools, repair_command, serve_command};
use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;

/// SharedVolumes: one block device (or, in a lab, one file) that carries the disks of many virtual
/// machines and is written by several nodes at once.
#[derive(Parser)]
#[command(name = "bascule-volume", version)]
struct Cli {
    /// The format of log lines. RUST_LOG sets the levels.
    #[arg(long, global = true, value_enum, default_value_t = LogFormat::Text)]
    log_format: LogFormat,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Make a new volume. Refuses a device that is not blank, unless --force is given.
    Format(FormatArgs),
    /// Check a volume that no node has attached, read-only.
    ///
    /// Exit codes: 0 clean, 1 warnings, 2 damaged, 3 not a Bascule volume, 4 a format of another release,
    /// 5 unreadable.
    Check(CheckArgs),
    /// Repair damaged superblocks, leader blocks and checkpoint heads of a volume that no node has
    /// attached, as far as other blocks prove what they held. Without --yes it only says what it would write.
    ///
    /// Exit codes: 0 nothing left to do, 1 something to do (or an error), 2 something cannot be repaired,
    /// 3 no volume of a format that this release knows.
    Repair(RepairArgs),
    /// Attach a volume on this node and serve the processes of the node.
    Serve(ServeArgs),
}

#[derive(Clone, Copy, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match cli.log_format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
    let outcome = match &cli.command {
        Command::Format(args) => offline_tools::format(args),
        Command::Check(args) => offline_tools::check(args),
        Command::Repair(args) => repair_command::repair(args),
        Command::Serve(args) => serve_command::serve(args),
    };
    outcome.unwrap_or_else(|error| {
        complain(&format!("bascule-volume: {error:#}"));
        ExitCode::FAILURE
    })
}
