//! What `vm.sock` asks, and giving the row up at the end.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bascule_ipc::vm::{Request, Response, StopReason};
use bascule_ipc::volume::Response as VolumeResponse;
use bascule_types::{Epoch, Owner as Tenant, VmUid};
use bascule_volume_format::change::Change;

use super::{Owner, Phase};
use crate::MachineHandle;
use crate::process::volume::VolumeClient;

/// How often a release is asked for while the owner waits, and then in the background.
const RELEASE_ATTEMPTS: u32 = 2;
/// Pause between two attempts in the background.
const RELEASE_PAUSE: Duration = Duration::from_secs(1);
/// What is read from a terminal at once.
const TERMINAL_BYTES: usize = 1024;

impl Owner {
    /// Answers one request.
    pub(crate) fn request(&mut self, request: &Request) -> (Response, Vec<OwnedFd>) {
        let done = match *request {
            Request::Status => return (Response::Status(Box::new(self.status())), Vec::new()),
            Request::Console => {
                return match self.attach_console() {
                    Ok(theirs) => (Response::Accepted, vec![theirs]),
                    Err(error) => (refused(&error), Vec::new()),
                };
            }
            Request::PowerButton => self.press_power_button(),
            Request::Stop => self.stop_requested(),
            Request::Pause => self.pause_requested(),
            Request::Resume => self.resume_requested(),
            Request::Announce => self.announce(),
            Request::Exit => self.may_exit(),
            Request::MigrateLive {
                attempt,
                peer,
                to,
                limits,
            } => self.migrate_live(attempt, (peer, to), limits),
            Request::CancelMigration { attempt } => self.cancel_migration(attempt),
            Request::MigrateQuick { attempt, to } => self.migrate_quick(attempt, to),
        };
        let response = done.map_or_else(|error| refused(&error), |()| Response::Accepted);
        (response, Vec::new())
    }

    fn press_power_button(&self) -> anyhow::Result<()> {
        let machine = self.running()?;
        machine.press_power_button().context("raise the interrupt")
    }

    fn announce(&self) -> anyhow::Result<()> {
        self.running()?;
        self.devices.announce().context("announce")
    }

    fn running(&self) -> anyhow::Result<MachineHandle> {
        match &self.phase {
            Phase::Running(vm) => Ok(vm.handle()),
            _ => anyhow::bail!("the guest is {}", self.phase_name()),
        }
    }

    fn stop_requested(&mut self) -> anyhow::Result<()> {
        if let Phase::InDoubt(_) | Phase::Departed = self.phase {
            anyhow::bail!("the guest is {}", self.phase_name());
        }
        self.stop(StopReason::Requested);
        Ok(())
    }

    /// A migration pauses and resumes by itself.
    fn pause_requested(&mut self) -> anyhow::Result<()> {
        self.no_migration()?;
        self.pause()
    }

    /// Only a guest that was paused on request: the others go on by their migration's outcome.
    fn resume_requested(&mut self) -> anyhow::Result<()> {
        self.no_migration()?;
        if !matches!(self.phase, Phase::Paused(_)) {
            anyhow::bail!("the guest is {}", self.phase_name());
        }
        self.resume()
    }

    /// [`Owner::exit`] follows when the asker has its answer.
    fn may_exit(&mut self) -> anyhow::Result<()> {
        match self.phase {
            Phase::Stopped(_) | Phase::Departed => {}
            // Never ran here: nothing is lost.
            Phase::Incoming(_) => self.stop(StopReason::Requested),
            _ => anyhow::bail!("the guest is {}", self.phase_name()),
        }
        Ok(())
    }

    /// One end of a new stream to the serial console; a thread of its own reads what is typed.
    fn attach_console(&self) -> anyhow::Result<OwnedFd> {
        let machine = self.machine().context("there is no guest")?;
        let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
        let reader = ours.try_clone().context("clone a socket")?;
        self.console.attach(ours);
        std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || type_from(reader, &machine))
            .context("start a thread")?;
        Ok(theirs.into())
    }

    /// Tells the volume that this tenure's writes are over, and gives the row up.
    pub(super) fn release(&mut self) {
        let (Some(volume), Some((owner, epoch))) = (self.volume.clone(), self.tenure.take()) else {
            return;
        };
        let vm = self.config.uid;
        if (0..RELEASE_ATTEMPTS).any(|_| try_release(&volume, vm, owner, epoch)) {
            return;
        }
        tracing::warn!("the volume does not answer: releasing the row in the background");
        let spawned = std::thread::Builder::new()
            .name("release".to_owned())
            .spawn(move || {
                while !try_release(&volume, vm, owner, epoch) {
                    std::thread::sleep(RELEASE_PAUSE);
                }
            });
        if let Err(error) = spawned {
            tracing::error!(%error, "the row stays owned: no thread to release it");
        }
    }
}

/// One attempt; `true` when it is settled, one way or the other.
fn try_release(volume: &Arc<VolumeClient>, vm: VmUid, from: Tenant, epoch: Epoch) -> bool {
    let released = volume.close(from, epoch).and_then(|()| {
        volume
            .change(Change::Release { vm, from, epoch })
            .context("release the row")
    });
    match released {
        Ok(VolumeResponse::Granted(_)) => true,
        Ok(VolumeResponse::Refused(refusal)) => {
            tracing::warn!(%refusal, "release");
            true
        }
        Ok(other) => {
            tracing::info!(?other, "release not answered yet");
            false
        }
        Err(error) => {
            tracing::info!(
                error = format_args!("{error:#}"),
                "release not answered yet"
            );
            false
        }
    }
}

/// Passes on what is typed until the terminal is closed.
fn type_from(mut terminal: UnixStream, machine: &MachineHandle) {
    let mut typed = [0; TERMINAL_BYTES];
    while let Ok(count @ 1..) = std::io::Read::read(&mut terminal, &mut typed) {
        machine.type_in(typed.get(..count).unwrap_or_default());
    }
}

fn refused(error: &anyhow::Error) -> Response {
    Response::Refused {
        reason: format!("{error:#}"),
    }
}
