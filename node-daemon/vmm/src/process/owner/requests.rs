//! What `vm.sock` asks.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use anyhow::Context as _;
use bascule_ipc::vm::{Request, Response, StopReason};

use super::{Done, Owner, Phase};
use crate::MachineHandle;

/// What is read from a terminal at once.
const TERMINAL_BYTES: usize = 1024;

/// What a request is answered with.
pub(crate) enum Answer {
    /// This, with file descriptors.
    Now(Response, Vec<OwnedFd>),
    /// [`Response::Accepted`], or why it failed, when it is done.
    When(Done),
}

impl Owner {
    /// Answers one request, or says what its answer waits for.
    pub(crate) fn request(&mut self, request: &Request) -> Answer {
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

    /// Answers what is done at once.
    fn answer(&mut self, request: &Request) -> Answer {
        let done = match *request {
            Request::Status => {
                let status = Response::Status(Box::new(self.status()));
                return Answer::Now(status, Vec::new());
            }
            Request::WaitsFor => {
                return Answer::Now(Response::WaitsFor(self.waits_for()), Vec::new());
            }
            Request::Console => {
                return match self.attach_console() {
                    Ok(theirs) => Answer::Now(Response::Accepted, vec![theirs]),
                    Err(error) => Answer::Now(refused(&error), Vec::new()),
                };
            }
            Request::PowerButton => self.press_power_button(),
            Request::Resume => self.resume_requested(),
            Request::Announce => self.announce(),
            // Not answered here, but by `request`.
            Request::Stop | Request::Pause | Request::Exit => Ok(()),
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
        Answer::Now(response, Vec::new())
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
            _ => anyhow::bail!(self.refusal()),
        }
    }

    fn stop_requested(&mut self) -> anyhow::Result<Done> {
        if let Phase::InDoubt(_) | Phase::Departed = self.phase {
            anyhow::bail!(self.refusal());
        }
        Ok(self.stop(StopReason::Requested))
    }

    /// A migration pauses and resumes by itself.
    fn pause_requested(&mut self) -> anyhow::Result<Done> {
        self.no_migration()?;
        self.pause()
    }

    /// Only a guest that was paused on request: the others go on by their migration's outcome.
    fn resume_requested(&mut self) -> anyhow::Result<()> {
        self.no_migration()?;
        if !matches!(self.phase, Phase::Paused(_)) {
            anyhow::bail!(self.refusal());
        }
        self.resume()
    }

    /// [`Owner::exit`] follows when the asker has its answer.
    fn may_exit(&mut self) -> anyhow::Result<Done> {
        match self.phase {
            // One that is coming in never ran here: nothing is lost.
            Phase::Stopped(_) | Phase::Departed | Phase::Incoming(_) => {
                Ok(self.stop(StopReason::Requested))
            }
            _ => anyhow::bail!(self.refusal()),
        }
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
