//! Requests on `vm.sock`, applied by the actor.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::Context as _;
use bascule_ipc::vm::{Request, Response, StopReason};

use super::event::{Answer, Done};
use super::phase::Phase;
use super::vm_actor::{PauseFor, VmActor};
use crate::MachineHandle;

/// Most input that is read from a console client at once.
const TERMINAL_BYTES: usize = 1024;

impl VmActor {
    /// Applies one request. Where the change takes time, the answer waits for it.
    pub(super) fn control_request(&mut self, request: &Request) -> Answer {
        let begun = match request {
            Request::Stop => self.stop_requested(),
            Request::Pause => self.pause_requested(),
            Request::Exit => self.may_exit(),
            other => return self.answer(other),
        };
        match begun {
            Ok(done) => Answer::When(done),
            Err(error) => Answer::Now(refused(&error), Vec::new()),
        }
    }

    /// Applies a request that is done at once.
    fn answer(&mut self, request: &Request) -> Answer {
        let done = match request {
            Request::Status => {
                let status = Response::Status(Box::new(self.status()));
                return Answer::Now(status, Vec::new());
            }
            Request::WaitsFor => {
                return Answer::Now(Response::WaitsFor(self.waits_for()), Vec::new());
            }
            Request::Console | Request::ConsoleFrom { .. } => {
                return match self.open_console(request) {
                    Ok((response, theirs)) => Answer::Now(response, vec![theirs]),
                    Err(error) => Answer::Now(refused(&error), Vec::new()),
                };
            }
            Request::PowerButton => self.shut_down_guest(),
            Request::Reset => self.reset_requested(),
            Request::Resume => self.resume_requested(),
            Request::ReportDiskErrors { disk } => self.report_disk_errors(disk),
            Request::Announce => self.announce(),
            // Applied by `control_request`.
            Request::Stop | Request::Pause | Request::Exit => Ok(()),
            Request::MigrateLive {
                attempt,
                peer,
                to,
                limits,
            } => self.migrate_live(*attempt, (*peer, *to), *limits),
            Request::CancelMigration { attempt } => self.cancel_migration(*attempt),
            Request::MigrateQuick { attempt, to } => self.migrate_quick(*attempt, *to),
        };
        let response = done.map_or_else(|error| refused(&error), |()| Response::Accepted);
        Answer::Now(response, Vec::new())
    }

    /// Has the guest shut itself down: by its agent, or by the power button when that does not obey.
    pub(super) fn shut_down_guest(&self) -> anyhow::Result<()> {
        self.running()?;
        match &self.devices.agent {
            Some(agent) if agent.shut_down() => Ok(()),
            _ => self.press_power_button(),
        }
    }

    pub(super) fn press_power_button(&self) -> anyhow::Result<()> {
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
            _ => anyhow::bail!(self.refusal()),
        }
    }

    fn stop_requested(&mut self) -> anyhow::Result<Done> {
        if let Phase::InDoubt(_) | Phase::Departed = self.phase {
            anyhow::bail!(self.refusal());
        }
        Ok(self.stop(StopReason::Requested))
    }

    /// Refused during a migration, which pauses and resumes the guest itself.
    fn pause_requested(&mut self) -> anyhow::Result<Done> {
        self.no_migration()?;
        self.pause(PauseFor::Request)
    }

    /// Only for a guest that was paused on request. Incoming and in-doubt guests are resumed by their
    /// migration.
    fn resume_requested(&mut self) -> anyhow::Result<()> {
        self.no_migration()?;
        if !matches!(self.phase, Phase::Paused(_)) {
            anyhow::bail!(self.refusal());
        }
        self.resume()
    }

    /// The client sends [`super::event::Event::Exit`] once the reply is sent.
    fn may_exit(&mut self) -> anyhow::Result<Done> {
        match self.phase {
            // An incoming guest has never run here: nothing is lost.
            Phase::Stopped(_) | Phase::Departed | Phase::Incoming(_) => {
                Ok(self.stop(StopReason::Requested))
            }
            _ => anyhow::bail!(self.refusal()),
        }
    }

    /// One end of a new stream to the serial console; a thread passes its input to the guest.
    fn open_console(&self, request: &Request) -> anyhow::Result<(Response, OwnedFd)> {
        let machine = self.phase.machine().context("there is no guest")?;
        let (ours, theirs) = UnixStream::pair().context("make a socket pair")?;
        let reader = ours.try_clone().context("clone a socket")?;
        let response = if let Request::ConsoleFrom { from } = request {
            // The positions are those of a guest that is still to come.
            if let Phase::Incoming(_) = self.phase {
                anyhow::bail!(self.refusal());
            }
            let position = self.console.follow(ours, *from)?;
            Response::Console { position }
        } else {
            self.console.attach(ours);
            Response::Accepted
        };
        std::thread::Builder::new()
            .name("console".to_owned())
            .spawn(move || type_from(reader, &machine))
            .context("start a thread")?;
        Ok((response, theirs.into()))
    }
}

/// Passes input to the guest until the client closes its end.
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
