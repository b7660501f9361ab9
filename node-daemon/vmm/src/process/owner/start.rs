//! Building the machine. Opening a volume, reading a kernel and reading a saved guest's memory take
//! as long as the device takes, so a thread of its own does it.

use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use bascule_devices::disk::VolumeGate;
use bascule_ipc::vm::{StartMode, StopReason, VmConfig, VmState};
use bascule_types::{Epoch, Owner as Tenant};

use super::{Notices, Owner, OwnerHandle, Phase, lock};
use crate::process::devices::{self, Devices};
use crate::process::migration::restore_saved;
use crate::process::volume::{Opened, VolumeClient};
use crate::process::{images, tenure};
use crate::{Console, PausedVm, VmBuilder};

/// What it takes to build the machine.
struct Plan {
    config: VmConfig,
    volume: Option<Arc<VolumeClient>>,
    console: Console,
    notices: Arc<Mutex<Notices>>,
    owner: OwnerHandle,
}

/// A machine that is built.
struct Built {
    vm: PausedVm,
    gate: Option<Arc<VolumeGate>>,
    devices: Devices,
}

impl Owner {
    /// Builds the machine and begins as configured. A failure is a state, not an end: the starter
    /// shall be able to ask why.
    pub(crate) fn start(&mut self) {
        let plan = Plan {
            config: self.config.clone(),
            volume: self.volume.clone(),
            console: self.console.clone(),
            notices: Arc::clone(&self.notices),
            owner: self.handle(),
        };
        self.aside("build", move |owner| {
            // The row is this process's from the moment at which it is opened, whatever comes then.
            let mut tenure = None;
            let built = plan.build(&mut tenure);
            owner.tell(move |owner| owner.built(tenure, built));
        });
    }

    fn built(&mut self, tenure: Option<(Tenant, Epoch)>, built: anyhow::Result<Built>) {
        if let Some(tenure) = tenure {
            self.begin_tenure(tenure);
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
            let shown = self.state();
            let vm = match self.take_phase() {
                Phase::Incoming(vm) => Some(vm),
                _ => None,
            };
            self.end(vm, shown, StopReason::Failed { what });
        }
    }

    fn begin(&mut self, built: Built) -> anyhow::Result<()> {
        self.gate = built.gate;
        self.devices = built.devices;
        match self.config.start {
            StartMode::Boot => tracing::info!("the guest runs"),
            StartMode::Incoming { .. } => {
                let machine = built.vm.handle();
                self.phase = Phase::Incoming(built.vm);
                return self.await_arrival(machine);
            }
            StartMode::Restore => {
                if let Err(error) = self.devices.announce() {
                    tracing::warn!(%error, "the guest's place was not announced");
                }
            }
        }
        self.phase = Phase::Running(built.vm.run()?);
        Ok(())
    }
}

impl Plan {
    fn build(&self, tenure: &mut Option<(Tenant, Epoch)>) -> anyhow::Result<Built> {
        let mut opened = self.open_home(tenure)?;
        let gate = self.open_gate(opened.as_mut())?;
        let home = opened.as_ref().zip(gate.as_ref());
        let mut builder = self.builder()?;
        let devices = devices::add(&mut builder, &self.config, home)?;
        let vm = match self.config.start {
            StartMode::Boot => builder.boot(images::open(&self.config.boot, opened.as_ref())?)?,
            StartMode::Incoming { .. } => builder.incoming()?,
            StartMode::Restore => {
                let mut vm = builder.incoming()?;
                restore_saved(&self.config, *tenure, &mut vm, opened.as_ref())?;
                vm
            }
        };
        Ok(Built { vm, gate, devices })
    }

    fn open_home(&self, tenure: &mut Option<(Tenant, Epoch)>) -> anyhow::Result<Option<Opened>> {
        let (Some(volume), Some(home)) = (&self.volume, &self.config.home) else {
            return Ok(None);
        };
        if let StartMode::Incoming { .. } = self.config.start {
            return volume.peek().map(Some);
        }
        let opened = volume.open(home.owner, home.epoch)?;
        *tenure = Some((home.owner, home.epoch));
        Ok(Some(opened))
    }

    /// The home volume's gate, and the thread that watches it.
    fn open_gate(&self, opened: Option<&mut Opened>) -> anyhow::Result<Option<Arc<VolumeGate>>> {
        let (Some(opened), Some(volume), Some(home)) = (opened, &self.volume, &self.config.home)
        else {
            return Ok(None);
        };
        let gate = Arc::new(VolumeGate::new(Arc::new(opened.take_gate()?), home.owner));
        tenure::watch(Arc::clone(&gate), Arc::clone(volume), self.owner.clone())
            .context("watch the gate")?;
        Ok(Some(gate))
    }

    fn builder(&self) -> anyhow::Result<VmBuilder> {
        let (notices, owner) = (Arc::clone(&self.notices), self.owner.clone());
        let on_stop = move |reason| {
            lock(&notices).stop.get_or_insert(reason);
            owner.look();
        };
        let (notices, owner) = (Arc::clone(&self.notices), self.owner.clone());
        let on_disk_failure = move |failure| {
            lock(&notices).disk_failures.push(failure);
            owner.look();
        };
        let cpus = u32::from(self.config.cpus);
        let console = self.console.clone();
        let builder = VmBuilder::new(cpus, self.config.memory, console, on_stop)?;
        Ok(builder.with_disk_failures(on_disk_failure))
    }
}
