//! What each phase takes and refuses.

use bascule_types::{Generation, SlotId};

use super::*;
use crate::pages::{PageIndex, PageRange};
use crate::wire::{BatchBuilder, FrameBuffer, FrameWriter, StreamId};

const SOURCE: Owner = owner(1);
const DESTINATION: Owner = owner(2);

const fn owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(1),
    }
}

fn expected() -> Expected {
    Expected {
        vm: VmUid::from_bytes([1; 16]),
        attempt: AttemptId::from_bytes([2; 16]),
        volume: VolumeId::from_bytes([3; 16]),
        destination: DESTINATION,
        restore_estimate: Duration::from_millis(1),
    }
}

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 3,
        streams: 8,
        offered: Features(0b100),
        required: Features(0),
        vm: VmUid::from_bytes([1; 16]),
        attempt: AttemptId::from_bytes([2; 16]),
        epoch: Epoch(4),
        source: SOURCE,
        volume: VolumeId::from_bytes([3; 16]),
    }
}

fn range(first: u64, pages: u64) -> PageRange {
    PageRange::new(PageIndex(first), Pages(pages)).unwrap()
}

fn machine() -> Machine {
    Machine {
        vcpus: 2,
        state_versions: (1, 2),
        layout: MemoryLayout::new(vec![range(0, 256)]).unwrap(),
        description: b"machine".to_vec(),
        interfaces: vec![interface("lan", Some(9000)), interface("wan", None)],
    }
}

fn interface(bridge: &str, mtu: Option<u16>) -> Interface {
    Interface {
        bridge: bridge.to_owned(),
        mtu,
    }
}

fn config() -> Config {
    Config {
        vcpus: 2,
        state_version: 2,
        layout: machine().layout,
        description: b"machine".to_vec(),
        offered_mtus: vec![],
    }
}

fn mark(frames: u32) -> StreamMark {
    StreamMark {
        stream: StreamId::FIRST,
        frames,
    }
}

fn round_end(round: u32, frames: u32) -> Frame<'static> {
    Frame::RoundEnd(RoundEnd {
        round,
        marks: vec![mark(frames)],
    })
}

fn in_memory() -> ExpectMemory {
    let (phase, _) = ExpectHello::new(expected())
        .hello(Frame::Hello(hello()))
        .unwrap();
    let phase = phase.config(Frame::Config(config()), &machine()).unwrap();
    assert!(phase.is_resident_first());
    phase.resident()
}

fn in_state() -> ExpectState {
    let Ok(MemoryStep::RoundEnded(phase, 1)) = in_memory().frame(round_end(1, 2), mark(2)) else {
        panic!("the round did not end");
    };
    let Ok(MemoryStep::State(phase)) = phase.frame(Frame::State(b"dev"), mark(3)) else {
        panic!("the state was not taken");
    };
    phase
}

fn in_commit() -> ExpectCommit {
    let Ok(StateStep::More(phase)) = in_state().frame(&Frame::State(b"ices")) else {
        panic!("the state was not taken");
    };
    let end = Frame::StateEnd(StateEnd {
        length: Bytes(7),
        crc32c: crc32c::crc32c(b"devices"),
    });
    let Ok(StateStep::Complete(phase, state)) = phase.frame(&end) else {
        panic!("the state was not complete");
    };
    assert_eq!(state, b"devices");
    phase.ready()
}

fn row(owner: Option<Owner>, epoch: u64, attempt: Option<AttemptId>) -> CommitEvent {
    CommitEvent::Record(OwnershipRecord {
        owner,
        epoch: Epoch(epoch),
        attempt,
    })
}

#[test]
fn the_highest_common_version_and_only_known_features_are_chosen() {
    let (_, welcome) = ExpectHello::new(expected())
        .hello(Frame::Hello(hello()))
        .unwrap();
    assert_eq!(welcome.version, 1);
    assert_eq!(welcome.streams, 1);
    assert_eq!(welcome.features, Features(0));
    assert_eq!(welcome.destination, DESTINATION);
}

#[test]
fn an_unexpected_source_is_refused_with_the_reason() {
    let cases = [
        (
            Hello {
                version_min: 2,
                ..hello()
            },
            AbortReason::Version,
        ),
        (
            Hello {
                required: Features(1 << 63),
                ..hello()
            },
            AbortReason::Version,
        ),
        (
            Hello {
                vm: VmUid::from_bytes([9; 16]),
                ..hello()
            },
            AbortReason::WrongAttempt,
        ),
        (
            Hello {
                attempt: AttemptId::from_bytes([9; 16]),
                ..hello()
            },
            AbortReason::WrongAttempt,
        ),
        (
            Hello {
                volume: VolumeId::from_bytes([9; 16]),
                ..hello()
            },
            AbortReason::WrongAttempt,
        ),
        (
            Hello {
                source: DESTINATION,
                ..hello()
            },
            AbortReason::WrongAttempt,
        ),
    ];
    for (hello, reason) in cases {
        let abort = ExpectHello::new(expected())
            .hello(Frame::Hello(hello))
            .unwrap_err();
        assert_eq!(abort.reason, reason, "{}", abort.text);
    }
}

#[test]
fn an_image_of_another_vm_or_epoch_is_refused() {
    let of = (hello().vm, hello().volume, Epoch(4));
    assert!(ExpectConfig::of_image(Frame::Hello(hello()), of).is_ok());
    for of in [
        (VmUid::from_bytes([9; 16]), hello().volume, Epoch(4)),
        (hello().vm, VolumeId::from_bytes([9; 16]), Epoch(4)),
        (hello().vm, hello().volume, Epoch(5)),
    ] {
        let abort = ExpectConfig::of_image(Frame::Hello(hello()), of).unwrap_err();
        assert_eq!(abort.reason, AbortReason::WrongAttempt);
    }
}

#[test]
fn a_machine_that_differs_is_refused_with_the_name_of_the_difference() {
    let cases = [
        (
            Config {
                vcpus: 3,
                ..config()
            },
            "2 vCPUs here, 3 there",
        ),
        (
            Config {
                state_version: 3,
                ..config()
            },
            "state versions 1 to 2 here, 3 there",
        ),
        (
            Config {
                layout: MemoryLayout::new(vec![range(0, 512)]).unwrap(),
                ..config()
            },
            "1048576 B of memory here, 2097152 B there, or laid out differently",
        ),
        (
            Config {
                description: vec![],
                ..config()
            },
            "devices or CPU features differ",
        ),
    ];
    for (config, text) in cases {
        let (phase, _) = ExpectHello::new(expected())
            .hello(Frame::Hello(hello()))
            .unwrap();
        let abort = phase.config(Frame::Config(config), &machine()).unwrap_err();
        assert_eq!(abort.reason, AbortReason::MachineDiffers);
        assert_eq!(abort.text, text);
    }
}

/// The phase after `Hello` of a source that offers these features.
fn in_config(offered: Features) -> (ExpectConfig, Features) {
    let hello = Hello { offered, ..hello() };
    let (phase, welcome) = ExpectHello::new(expected())
        .hello(Frame::Hello(hello))
        .unwrap();
    (phase, welcome.features)
}

#[test]
fn a_network_with_a_smaller_mtu_than_the_guest_uses_is_refused_before_any_memory() {
    let cases = [
        (vec![9000, 1500], None),
        (vec![0, 0], None),
        (
            vec![9001, 1500],
            Some(
                "interfaces[0]: the guest uses an MTU of 9001 bytes, bridge \"lan\" of the target \
                 has 9000",
            ),
        ),
        (vec![9000], Some("2 interfaces here, 1 there")),
        (vec![], Some("2 interfaces here, 0 there")),
    ];
    for (offered_mtus, refusal) in cases {
        let (phase, features) = in_config(Features::KNOWN);
        assert_eq!(features, Features::KNOWN);
        let config = Config {
            offered_mtus,
            ..config()
        };
        let taken = phase.config(Frame::Config(config), &machine());
        assert_eq!(taken.err().map(|abort| abort.text).as_deref(), refusal);
    }
    // A source that does not know the feature is refused when its state is restored.
    let (phase, features) = in_config(Features(0));
    assert_eq!(features, Features(0));
    assert!(phase.config(Frame::Config(config()), &machine()).is_ok());
}

/// A source that stops its guest too early would find out too late that the memory for it is missing.
#[test]
fn the_state_is_taken_only_when_the_memory_is_resident() {
    let config = Config {
        offered_mtus: vec![0, 0],
        ..config()
    };
    let (phase, _) = in_config(Features::KNOWN);
    let phase = phase.config(Frame::Config(config), &machine()).unwrap();
    assert!(!phase.is_resident_first() && phase.is_pending());
    let after_a_round = |phase: ExpectMemory| {
        let Ok(MemoryStep::RoundEnded(phase, 1)) = phase.frame(round_end(1, 2), mark(2)) else {
            panic!("the round did not end");
        };
        phase
    };
    let (early, late) = (after_a_round(phase), in_memory().resident());
    let abort = early.frame(Frame::State(b"dev"), mark(3)).unwrap_err();
    assert_eq!(abort.reason, AbortReason::Protocol);
    assert_eq!(abort.text, "the state came before the memory was resident");
    assert!(!late.is_pending());
    let taken = after_a_round(late).frame(Frame::State(b"dev"), mark(3));
    assert!(matches!(taken, Ok(MemoryStep::State(_))));
}

#[test]
fn memory_outside_of_the_machine_is_refused() {
    for (first, fits) in [(255, true), (256, false), (1 << 40, false)] {
        let mut batch = BatchBuilder::new();
        assert!(batch.push_zero(range(first, 1)));
        let mut bytes = Vec::new();
        FrameWriter::new(StreamId::FIRST)
            .send_batch(&mut bytes, &mut batch)
            .unwrap();
        let mut buffer = FrameBuffer::new(StreamId::FIRST);
        let frame = buffer.receive(&mut bytes.as_slice()).unwrap();
        assert_eq!(in_memory().frame(frame, mark(0)).is_ok(), fits, "{first}");
    }
}

#[test]
fn rounds_count_up_and_miss_no_frame() {
    assert!(in_memory().frame(round_end(1, 2), mark(2)).is_ok());
    assert!(in_memory().frame(round_end(2, 2), mark(2)).is_err());
    assert!(in_memory().frame(round_end(0, 2), mark(2)).is_err());
    assert!(in_memory().frame(round_end(1, 3), mark(2)).is_err());
}

#[test]
fn no_phase_accepts_a_frame_of_another_phase() {
    let frames = || {
        [
            Frame::Hello(hello()),
            Frame::Config(config()),
            Frame::StateEnd(StateEnd {
                length: Bytes(0),
                crc32c: 0,
            }),
            Frame::Committed(Committed {
                epoch: Epoch(5),
                owner: DESTINATION,
            }),
            Frame::Ready {
                restore: Duration::ZERO,
            },
        ]
    };
    for frame in frames().into_iter().skip(1) {
        assert!(ExpectHello::new(expected()).hello(frame).is_err());
    }
    for frame in frames() {
        assert!(in_memory().frame(frame, mark(0)).is_err());
    }
    for frame in frames() {
        assert!(in_state().frame(&frame).is_err());
    }
    let state = Frame::State(b"x");
    assert!(
        in_memory().frame(state, mark(0)).is_err(),
        "the state comes after a round"
    );
}

#[test]
fn a_state_with_a_wrong_length_or_checksum_is_refused() {
    for end in [
        StateEnd {
            length: Bytes(2),
            crc32c: crc32c::crc32c(b"dev"),
        },
        StateEnd {
            length: Bytes(3),
            crc32c: 0,
        },
    ] {
        assert!(in_state().frame(&Frame::StateEnd(end)).is_err());
    }
}

#[test]
fn an_endless_state_is_refused() {
    let piece = vec![0; 1 << 20];
    let mut phase = in_state();
    for _ in 0..20 {
        match phase.frame(&Frame::State(&piece)) {
            Ok(StateStep::More(next)) => phase = next,
            Ok(StateStep::Complete(..)) => panic!("it did not end"),
            Err(abort) => {
                assert_eq!(abort.reason, AbortReason::Protocol);
                return;
            }
        }
    }
    panic!("20 MiB of state were taken");
}

#[test]
fn the_abort_of_the_source_is_passed_on() {
    let abort = Abort::new(AbortReason::Cancelled, "by the operator");
    let handed = in_memory()
        .frame(Frame::Abort(abort.clone()), mark(0))
        .unwrap_err();
    assert_eq!(handed, abort);
}

#[test]
fn i2_the_destination_runs_only_when_source_or_record_reports_the_transfer() {
    let waiting = in_commit();
    let committed = Committed {
        epoch: Epoch(5),
        owner: DESTINATION,
    };
    assert_eq!(
        waiting.next(&CommitEvent::Committed(committed)),
        CommitStep::Run { epoch: Epoch(5) }
    );
    for wrong in [
        Committed {
            epoch: Epoch(4),
            ..committed
        },
        Committed {
            owner: SOURCE,
            ..committed
        },
    ] {
        assert!(matches!(
            waiting.next(&CommitEvent::Committed(wrong)),
            CommitStep::QueryVolume(_)
        ));
    }
    assert_eq!(waiting.next(&CommitEvent::Aborted), CommitStep::Discard);
}

#[test]
fn i5_a_destination_that_lost_the_source_queries_the_record_until_it_decides() {
    let CommitStep::QueryVolume(orphan) = in_commit().next(&CommitEvent::StreamLost) else {
        panic!("the destination sends no request");
    };
    let attempt = Some(orphan.terms().attempt);
    let still = orphan.next(&row(Some(SOURCE), 4, None));
    assert_eq!(still, CommitStep::QueryVolume(orphan));
    assert_eq!(orphan.next(&CommitEvent::NoAnswer), still);
    assert_eq!(
        orphan.next(&row(Some(DESTINATION), 5, attempt)),
        CommitStep::Run { epoch: Epoch(5) }
    );
    for gone in [
        row(Some(SOURCE), 5, Some(AttemptId::from_bytes([7; 16]))),
        row(Some(DESTINATION), 5, None),
        row(Some(DESTINATION), 6, attempt),
        row(Some(owner(3)), 5, None),
        row(None, 4, None),
        CommitEvent::NoRecord,
        CommitEvent::TimedOut,
    ] {
        assert_eq!(orphan.next(&gone), CommitStep::Discard, "{gone:?}");
    }
    assert_eq!(
        orphan.next(&CommitEvent::Committed(Committed {
            epoch: Epoch(5),
            owner: DESTINATION
        })),
        CommitStep::QueryVolume(orphan),
        "frames after a protocol error are ignored"
    );
}
