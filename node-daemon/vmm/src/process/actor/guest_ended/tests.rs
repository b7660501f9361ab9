//! A guest used to be executed past a power-off that it requested in the last moments before a pause: it
//! then span at the destination of its migration, shown as running. Each way to end by itself, in each
//! phase in which it can be noticed.

use std::path::PathBuf;
use std::sync::mpsc::Receiver;

use bascule_ipc::vm::{Boot, ImageSource, Request, Response, StartMode, VmConfig, VmState};
use bascule_types::{Bytes, Epoch, Generation, Owner, Ownership, SlotId, VmUid};

use super::*;
use crate::process::actor::event::{Answer, Done, Event, HostShutdown, TaskOutcome};
use crate::process::run_dir::RunDir;
use crate::testing::{COUNTER, POWER_OFF, RESET, TRIPLE_FAULT, TestVm, kvm_or_skip};

struct Process {
    actor: VmActor,
    inbox: Receiver<Event>,
    _folder: tempfile::TempDir,
}

fn config() -> VmConfig {
    VmConfig {
        version: VmConfig::VERSION,
        uid: VmUid::random(),
        name: "shop/web".to_owned(),
        cpus: 1,
        memory: Bytes::mib(16),
        boot: Boot {
            kernel: ImageSource::File {
                path: PathBuf::new(),
            },
            initrd: None,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        interfaces: Vec::new(),
        home: None,
        start: StartMode::Boot,
        tls_dir: None,
        shutdown_timeout_ms: None,
    }
}

fn fault(what: &str) -> StopReason {
    StopReason::GuestFault { what: what.into() }
}

/// Every way to end that no thread of the machine has reported yet.
fn ends() -> Vec<StopReason> {
    let panicked = "blk0: device thread panicked".to_owned();
    vec![
        StopReason::GuestShutdown,
        StopReason::GuestReset,
        fault("triple fault"),
        fault("the guest reported a crash"),
        fault("net0: bad virtqueue 0"),
        StopReason::Failed { what: panicked },
    ]
}

impl Process {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let run_dir = RunDir::of(&folder.path().join("config.json"));
        let (actor, inbox) = VmActor::new(config(), run_dir).unwrap();
        Self {
            actor,
            inbox,
            _folder: folder,
        }
    }

    fn running(code: &[u8]) -> (Self, TestVm) {
        let mut process = Self::new();
        let (vm, test) = TestVm::with(code);
        process.actor.phase = Phase::Running(vm.run().unwrap());
        (process, test)
    }

    fn paused() -> Self {
        let mut process = Self::new();
        process.actor.phase = Phase::Paused(TestVm::with(COUNTER).0);
        process
    }

    fn notice(&self, reason: StopReason) {
        lock(&self.actor.notices).stop = Some(reason);
    }

    fn pause(&mut self) -> Done {
        match self.actor.control_request(&Request::Pause) {
            Answer::When(done) => done,
            Answer::Now(response, _) => panic!("{response:?}"),
        }
    }

    fn next_task(&self) -> TaskOutcome {
        match self.inbox.recv().unwrap() {
            Event::Task(outcome) => outcome,
            other => panic!("{other:?}"),
        }
    }

    /// The vCPUs park: what the actor does then.
    fn park(&mut self) {
        self.actor.process_notices();
        match self.next_task() {
            TaskOutcome::Parked(paused) => self.actor.parked(paused),
            _ => panic!("the vCPUs do not park"),
        }
        self.actor.process_notices();
    }

    fn ended(&mut self) -> StopReason {
        assert_eq!(self.actor.phase.name(), "being stopped");
        match self.next_task() {
            TaskOutcome::Ended(reason) => reason,
            _ => panic!("the machine does not end"),
        }
    }
}

#[test]
fn a_guest_that_ends_while_it_is_being_paused_ends_and_is_not_paused() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        let done = process.pause();
        process.notice(reason.clone());
        process.park();
        assert_eq!(done.recv().unwrap(), Err(ended_text(&reason)), "{reason:?}");
        assert_eq!(process.ended(), reason);
    }
    // The control.
    let (mut process, _test) = Process::running(COUNTER);
    let done = process.pause();
    process.park();
    assert_eq!(done.recv().unwrap(), Ok(()));
    assert_eq!(process.actor.phase.state(), VmState::Paused);
}

#[test]
fn what_a_guest_did_before_the_pause_was_requested_is_not_lost_either() {
    if !kvm_or_skip() {
        return;
    }
    for code in [POWER_OFF, RESET, TRIPLE_FAULT] {
        let (mut process, test) = Process::running(code);
        let reason = test.await_stop();
        process.notice(reason.clone());
        let done = process.pause();
        process.park();
        assert_eq!(done.recv().unwrap(), Err(ended_text(&reason)));
        assert_eq!(process.ended(), reason);
    }
}

#[test]
fn a_running_or_paused_guest_that_ends_by_itself_is_ended() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        process.notice(reason.clone());
        process.park();
        assert_eq!(process.ended(), reason);

        let mut process = Process::paused();
        process.notice(reason.clone());
        process.actor.process_notices();
        assert_eq!(process.ended(), reason);
    }
}

/// The commit request of a migration, live or quick: the destination would run past the end.
#[test]
fn i2_a_guest_that_has_ended_is_not_put_in_doubt_and_does_not_run_on() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let mut process = Process::paused();
        process.notice(reason.clone());
        let refused = process.actor.mark_in_doubt().unwrap_err();
        assert_eq!(refused.to_string(), ended_text(&reason));
        assert_eq!(process.actor.phase.state(), VmState::Paused);
        let refused = process.actor.resume().unwrap_err();
        assert_eq!(refused.to_string(), ended_text(&reason));
        process.actor.process_notices();
        assert_eq!(process.ended(), reason);
    }
    // The control.
    let mut process = Process::paused();
    process.actor.mark_in_doubt().unwrap();
    process.actor.resume().unwrap();
    assert_eq!(process.actor.phase.state(), VmState::Running);
}

/// It used to run on, and its ownership in the new epoch was released by nobody.
#[test]
fn a_guest_that_ended_in_doubt_ends_in_the_ownership_that_the_attempt_has_begun() {
    if !kvm_or_skip() {
        return;
    }
    let owner = Owner {
        slot: SlotId(1),
        generation: Generation(1),
    };
    let mut process = Process::paused();
    process
        .actor
        .begin_ownership(Ownership::new(owner, Epoch(4)));
    process.actor.mark_in_doubt().unwrap();
    let reason = StopReason::Failed {
        what: "net0: the tap is gone".to_owned(),
    };
    process.notice(reason.clone());
    process.actor.process_notices();
    assert_eq!(process.actor.phase.state(), VmState::InDoubt);
    let retracted = Some(Ownership::new(owner, Epoch(5)));
    let refused = process.actor.resume_source(retracted).unwrap_err();
    assert_eq!(refused.to_string(), ended_text(&reason));
    assert_eq!(process.actor.ownership, retracted);
    process.actor.process_notices();
    assert_eq!(process.actor.status().epoch, Epoch(5));
    assert_eq!(process.ended(), reason);
}

#[test]
fn an_incoming_machine_that_fails_ends_before_it_could_arrive() {
    if !kvm_or_skip() {
        return;
    }
    let mut process = Process::new();
    let vm = TestVm::builder(1).0.incoming().unwrap();
    process.actor.phase = Phase::Incoming(vm);
    let what = "net0: the tap is gone".to_owned();
    let reason = StopReason::Failed { what };
    process.notice(reason.clone());
    assert!(process.actor.resume().is_err());
    process.actor.process_notices();
    assert_eq!(process.ended(), reason);
}

#[test]
fn a_requested_stop_comes_before_what_the_guest_did_meanwhile() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        let done = process.pause();
        drop(process.actor.stop(StopReason::Requested));
        process.notice(reason);
        process.park();
        let refused = Err(ended_text(&StopReason::Requested));
        assert_eq!(done.recv().unwrap(), refused);
        assert_eq!(process.ended(), StopReason::Requested);
    }
}

#[test]
fn a_guest_that_follows_the_hosts_shutdown_while_it_is_being_paused_has_stopped_on_request() {
    if !kvm_or_skip() {
        return;
    }
    for reason in ends() {
        let (mut process, _test) = Process::running(COUNTER);
        process.actor.host_shuts_down(HostShutdown::Requested);
        let done = process.pause();
        process.notice(reason.clone());
        process.park();
        assert!(done.recv().unwrap().is_err());
        let follows = matches!(reason, StopReason::GuestShutdown | StopReason::GuestReset);
        let expected = if follows {
            StopReason::Requested
        } else {
            reason
        };
        assert_eq!(process.ended(), expected);
    }
}

#[test]
fn a_request_that_comes_after_the_end_is_refused_with_the_reason() {
    if !kvm_or_skip() {
        return;
    }
    let mut process = Process::paused();
    process.notice(StopReason::GuestShutdown);
    let Answer::Now(Response::Refused { reason }, _) =
        process.actor.control_request(&Request::Resume)
    else {
        panic!("the guest was executed past its end");
    };
    assert_eq!(reason, "the guest has shut itself down");
}
