//! The process around one machine: configuration, log, control socket, home volume, and the VM actor,
//! the only thread that changes the machine's phase.
//!
//! ```text
//!  vm.sock ──► connection threads ─┐
//!  vCPU and device threads ────────┼─► inbox ──► VM actor (main thread)
//!  task and migration threads ─────┤
//!  SIGTERM, SIGINT ────────────────┘
//! ```
//! Read next: [`actor`].

mod actor;
mod boot_images;
mod bounded_log;
mod control_socket;
mod devices;
mod home_volume;
mod host_devices;
mod namespaces;
mod no_cloud;
mod privileges;
#[cfg(feature = "fault-injection")]
mod rogue;
mod run_dir;
mod seccomp;
mod signals;
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) mod testing;
mod vm_config;

use std::path::Path;
use std::process::ExitCode;

use anyhow::Context as _;
use bascule_ipc::vm::VmConfig;
use landlock::RulesetStatus;

use self::actor::vm_actor::VmActor;
use self::host_devices::HostDevices;
use self::run_dir::RunDir;

#[cfg(feature = "fuzzing")]
pub(crate) use self::no_cloud::{EMPTY_USER_DATA, image as cloud_init_image};

/// Runs the machine of the configuration file `config` until a client of `vm.sock` requests the exit, or the
/// guest is off after SIGTERM.
/// The process's files are made in the directory of `config`.
#[must_use]
pub fn run(config: &Path) -> ExitCode {
    match serve(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(error = format_args!("{error:#}"), "cannot run");
            // Before there is a log, standard error is all that the parent process can read.
            run_dir::print_error(&format!("bascule-vm: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

fn serve(path: &Path) -> anyhow::Result<()> {
    // Before there is a second thread: threads inherit the mask.
    let signals = signals::block().context("block signals")?;
    let path = &std::path::absolute(path).context("find the configuration")?;
    let run_dir = RunDir::of(path);
    run_dir.start_log().context("start the log")?;
    let config: VmConfig = vm_config::read(path)?;
    run_dir.report_panics(config.uid);
    let span = tracing::info_span!("vm", name = config.name, uid = %config.uid);
    let _entered = span.enter();
    tracing::info!(release = env!("CARGO_PKG_VERSION"), "starting");
    let host = HostDevices::open(&config);
    let shown = privileges::shown(run_dir.path(), &config);
    if !namespaces::leave_host(run_dir.path(), &shown).context("leave the host's namespaces")? {
        tracing::warn!(
            "without root, this process stays in the host's namespaces and keeps its user"
        );
    }
    if let Some(user) = &config.user {
        privileges::become_user(user, &run_dir).context("become a user of its own")?;
    }
    privileges::drop_capabilities().context("give up capabilities")?;
    let confined = privileges::confine(run_dir.path(), &config).context("give up files")?;
    if confined == RulesetStatus::NotEnforced {
        tracing::warn!("the kernel has no Landlock: this process may open every file of its user");
    }
    seccomp::restrict(&run_dir, config.uid).context("give up system calls")?;
    let (mut actor, inbox) = VmActor::new(config, run_dir.clone())?;
    control_socket::listen(&run_dir, &actor.handle()).context("listen on vm.sock")?;
    signals::watch(signals, actor.handle()).context("wait for signals")?;
    actor.start(host);
    actor.serve(&inbox);
    tracing::info!("exiting");
    Ok(())
}
