//! The fixture of the actor's tests.

use std::sync::mpsc::Receiver;

use bascule_ipc::vm::{Request, ResetCause, StopReason};

use super::event::{Answer, Done, Event, TaskOutcome};
use super::notices::lock;
use super::phase::Phase;
use super::vm_actor::VmActor;
use crate::GuestEnd;
use crate::process::run_dir::RunDir;
use crate::process::testing::config;
use crate::testing::{COUNTER, TestVm};

/// The actor of a process without a home volume, and its inbox. A test applies what it takes from that.
pub(super) struct Process {
    pub(super) actor: VmActor,
    pub(super) inbox: Receiver<Event>,
    _folder: tempfile::TempDir,
}

impl Process {
    pub(super) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::of(&folder.path().join("config.json"));
        let (actor, inbox) = VmActor::new(config(), run_dir).unwrap();
        Self {
            actor,
            inbox,
            _folder: folder,
        }
    }

    pub(super) fn running(code: &[u8]) -> (Self, TestVm) {
        let mut process = Self::new();
        let (vm, test) = TestVm::with(code);
        process.actor.phase = Phase::Running(vm.run().unwrap());
        (process, test)
    }

    pub(super) fn paused() -> Self {
        let mut process = Self::new();
        process.actor.phase = Phase::Paused(TestVm::with(COUNTER).0);
        process
    }

    /// A thread of the machine reports that the guest is off, or cannot go on.
    pub(super) fn notice(&self, reason: StopReason) {
        lock(&self.actor.notices).guest_ended(GuestEnd::Stopped(reason));
    }

    /// A vCPU reports that the guest has reset itself.
    pub(super) fn notice_reset(&self, cause: ResetCause) {
        lock(&self.actor.notices).guest_ended(GuestEnd::Reset(cause));
    }

    pub(super) fn pause(&mut self) -> Done {
        match self.actor.control_request(&Request::Pause) {
            Answer::When(done) => done,
            Answer::Now(response, _) => panic!("{response:?}"),
        }
    }

    pub(super) fn next_task(&self) -> TaskOutcome {
        match self.inbox.recv().unwrap() {
            Event::Task(outcome) => outcome,
            other => panic!("{other:?}"),
        }
    }

    /// The vCPUs park: what the actor does then.
    pub(super) fn park(&mut self) {
        self.actor.process_notices();
        match self.next_task() {
            TaskOutcome::Parked(paused) => self.actor.parked(paused),
            _ => panic!("the vCPUs do not park"),
        }
        self.actor.process_notices();
    }

    /// The machine is reset: what the actor does then.
    pub(super) fn finish_reset(&mut self) {
        assert_eq!(self.actor.phase.name(), "being reset");
        match self.next_task() {
            TaskOutcome::Reset(reset) => self.actor.reset_done(reset),
            _ => panic!("the machine is not reset"),
        }
        self.actor.process_notices();
    }

    pub(super) fn ended(&mut self) -> StopReason {
        assert_eq!(self.actor.phase.name(), "being stopped");
        match self.next_task() {
            TaskOutcome::Ended(reason) => reason,
            _ => panic!("the machine does not end"),
        }
    }
}
