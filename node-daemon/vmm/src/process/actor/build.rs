//! Building the machine: opening the home volume, reading kernel, initrd or saved state. Runs on a
//! task thread because it takes as long as the disk takes.

use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use bascule_devices::disk::VolumeGate;
use bascule_ipc::vm::{Panic, StartMode, VmConfig};
use bascule_types::{OnPanic, Ownership};
use kvm_ioctls::Kvm;

use super::event::{ActorHandle, Event};
use super::notices::{Notices, lock};
use super::ownership_watch;
use super::phase::BuiltMachine;
use crate::migration::{self, SavedArea};
use crate::process::home_volume::{self, NO_HOME, Opened, VolumeClient};
use crate::process::host_devices::HostDevices;
use crate::process::{boot_images, devices};
use crate::{Console, PausedVm, VmBuilder};

/// What the machine is built from.
pub(super) struct BuildPlan {
    pub(super) config: VmConfig,
    pub(super) volume: Option<Arc<VolumeClient>>,
    pub(super) console: Console,
    pub(super) notices: Arc<Mutex<Notices>>,
    pub(super) actor: ActorHandle,
}

impl BuildPlan {
    /// Builds the machine. `ownership` is set as soon as the volume is open for writing.
    pub(super) fn build(
        &self,
        host: HostDevices,
        ownership: &mut Option<Ownership>,
    ) -> anyhow::Result<BuiltMachine> {
        let mut opened = self.open_home(ownership)?;
        let gate = self.open_gate(opened.as_mut())?;
        let home = opened.as_ref().zip(gate.as_ref());
        let mut builder = self.builder(host.kvm?)?;
        let actor = self.actor.clone();
        let press_button = move || {
            if let Err(error) = actor.request(Event::PowerButton) {
                tracing::debug!(%error, "the power button is not pressed");
            }
        };
        let devices = devices::add(&mut builder, &self.config, home, host.taps, press_button)?;
        let images = boot_images::opener(&self.config.boot, opened.as_ref())?;
        let vm = match self.config.start {
            StartMode::Boot => builder.boot(images)?,
            StartMode::Incoming { .. } => builder.incoming(images)?,
            StartMode::Restore => {
                let mut vm = builder.incoming(images)?;
                self.restore_saved(*ownership, &mut vm, opened.as_ref())?;
                vm
            }
        };
        Ok(BuiltMachine { vm, gate, devices })
    }

    fn open_home(&self, ownership: &mut Option<Ownership>) -> anyhow::Result<Option<Opened>> {
        let (Some(volume), Some(home)) = (&self.volume, &self.config.home) else {
            return Ok(None);
        };
        if let StartMode::Incoming { .. } = self.config.start {
            return volume.peek().map(Some);
        }
        let mine = Ownership::new(home.owner, home.epoch);
        let opened = volume.open(mine)?;
        *ownership = Some(mine);
        Ok(Some(opened))
    }

    /// The home volume's gate; starts the thread that watches it.
    fn open_gate(&self, opened: Option<&mut Opened>) -> anyhow::Result<Option<Arc<VolumeGate>>> {
        let (Some(opened), Some(volume), Some(home)) = (opened, &self.volume, &self.config.home)
        else {
            return Ok(None);
        };
        let reader = Arc::new(opened.take_gate()?);
        let page = opened.take_writer_page()?;
        let gate = Arc::new(VolumeGate::new(reader, home.owner, page));
        ownership_watch::watch(Arc::clone(&gate), Arc::clone(volume), self.actor.clone())
            .context("watch the gate")?;
        Ok(Some(gate))
    }

    fn builder(&self, kvm: Kvm) -> anyhow::Result<VmBuilder> {
        let (notices, actor) = (Arc::clone(&self.notices), self.actor.clone());
        let on_end = move |end| {
            lock(&notices).guest_ended(end);
            actor.notify();
        };
        let (notices, actor) = (Arc::clone(&self.notices), self.actor.clone());
        let on_disk_failure = move |failure| {
            lock(&notices).disk_failures.push(failure);
            actor.notify();
        };
        let (notices, actor) = (Arc::clone(&self.notices), self.actor.clone());
        let on_panicked = on_panicked(notices, self.config.on_panic, actor);
        let cpus = u32::from(self.config.cpus);
        let console = self.console.clone();
        let builder = VmBuilder::new(kvm, cpus, self.config.memory, console, on_end)?;
        let builder = builder.with_uid(self.config.uid).with_panics(on_panicked);
        Ok(builder.with_disk_failures(on_disk_failure))
    }

    /// Restores the machine that a quick migration saved to the home volume.
    fn restore_saved(
        &self,
        ownership: Option<Ownership>,
        vm: &mut PausedVm,
        opened: Option<&Opened>,
    ) -> anyhow::Result<()> {
        let opened = opened.context(NO_HOME)?;
        let ownership = ownership.context(NO_HOME)?;
        let saved = opened.saved.as_ref();
        let saved = saved.context("start: the volume has no saved state of this VM")?;
        let area = SavedArea {
            device: Arc::clone(&opened.device),
            extents: saved.extents.clone(),
            gate: None,
        };
        let home = self.config.home.as_ref().context(NO_HOME)?;
        let mut client = home_volume::ownership_client(&home.socket, self.config.uid)
            .map_err(anyhow::Error::msg)?;
        migration::restore_saved(vm, &self.config, ownership, saved, area, &mut client)?;
        Ok(())
    }
}

/// What the thread of a vCPU does with a panic of its guest's kernel.
pub(super) fn on_panicked(
    notices: Arc<Mutex<Notices>>,
    policy: OnPanic,
    actor: ActorHandle,
) -> impl Fn(Panic) + Send + Sync {
    move |panic| {
        tracing::warn!(?panic, ?policy, "the guest's kernel has panicked");
        lock(&notices).guest_panicked(policy, panic);
        actor.notify();
    }
}
