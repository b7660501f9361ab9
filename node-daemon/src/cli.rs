//! The command lines.

use std::fs::File;
use std::io::IsTerminal;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::config::NodeConfig;
use crate::daemon::{self, ServeArgs};
use crate::embedded::{
    self, HostShutdownArgs, MigrateArgs, RestartVmArgs, RunVmArgs, StopVmArgs, VolumeCommand,
};
use crate::identity::authority::{self, CertCommand};
use crate::images::{self, RunArgs, UnpackArgs};
use crate::output::tell;
use crate::paths::Paths;
use crate::processes::launcher::{self, LaunchArgs, RemoveCgroupArgs};

/// Runs and supervises the virtual machines of one node.
///
/// On Kubernetes the chart starts `bascule-node serve` on every node. To run one VM without
/// Kubernetes, `bascule-node run vm.yaml` is enough: it makes an identity and a volume in a local file
/// where there are none. To move VMs between hosts without Kubernetes, make a certificate authority
/// with `cert init`, an identity for each node with `cert issue`, and start `bascule-node serve
/// --standalone` on each.
#[derive(Debug, Parser)]
#[command(name = "bascule-node", version)]
struct NodeCli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: NodeCommand,
}

#[derive(Debug, clap::Args)]
struct LogArgs {
    /// How log lines look
    #[arg(
        long,
        global = true,
        value_enum,
        default_value = "text",
        env = "BASCULE_LOG_FORMAT"
    )]
    log_format: LogFormat,
    /// What is logged: a level, or `target=level` pairs
    #[arg(long, global = true, default_value = "info", env = "BASCULE_LOG")]
    log: String,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum NodeCommand {
    /// Run the node's daemon
    Serve(Box<ServeArgs>),
    /// Run a VirtualMachine document here, with its serial console on this terminal. Makes an
    /// identity and a volume in a local file if there are none
    Run(RunVmArgs),
    /// Stop a VM of this node
    Stop(StopVmArgs),
    /// Reset the machine of a VM of this node, without shutting the guest down. The guest boots again, in the
    /// same process
    Restart(RestartVmArgs),
    /// Shut the guests of this node down, before the host shuts down. No guest is started here until the
    /// host has rebooted
    HostShutdown(HostShutdownArgs),
    /// Move a VM of this node live to another node
    Migrate(MigrateArgs),
    /// Format and join volumes, list their disks and virtual machines
    #[command(subcommand)]
    Volume(VolumeCommand),
    /// Make certificates for nodes without Kubernetes
    #[command(subcommand)]
    Cert(CertCommand),
    /// Execute another program outside this container (used by the daemon)
    #[command(hide = true)]
    Launch(LaunchArgs),
    /// Remove the cgroup of a program that has ended (used by the daemon)
    #[command(hide = true)]
    RemoveCgroup(RemoveCgroupArgs),
}

/// Fills one disk of a volume from an image. Started by bascule-node.
#[derive(Debug, Parser)]
#[command(name = "bascule-import", version)]
struct ImportCli {
    #[command(subcommand)]
    command: ImportCommand,
}

#[derive(Debug, Subcommand)]
enum ImportCommand {
    /// Run one import
    Run(RunArgs),
    /// Unpack an image from standard input to standard output, without privileges (used by `run`)
    Unpack(UnpackArgs),
    /// Fetch an image to standard output, without privileges (used by `run`); the job comes as JSON on
    /// standard input
    Fetch,
}

/// The program `bascule-node`.
#[must_use]
pub fn node_main() -> ExitCode {
    let cli = NodeCli::parse();
    match &cli.command {
        NodeCommand::Run(args) if !args.verbose => start_run_log(&cli.log, &args.config),
        _ => start_logging(&cli.log, std::io::stderr, std::io::stderr().is_terminal()),
    }
    finish(match &cli.command {
        NodeCommand::Serve(args) => daemon::run(args),
        NodeCommand::Run(args) => embedded::run_vm(args),
        NodeCommand::Stop(args) => embedded::stop_vm(args),
        NodeCommand::Restart(args) => embedded::restart_vm(args),
        NodeCommand::HostShutdown(args) => embedded::host_shutdown(args),
        NodeCommand::Migrate(args) => embedded::migrate(args),
        NodeCommand::Volume(command) => embedded::run_volume(command),
        NodeCommand::Cert(command) => authority::run(command),
        NodeCommand::Launch(args) => launcher::launch(args),
        NodeCommand::RemoveCgroup(args) => launcher::remove_cgroup(args),
    })
}

/// The program `bascule-import`.
#[must_use]
pub fn import_main() -> ExitCode {
    finish(match &ImportCli::parse().command {
        ImportCommand::Run(args) => images::run(args),
        ImportCommand::Unpack(args) => images::unpack(args),
        ImportCommand::Fetch => images::fetch(),
    })
}

fn finish(outcome: Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(format_args!("error: {error:#}"));
            if images::is_final(&error) {
                ExitCode::from(images::FINAL_STATUS)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// `run` shows the guest's console on the terminal: its own log goes to a file, or to standard error
/// where the file cannot be written.
fn start_run_log(args: &LogArgs, config: &NodeConfig) {
    let path = Paths::new(&config.run_dir, &config.state_dir).run_log();
    match append_to(&path) {
        Ok(file) => {
            tell(format_args!("Log: {} (or --verbose).", path.display()));
            start_logging(args, Mutex::new(file), false);
        }
        Err(error) => {
            start_logging(args, std::io::stderr, std::io::stderr().is_terminal());
            tracing::warn!(%error, path = %path.display(), "cannot write the log file");
        }
    }
}

fn append_to(path: &Path) -> std::io::Result<File> {
    path.parent().map_or(Ok(()), std::fs::create_dir_all)?;
    File::options().create(true).append(true).open(path)
}

fn start_logging<W>(args: &LogArgs, writer: W, ansi: bool)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let filter = EnvFilter::try_new(&args.log).unwrap_or_else(|_| EnvFilter::new("info"));
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(writer)
        .with_ansi(ansi);
    match args.log_format {
        LogFormat::Text => builder.init(),
        LogFormat::Json => builder.json().init(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_lines_are_consistent() {
        NodeCli::command().debug_assert();
        ImportCli::command().debug_assert();
    }

    /// Two options of one name and of different types parse only until one is used.
    #[test]
    fn the_launchers_options_do_not_clash_with_the_global_ones() {
        let line = [
            "bascule-node",
            "launch",
            "--stderr",
            "/tmp/x",
            "--",
            "/bin/true",
            "--log",
            "y",
        ];
        let cli = NodeCli::try_parse_from(line).unwrap();
        assert!(matches!(cli.command, NodeCommand::Launch(_)));
        assert_eq!(cli.log.log, "info");
    }
}
