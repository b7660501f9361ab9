//! A guest moves between two machines of this process, over TLS on the loopback, under a volume
//! that is a value. Processes that die are in the end-to-end tests.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bascule_ipc::vm::{MigrationLimits, MigrationPhase, MigrationStatus};
use bascule_migrate::RowSeen;
use bascule_migrate::commit::{Question, Reply};
use bascule_migrate::wire::AbortReason;
use bascule_types::{AttemptId, Bytes, Epoch, Generation, NodeUid, Owner, SlotId, VmUid, VolumeId};

use super::fault::{FaultAction, FaultPoint, Faults};
use super::*;
use crate::testing::{COUNTER, TestVm, elf, kvm_or_skip};
use crate::{BootSource, MachineHandle, MachineState, PausedVm, RunningVm};

const HERE: Owner = owner(1);
const THERE: Owner = owner(2);
const VM: VmUid = VmUid::from_bytes([1; 16]);

const fn owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(1),
    }
}

/// The machine, as a process owns it.
enum Owned {
    Running(RunningVm),
    Paused(PausedVm),
    Between,
}

struct TestGuest {
    vm: Owned,
    doubted: bool,
    announced: u32,
    taken_over: Option<Epoch>,
}

impl TestGuest {
    fn new(vm: Owned) -> Self {
        Self {
            vm,
            doubted: false,
            announced: 0,
            taken_over: None,
        }
    }

    fn machine(&self) -> MachineHandle {
        match &self.vm {
            Owned::Running(vm) => vm.handle(),
            Owned::Paused(vm) => vm.handle(),
            Owned::Between => panic!("no machine"),
        }
    }

    fn is_running(&self) -> bool {
        matches!(self.vm, Owned::Running(_))
    }
}

fn failed(error: impl std::fmt::Display) -> GuestError {
    GuestError(error.to_string())
}

impl Guest for TestGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        self.vm = match std::mem::replace(&mut self.vm, Owned::Between) {
            Owned::Running(vm) => Owned::Paused(vm.pause().map_err(failed)?),
            _ => panic!("paused twice"),
        };
        Ok(())
    }

    fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        let Owned::Paused(vm) = &self.vm else {
            panic!("saved while running");
        };
        vm.save().map_err(failed)?.encode().map_err(failed)
    }

    fn resume(&mut self) -> Result<(), GuestError> {
        self.vm = match std::mem::replace(&mut self.vm, Owned::Between) {
            Owned::Paused(vm) => Owned::Running(vm.run().map_err(failed)?),
            other => other,
        };
        Ok(())
    }

    fn doubt(&mut self) -> Result<(), GuestError> {
        self.doubted = true;
        Ok(())
    }
}

impl Arrival for TestGuest {
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let Owned::Paused(vm) = &mut self.vm else {
            panic!("restored while running");
        };
        vm.restore(MachineState::decode(state).map_err(failed)?)
            .map_err(failed)
    }

    fn take_over(&mut self, _owner: Owner, epoch: Epoch) -> Result<(), GuestError> {
        self.taken_over = Some(epoch);
        Ok(())
    }

    fn announce(&mut self) {
        self.announced += 1;
    }

    fn run(&mut self) -> Result<(), GuestError> {
        assert!(self.announced > 0, "announced before the first instruction");
        self.resume()
    }
}

/// A row, and how its volume misbehaves.
struct Row {
    seen: RowSeen,
    /// Answers that get lost after they were decided.
    lost_answers: u32,
    /// Transfers to the destination are refused.
    refuse: bool,
}

#[derive(Clone)]
struct TestVolume(Arc<Mutex<Row>>);

impl TestVolume {
    fn new() -> Self {
        Self(Arc::new(Mutex::new(Row {
            seen: RowSeen {
                owner: Some(HERE),
                epoch: Epoch(4),
                attempt: None,
            },
            lost_answers: 0,
            refuse: false,
        })))
    }

    fn seen(&self) -> RowSeen {
        self.0.lock().unwrap().seen
    }
}

impl RowAuthority for TestVolume {
    fn volume(&self) -> VolumeId {
        VolumeId::from_bytes([7; 16])
    }

    fn ask(&mut self, question: &Question) -> Reply {
        let mut row = self.0.lock().unwrap();
        let (Question::Transfer(transfer) | Question::Retract(transfer)) = *question;
        let seen = row.seen;
        let done = seen.attempt == Some(transfer.attempt) && seen.epoch == transfer.epoch.next();
        let fits = seen.owner == Some(transfer.from) && seen.epoch == transfer.epoch;
        let allowed = !(row.refuse && transfer.to != transfer.from);
        if !done && fits && allowed {
            row.seen = RowSeen {
                owner: Some(transfer.to),
                epoch: transfer.epoch.next(),
                attempt: Some(transfer.attempt),
            };
        }
        if row.lost_answers > 0 {
            row.lost_answers -= 1;
            return Reply::NoAnswer;
        }
        if done || (fits && allowed) {
            Reply::Granted(row.seen)
        } else {
            Reply::Refused(row.seen)
        }
    }

    fn row(&mut self) -> RowAnswer {
        RowAnswer::Row(self.seen())
    }
}

fn certificates() -> tempfile::TempDir {
    let directory = tempfile::tempdir().unwrap();
    let (authority, _) = bascule_pki::Authority::create("test").unwrap();
    let node = authority.issue_node(NodeUid::random()).unwrap();
    for (name, text) in [
        ("node.crt", node.certificate_pem.as_str()),
        ("node.key", node.key_pem.as_str()),
        ("ca.crt", authority.certificate_pem()),
    ] {
        std::fs::write(directory.path().join(name), text).unwrap();
    }
    directory
}

const LIMITS: MigrationLimits = MigrationLimits {
    // An interpreted guest on a busy machine.
    downtime_ms_max: 2_000,
    total_ms_max: 60_000,
    bytes_per_second_max: None,
};

/// One attempt, with both sides' orders.
struct Move {
    outgoing: Outgoing,
    incoming: Incoming,
    volume: TestVolume,
    source_control: Arc<MigrationControl>,
    destination_control: Arc<MigrationControl>,
    _tls: tempfile::TempDir,
}

impl Move {
    fn new() -> Self {
        let tls = certificates();
        let attempt = AttemptId::random();
        let description = b"test".to_vec();
        Self {
            outgoing: Outgoing {
                vm: VM,
                attempt,
                peer: SocketAddr::from(([127, 0, 0, 1], 0)),
                from: HERE,
                epoch: Epoch(4),
                to: THERE,
                limits: LIMITS,
                tls_dir: tls.path().to_owned(),
                cpus: 1,
                description: description.clone(),
                faults: Faults::NONE,
            },
            incoming: Incoming {
                vm: VM,
                attempt,
                owner: THERE,
                tls_dir: tls.path().to_owned(),
                cpus: 1,
                description,
                patience: Duration::from_secs(20),
                faults: Faults::NONE,
            },
            volume: TestVolume::new(),
            source_control: Arc::new(MigrationControl::new(attempt)),
            destination_control: Arc::new(MigrationControl::new(attempt)),
            _tls: tls,
        }
    }

    /// Starts the destination and points the source at it.
    fn listen(&mut self, mut arrival: TestGuest) -> JoinHandle<(IncomingEnd, TestGuest)> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        self.outgoing.peer = listener.local_addr().unwrap();
        let (job, mut volume) = (self.incoming.clone(), self.volume.clone());
        let control = Arc::clone(&self.destination_control);
        spawn("destination", move || {
            let machine = arrival.machine();
            let end = receive_live(
                &listener,
                &mut arrival,
                &machine,
                &job,
                &mut volume,
                &control,
            );
            (end, arrival)
        })
    }

    fn send(&self, guest: &mut TestGuest) -> OutgoingEnd {
        let machine = guest.machine();
        let mut volume = self.volume.clone();
        let control = &self.source_control;
        migrate_live(guest, machine, &self.outgoing, &mut volume, control)
    }

    fn status(&self) -> MigrationStatus {
        self.source_control.status()
    }
}

fn spawn<T: Send + 'static>(name: &str, run: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(run)
        .unwrap()
}

fn source() -> (TestGuest, TestVm) {
    let (builder, test) = TestVm::builder(1);
    let source = BootSource {
        kernel: elf(COUNTER),
        initrd: None,
        cmdline: String::new(),
    };
    let vm = builder.boot(source).unwrap().run().unwrap();
    test.await_output(20);
    (TestGuest::new(Owned::Running(vm)), test)
}

fn destination() -> (TestGuest, TestVm) {
    let (builder, test) = TestVm::builder(1);
    let vm = builder.incoming().unwrap();
    (TestGuest::new(Owned::Paused(vm)), test)
}

/// The counter's letters go on in order, from `before` through `after`.
fn assert_uninterrupted(before: &[u8], after: &[u8]) {
    let all: Vec<u8> = before.iter().chain(after).copied().collect();
    for pair in all.windows(2) {
        let next = if pair[0] == b'p' { b'a' } else { pair[0] + 1 };
        assert_eq!(pair[1], next, "{}", String::from_utf8_lossy(&all));
    }
}

fn assert_goes_on(guest: &TestGuest, test: &TestVm) {
    assert!(guest.is_running());
    let now = test.console.recent().len();
    test.await_output(now + 20);
}

#[test]
fn i2_a_guest_moves_and_goes_on_where_it_was() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let ((mut here, here_test), (there, there_test)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    assert_eq!(end, OutgoingEnd::Departed { epoch: Epoch(5) });
    let (arrived, there) = arrives.join().unwrap();
    assert_eq!(
        arrived,
        IncomingEnd::Running {
            owner: THERE,
            epoch: Epoch(5)
        }
    );
    assert!(!here.is_running());
    assert!(here.doubted);
    assert_eq!(there.taken_over, Some(Epoch(5)));
    assert_goes_on(&there, &there_test);
    assert_uninterrupted(&here_test.console.recent(), &there_test.console.recent());
    let status = order.status();
    assert_eq!(status.phase, MigrationPhase::Completed);
    assert!(status.downtime_ms.is_some(), "{status:?}");
    assert!(status.bytes > Bytes(4096), "{status:?}");
    println!("{status:?}");
}

#[test]
fn i5_a_destination_that_fails_at_any_point_before_ready_leaves_the_guest_unharmed() {
    if !kvm_or_skip() {
        return;
    }
    let (mut here, here_test) = source();
    for point in [
        FaultPoint::DestinationMemory,
        FaultPoint::DestinationRound,
        FaultPoint::DestinationState,
        FaultPoint::DestinationRestored,
    ] {
        let mut order = Move::new();
        order.incoming.faults = Faults::at(point, FaultAction::Fail);
        let arrives = order.listen(destination().0);
        let end = order.send(&mut here);
        assert!(
            matches!(end, OutgoingEnd::Kept { tenure: None, .. }),
            "{point:?}: {end:?}"
        );
        let (arrived, _) = arrives.join().unwrap();
        assert!(
            matches!(arrived, IncomingEnd::Discarded { .. }),
            "{point:?}: {arrived:?}"
        );
        assert_eq!(order.volume.seen().owner, Some(HERE), "{point:?}");
        assert_goes_on(&here, &here_test);
        assert_eq!(order.status().phase, MigrationPhase::Failed);
    }
    assert_uninterrupted(&here_test.console.recent(), &[]);
    let mut order = Move::new();
    let (there, there_test) = destination();
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    assert!(
        matches!(end, OutgoingEnd::Departed { .. }),
        "and then it moves: {end:?}"
    );
    let (_, there) = arrives.join().unwrap();
    assert_goes_on(&there, &there_test);
}

#[test]
fn i5_a_source_that_fails_with_the_guest_stopped_resumes_it_at_once() {
    if !kvm_or_skip() {
        return;
    }
    let (mut here, here_test) = source();
    for point in [FaultPoint::SourceStopped, FaultPoint::SourceReady] {
        let mut order = Move::new();
        order.outgoing.faults = Faults::at(point, FaultAction::Fail);
        let arrives = order.listen(destination().0);
        let end = order.send(&mut here);
        assert!(matches!(end, OutgoingEnd::Kept { .. }), "{end:?}");
        let (arrived, _) = arrives.join().unwrap();
        assert!(
            matches!(arrived, IncomingEnd::Discarded { .. }),
            "{arrived:?}"
        );
        assert_goes_on(&here, &here_test);
    }
    assert_uninterrupted(&here_test.console.recent(), &[]);
}

#[test]
fn i2_a_stream_lost_at_ready_is_settled_by_the_row() {
    if !kvm_or_skip() {
        return;
    }
    // The destination's stream breaks right after `Ready` went out: either the source saw it and
    // commits, or it did not and keeps the guest. Never both, never neither.
    let mut order = Move::new();
    order.incoming.patience = Duration::from_secs(3);
    order.incoming.faults = Faults::at(FaultPoint::DestinationReady, FaultAction::Fail);
    let ((mut here, _), (there, there_test)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    let (arrived, there) = arrives.join().unwrap();
    match (&end, &arrived) {
        (OutgoingEnd::Departed { .. }, IncomingEnd::Running { .. }) => {
            assert!(!here.is_running());
            assert_goes_on(&there, &there_test);
        }
        (OutgoingEnd::Kept { .. }, IncomingEnd::Discarded { .. }) => assert!(here.is_running()),
        _ => panic!("{end:?}, {arrived:?}"),
    }
}

#[test]
fn i2_a_source_that_vanishes_after_the_commit_is_succeeded_by_the_row() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    order.outgoing.faults = Faults::at(FaultPoint::SourceCommitted, FaultAction::Fail);
    let ((mut here, _), (there, there_test)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    assert!(matches!(end, OutgoingEnd::Departed { .. }), "{end:?}");
    let (arrived, there) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Running { .. }),
        "{arrived:?}"
    );
    assert_goes_on(&there, &there_test);
}

#[test]
fn i2_lost_answers_to_the_commit_are_asked_for_until_they_come() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    order.volume.0.lock().unwrap().lost_answers = 3;
    let ((mut here, _), (there, there_test)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    assert_eq!(end, OutgoingEnd::Departed { epoch: Epoch(5) });
    let (_, there) = arrives.join().unwrap();
    assert_goes_on(&there, &there_test);
    assert!(!here.is_running());
}

#[test]
fn i5_a_refused_transfer_is_retracted_and_the_guest_runs_on_in_a_new_epoch() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    order.volume.0.lock().unwrap().refuse = true;
    let ((mut here, here_test), (there, _)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    let OutgoingEnd::Kept { failure, tenure } = end else {
        panic!("{end:?}");
    };
    assert_eq!(failure.reason, AbortReason::CommitRefused);
    assert_eq!(tenure, Some((HERE, Epoch(5))));
    assert_eq!(order.volume.seen().epoch, Epoch(5));
    assert_goes_on(&here, &here_test);
    assert_uninterrupted(&here_test.console.recent(), &[]);
    let (arrived, _) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Discarded { .. }),
        "{arrived:?}"
    );
}

#[test]
fn a_cancelled_migration_leaves_the_guest_where_it_was() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    // Slow enough to be caught in the first round.
    order.outgoing.limits.bytes_per_second_max = Some(4096);
    let ((mut here, here_test), (there, _)) = (source(), destination());
    let arrives = order.listen(there);
    let control = Arc::clone(&order.source_control);
    let canceller = spawn("canceller", move || {
        let deadline = Instant::now() + Duration::from_secs(20);
        while control.status().phase != MigrationPhase::PreCopy {
            assert!(Instant::now() < deadline, "{:?}", control.status());
            std::thread::yield_now();
        }
        control.cancel()
    });
    let end = order.send(&mut here);
    assert!(canceller.join().unwrap(), "it could be cancelled");
    let OutgoingEnd::Kept { failure, .. } = end else {
        panic!("{end:?}");
    };
    assert_eq!(failure.reason, AbortReason::Cancelled);
    assert_eq!(order.status().phase, MigrationPhase::Cancelled);
    assert_goes_on(&here, &here_test);
    let (arrived, _) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Discarded { .. }),
        "{arrived:?}"
    );
    assert!(!order.source_control.cancel(), "it is over");
}

#[test]
fn a_peer_that_speaks_garbage_or_has_no_certificate_of_the_cluster_is_turned_away() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let ((mut here, here_test), (there, _)) = (source(), destination());
    let arrives = order.listen(there);
    for garbage in [[0xFF; 512].as_slice(), b"\x16\x03\x01\x02\x00"] {
        let mut peer = std::net::TcpStream::connect(order.outgoing.peer).unwrap();
        std::io::Write::write_all(&mut peer, garbage).unwrap();
    }
    let foreign = certificates();
    order.outgoing.tls_dir = foreign.path().to_owned();
    let end = order.send(&mut here);
    let OutgoingEnd::Kept { failure, .. } = end else {
        panic!("{end:?}");
    };
    assert!(failure.text.contains("TLS"), "{}", failure.text);
    assert_goes_on(&here, &here_test);
    assert!(order.destination_control.cancel(), "it still waits");
    let (arrived, _) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Discarded { .. }),
        "{arrived:?}"
    );
}

#[test]
fn another_attempt_and_another_machine_are_turned_away_and_the_right_one_still_comes() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let ((mut here, here_test), (there, there_test)) = (source(), destination());
    let arrives = order.listen(there);
    let right = order.outgoing.clone();
    for (change, reason) in [
        (
            Outgoing {
                attempt: AttemptId::random(),
                ..right.clone()
            },
            AbortReason::WrongAttempt,
        ),
        (
            Outgoing {
                description: b"another".to_vec(),
                ..right.clone()
            },
            AbortReason::MachineDiffers,
        ),
        (
            Outgoing {
                cpus: 2,
                ..right.clone()
            },
            AbortReason::MachineDiffers,
        ),
    ] {
        order.outgoing = change;
        let end = order.send(&mut here);
        let OutgoingEnd::Kept { failure, .. } = end else {
            panic!("{end:?}");
        };
        assert_eq!(failure.reason, reason, "{}", failure.text);
        assert_goes_on(&here, &here_test);
    }
    order.outgoing = right;
    let end = order.send(&mut here);
    assert!(matches!(end, OutgoingEnd::Departed { .. }), "{end:?}");
    let (_, there) = arrives.join().unwrap();
    assert_goes_on(&there, &there_test);
}

#[test]
fn a_missing_certificate_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = tls::client(directory.path()).unwrap_err();
    let text = order::chain(&error);
    assert!(text.contains("node.crt"), "{text}");
    assert!(!Path::new("node.crt").exists());
}
