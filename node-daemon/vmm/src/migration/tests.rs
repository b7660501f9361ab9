//! A guest moves between two machines of this process, over TLS on the loopback, under a volume
//! that is a value. Processes that die are in the end-to-end tests.

mod fixture;

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use bascule_ipc::vm::{MigrationLimits, MigrationPhase, MigrationStatus};
use bascule_migrate::commit::{Reply, TransferRequest};
use bascule_migrate::destination::Interface;
use bascule_migrate::wire::{AbortReason, Config, Features, Hello};
use bascule_migrate::{Frame, OwnershipRecord};
use bascule_types::{
    AttemptId, Bytes, Epoch, Generation, NodeUid, Owner, Ownership, SlotId, VmUid, VolumeId,
};

use self::fixture::*;
use super::apply::layout_of;
use super::channel::Channel;
use super::fault::{FaultAction, FaultPoint, Faults};
use super::*;
use crate::testing::{COUNTER, TestVm, images, kvm_or_skip};
use crate::{MachineHandle, MachineState, PausedVm, RunningVm};

#[test]
fn a_guest_moves_between_nodes_that_have_ipv6_only() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    order.outgoing.peer = "[::1]:0".parse().unwrap();
    let ((mut here, _here_test), (there, _there_test)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    assert_eq!(end, OutgoingEnd::Departed { epoch: Epoch(5) });
    let (arrived, _there) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Running { .. }),
        "{arrived:?}"
    );
}

#[test]
fn i2_a_migrated_guest_continues_at_the_destination() {
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
    assert!(here.in_doubt);
    assert_eq!(there.taken_over, Some(Epoch(5)));
    assert_goes_on(&there, &there_test);
    let (before, all) = (here_test.console.recent(), there_test.console.recent());
    assert!(all.starts_with(&before), "the past has moved, too");
    assert_uninterrupted(&all);
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
        FaultPoint::DestinationResident,
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
            matches!(
                end,
                OutgoingEnd::Kept {
                    ownership: None,
                    ..
                }
            ),
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
    assert_uninterrupted(&here_test.console.recent());
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
fn i2_a_guest_that_shuts_itself_down_before_the_last_copy_is_moved_nowhere() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let ((mut here, _here_test), (there, _there_test)) = (source(), destination());
    here.ends = Some("the guest has shut itself down");
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    let OutgoingEnd::Kept { failure, ownership } = end else {
        panic!("{end:?}");
    };
    assert_eq!(failure.text, "the guest has shut itself down");
    assert_eq!(ownership, None);
    let (arrived, there) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Discarded { .. }),
        "{arrived:?}"
    );
    assert!(!there.is_running() && !here.is_running());
    assert_eq!(order.volume.seen().epoch, Epoch(4), "nothing was requested");
    assert_eq!(order.status().failure.unwrap(), failure.text);
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
    assert_uninterrupted(&here_test.console.recent());
}

#[test]
fn i2_after_a_stream_lost_at_ready_the_ownership_record_decides() {
    if !kvm_or_skip() {
        return;
    }
    // The destination's stream breaks right after `Ready` went out: either the source saw it and
    // commits, or it did not and keeps the guest. Never both, never neither.
    let mut order = Move::new();
    order.incoming.orphan_timeout = Duration::from_secs(3);
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
fn i2_after_the_source_vanished_the_ownership_record_decides() {
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
fn i2_a_commit_request_is_repeated_until_it_is_answered() {
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
    let OutgoingEnd::Kept { failure, ownership } = end else {
        panic!("{end:?}");
    };
    assert_eq!(failure.reason, AbortReason::CommitRefused);
    assert_eq!(ownership, Some(Ownership::new(HERE, Epoch(5))));
    assert_eq!(order.volume.seen().epoch, Epoch(5));
    assert_goes_on(&here, &here_test);
    assert_uninterrupted(&here_test.console.recent());
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
fn a_peer_that_speaks_garbage_or_has_no_certificate_of_the_cluster_is_refused() {
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
fn another_attempt_and_another_machine_are_refused_and_the_right_one_is_still_admitted() {
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
fn a_target_with_a_smaller_mtu_is_refused_before_memory_is_copied() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    order.outgoing.offered_mtus = vec![9000];
    let ((mut here, here_test), (there, _)) = (source(), destination());
    let arrives = order.listen(there);
    let end = order.send(&mut here);
    let OutgoingEnd::Kept { failure, .. } = end else {
        panic!("{end:?}");
    };
    assert_eq!(failure.reason, AbortReason::MachineDiffers);
    assert_eq!(
        failure.text,
        "interfaces[0]: the guest uses an MTU of 9000 bytes, bridge \"lan\" of the target has 1500"
    );
    let status = order.status();
    assert_eq!((status.rounds, status.bytes), (0, Bytes(0)), "{status:?}");
    assert_goes_on(&here, &here_test);
    assert!(order.destination_control.cancel(), "it still waits");
    drop(arrives.join().unwrap());
    // The control: a network with that MTU.
    let mut order = Move::new();
    order.outgoing.offered_mtus = vec![9000];
    order.incoming.interfaces = vec![interface(9000)];
    let arrives = order.listen(destination().0);
    let end = order.send(&mut here);
    assert!(matches!(end, OutgoingEnd::Departed { .. }), "{end:?}");
    drop(arrives.join().unwrap());
}

/// What the destination's memory becomes resident by: nothing happens until the sender is dropped.
fn populate_later() -> (mpsc::Sender<()>, Populate) {
    let (begin_tx, begin_rx) = mpsc::channel::<()>();
    let populate = move |_, _| {
        let _ended: Result<(), mpsc::RecvError> = begin_rx.recv();
        Ok(())
    };
    (begin_tx, Box::new(populate))
}

/// All memory was made resident before the destination listened, and within 30 s: guests of some hundred GiB
/// could not be moved at all.
#[test]
fn memory_is_copied_while_the_destinations_becomes_resident_and_the_guest_is_stopped_only_then() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let ((mut here, here_test), (there, there_test)) = (source(), destination());
    let (begin, populate) = populate_later();
    order.populate = Some(populate);
    let arrives = order.listen(there);
    let control = Arc::clone(&order.destination_control);
    let moves = spawn("source", move || (order.send(&mut here), here, order));
    // The first round has arrived, and more than one message that the stream is up is on its way.
    let since = Instant::now();
    while control.status().rounds == 0 {
        assert!(since.elapsed() < Duration::from_secs(60), "no round");
        std::thread::yield_now();
    }
    assert!(control.status().bytes > Bytes(4096));
    let printed = here_test.written();
    here_test.await_output(printed + 200);
    assert!(!moves.is_finished() && !arrives.is_finished());
    drop(begin);
    let (end, here, order) = moves.join().unwrap();
    assert_eq!(end, OutgoingEnd::Departed { epoch: Epoch(5) });
    let (_, there) = arrives.join().unwrap();
    assert!(!here.is_running());
    assert_goes_on(&there, &there_test);
    let (before, all) = (here_test.console.recent(), there_test.console.recent());
    assert!(all.starts_with(&before));
    assert_uninterrupted(&all);
    assert_eq!(order.status().phase, MigrationPhase::Completed);
}

#[test]
fn i5_a_destination_without_enough_memory_ends_the_attempt_before_the_guest_is_stopped() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let ((mut here, _here_test), (there, _)) = (source(), destination());
    here.ends = Some("it was stopped");
    order.populate = Some(Box::new(|_, _| Err(rustix::io::Errno::NOMEM.into())));
    let arrives = order.listen(there);
    let OutgoingEnd::Kept { failure, ownership } = order.send(&mut here) else {
        panic!("it moved");
    };
    assert!(
        failure.text.starts_with("no memory for the guest: "),
        "{failure:?}"
    );
    assert_eq!(ownership, None);
    assert!(here.is_running());
    let (arrived, _) = arrives.join().unwrap();
    assert!(
        matches!(arrived, IncomingEnd::Discarded { .. }),
        "{arrived:?}"
    );
}

/// It begins to copy when it may, and until then hears once a second that the stream is up.
#[test]
fn a_source_that_does_not_know_resident_waits_before_the_first_round() {
    if !kvm_or_skip() {
        return;
    }
    let mut order = Move::new();
    let (begin, populate) = populate_later();
    order.populate = Some(populate);
    let (there, _there_test) = destination();
    let layout = layout_of(there.machine().memory());
    let arrives = order.listen(there);
    let job = &order.outgoing;
    let mut channel = Channel::connect(job.peer, &job.tls_dir).unwrap();
    let hello = Hello {
        version_min: 1,
        version_max: 1,
        streams: 1,
        offered: Features::OFFERED_MTUS,
        required: Features(0),
        vm: job.vm,
        attempt: job.attempt,
        epoch: job.epoch,
        source: job.from,
        volume: order.volume.volume(),
    };
    channel.send(&Frame::Hello(hello)).unwrap();
    let welcomed = channel.receive().unwrap();
    assert!(matches!(welcomed, Frame::Welcome(_)), "{welcomed:?}");
    let config = Config {
        vcpus: job.cpus,
        state_version: crate::state::VERSION,
        layout,
        description: job.description.clone(),
        offered_mtus: job.offered_mtus.clone(),
    };
    channel.send(&Frame::Config(config)).unwrap();
    for _ in 0..2 {
        assert_eq!(channel.receive().unwrap(), Frame::Pong { token: 0 });
    }
    drop(begin);
    while channel.receive().unwrap() != (Frame::RoundAck { round: 0 }) {}
    channel.close();
    drop(arrives.join().unwrap());
}

#[test]
fn a_missing_certificate_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = bascule_ipc::mutual_tls::client_config(directory.path()).unwrap_err();
    let text = bascule_types::error_chain(&error);
    assert!(text.contains("node.crt"), "{text}");
    assert!(!Path::new("node.crt").exists());
}
