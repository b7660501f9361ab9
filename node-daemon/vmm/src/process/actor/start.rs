//! Starting as the configuration says: boot, wait for a migration, or restore a saved guest.

use std::sync::Arc;

use anyhow::Context as _;
use bascule_ipc::vm::{StartMode, StopReason, VmState};
use bascule_types::Ownership;

use super::build::BuildPlan;
use super::event::TaskOutcome;
use super::phase::{BuiltMachine, Phase};
use super::vm_actor::VmActor;
use crate::process::host_devices::HostDevices;
use crate::process::seccomp;

impl VmActor {
    /// Begins to build the machine on a task thread. A failure does not end the process:
    /// `bascule-node` reads the reason from its status.
    pub(crate) fn start(&mut self, host: HostDevices) {
        let plan = BuildPlan {
            config: self.config.clone(),
            volume: self.volume.clone(),
            console: self.console.clone(),
            notices: Arc::clone(&self.notices),
            actor: self.handle(),
        };
        self.spawn_task("build", move |actor| {
            let mut ownership = None;
            let built = plan.build(host, &mut ownership);
            actor.task_ended(TaskOutcome::Built(ownership, built));
        });
    }

    pub(super) fn built(
        &mut self,
        ownership: Option<Ownership>,
        built: anyhow::Result<BuiltMachine>,
    ) {
        if let Some(ownership) = ownership {
            self.begin_ownership(ownership);
        }
        let begun = match (built, self.stop_wanted.take()) {
            (Ok(built), Some(reason)) => {
                self.end(Some(built.vm), VmState::Starting, reason);
                return;
            }
            (built, _) => built.and_then(|built| self.begin(built)),
        };
        if let Err(error) = begun {
            let what = format!("{error:#}");
            tracing::error!(what, "cannot start");
            let shown = self.phase.state();
            let vm = match self.take_phase() {
                Phase::Incoming(vm) => Some(vm),
                _ => None,
            };
            self.end(vm, shown, StopReason::Failed { what });
        }
    }

    fn begin(&mut self, built: BuiltMachine) -> anyhow::Result<()> {
        seccomp::restrict_further().context("give up system calls")?;
        #[cfg(feature = "fault-injection")]
        crate::process::rogue::run(&self.run_dir, &self.config);
        self.gate = built.gate;
        self.devices = built.devices;
        self.pvpanic = Some(built.vm.handle().pvpanic());
        match self.config.start {
            StartMode::Boot => tracing::info!("the guest runs"),
            StartMode::Incoming { .. } => {
                let machine = built.vm.handle();
                self.phase = Phase::Incoming(built.vm);
                return self.await_arrival(machine);
            }
            StartMode::Restore => {
                if let Err(error) = self.devices.announce() {
                    tracing::warn!(%error, "the guest's addresses were not announced");
                }
            }
        }
        Ok(self.run(built.vm)?)
    }
}
