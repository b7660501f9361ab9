//! Golden bytes, round trips and fuzzed input.

use std::io::{Cursor, Read};
use std::time::Duration;

use bascule_types::{AttemptId, Bytes, Epoch, Generation, Owner, SlotId, VmUid, VolumeId};
use proptest::prelude::*;

use super::*;
use crate::pages::{MemoryLayout, PageIndex, PageRange, Pages};

const OWNER: Owner = Owner {
    slot: SlotId(3),
    generation: Generation(7),
};

fn hello() -> Hello {
    Hello {
        version_min: 1,
        version_max: 1,
        streams: 1,
        offered: Features(0),
        required: Features(0),
        vm: VmUid::from_bytes([0x11; 16]),
        attempt: AttemptId::from_bytes([0x22; 16]),
        epoch: Epoch(9),
        source: OWNER,
        volume: VolumeId::from_bytes([0x33; 16]),
    }
}

fn range(first: u64, pages: u64) -> PageRange {
    PageRange::new(PageIndex(first), Pages(pages)).unwrap()
}

/// One frame of every kind but `Memory`, which has tests of its own.
fn samples() -> Vec<Frame<'static>> {
    vec![
        Frame::Hello(hello()),
        Frame::Welcome(Welcome {
            version: 1,
            streams: 1,
            features: Features(0),
            destination: OWNER,
            restore_estimate: Duration::from_nanos(5),
        }),
        Frame::Config(Config {
            vcpus: 2,
            state_version: 1,
            layout: MemoryLayout::new(vec![range(0, 256), range(0x10_0000, 16)]).unwrap(),
            description: b"{}".to_vec(),
            offered_mtus: vec![],
        }),
        Frame::RoundEnd(RoundEnd {
            round: 2,
            marks: vec![StreamMark {
                stream: StreamId::FIRST,
                frames: 40,
            }],
        }),
        Frame::State(&[1, 2, 3]),
        Frame::StateEnd(StateEnd {
            length: Bytes(3),
            crc32c: 0xf130_f21e,
        }),
        Frame::Ready {
            restore: Duration::from_nanos(6),
        },
        Frame::Committed(Committed {
            epoch: Epoch(10),
            owner: OWNER,
        }),
        Frame::Running {
            resume: Duration::from_nanos(7),
        },
        Frame::Abort(Abort::new(AbortReason::Cancelled, "by the operator")),
        Frame::Ping { token: 8 },
        Frame::Pong { token: 8 },
        Frame::RoundAck { round: 2 },
        Frame::Progress(Progress {
            round: 2,
            sent: Bytes(4096),
            remaining: Bytes(8192),
        }),
        Frame::Resident {
            took: Duration::from_nanos(9),
        },
    ]
}

fn bytes_of(frame: &Frame<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    let sent = FrameWriter::new(StreamId::FIRST)
        .send(&mut out, frame)
        .unwrap();
    assert_eq!(sent, out.len() as u64);
    out
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn every_frame_reads_back_as_it_was_written() {
    for frame in samples() {
        let bytes = bytes_of(&frame);
        let mut buffer = FrameBuffer::new(StreamId::FIRST);
        assert_eq!(buffer.receive(&mut Cursor::new(bytes)).unwrap(), frame);
    }
}

#[test]
fn version_1_has_these_bytes() {
    let golden = [
        "ba5c01000000000068000000000000004241534 34d4947000100010001000000\
         00000000000000000000000000000000\
         1111111111111111111111111111111122222222222222222222222222222222\
         09000000000000000300000000000000070000000000000033333333333333333333333333333333",
        "ba5c0200000000002800000000000000010001000000000000000000000000000300000000000000\
         07000000000000000500000000000000",
        "ba5c03000000000032000000000000000200020001000000020000000000000000000000000000000001000000000000\
         000010000000000010000000000000007b7d",
        "ba5c050000000000100000000000000002000000010000000000000028000000",
        "ba5c0600000000000300000000000000010203",
        "ba5c070000000000100000000000000003000000000000001ef230f100000000",
        "ba5c08000000000008000000000000000600000000000000",
        "ba5c09000000000018000000000000000a0000000000000003000000000000000700000000000000",
        "ba5c0a000000000008000000000000000700000000000000",
        "ba5c0b0000000000110000000000000001006279207468652 06f70657261746f72",
        "ba5c0c000000000008000000000000000800000000000000",
        "ba5c0d000000000008000000000000000800000000000000",
        "ba5c0e000000000008000000000000000200000000000000",
        "ba5c0f00000000001800000000000000020000000000000000100000000000000020000000000000",
        "ba5c10000000000008000000000000000900000000000000",
    ];
    let samples = samples();
    assert_eq!(samples.len(), golden.len());
    for (frame, golden) in samples.iter().zip(golden) {
        let golden: String = golden.split_whitespace().collect();
        assert_eq!(hex(&bytes_of(frame)), golden, "{:?}", frame.kind());
    }
}

#[test]
fn a_config_with_mtus_has_these_bytes() {
    let config = |interfaces: u16| Config {
        vcpus: 2,
        state_version: 1,
        layout: MemoryLayout::new(vec![range(0, 256)]).unwrap(),
        description: b"{}".to_vec(),
        offered_mtus: (0..interfaces).map(|index| 9000 - index * 9000).collect(),
    };
    let bytes = bytes_of(&Frame::Config(config(2)));
    let golden = "ba5c030000000000260000000000000002000100010000000200000000000000\
                  000000000000000000010000000000007b7d28230000";
    assert_eq!(hex(&bytes), golden);
    let decode = |body: &[u8]| Frame::decode(FrameKind::Config, body).map(drop);
    let body = &bytes[HEADER_BYTES..];
    assert!(decode(body).is_ok());
    assert!(decode(&body[..body.len() - 1]).is_err(), "half an MTU");
    let full = [body, &[0; 2 * (INTERFACES_MAX - 2)]].concat();
    assert!(decode(&full).is_ok());
    assert!(decode(&[&full[..], &[0; 2]].concat()).is_err());
}

#[test]
fn version_1_memory_has_these_bytes() {
    let mut batch = BatchBuilder::new();
    assert!(batch.push_zero(range(5, 3)));
    assert!(batch.push_page(PageIndex(9), |page| page.fill(0xaa)));
    let mut out = Vec::new();
    FrameWriter::new(StreamId::FIRST)
        .send_batch(&mut out, &mut batch)
        .unwrap();
    assert_eq!(
        hex(&out[..56]),
        "ba5c0400000000002810000000000000\
         0200000000000000\
         05000000000000000300000000000000\
         09000000000000000100000001000000"
    );
    assert_eq!(out[56..], [0xaa; 4096]);
    assert!(batch.is_empty(), "sending empties the batch");
}

#[test]
fn adjoining_pages_become_one_run() {
    let mut batch = BatchBuilder::new();
    for page in 0..=255u8 {
        assert!(batch.push_page(PageIndex(page.into()), |place| place.fill(page)));
    }
    assert!(
        !batch.push_page(PageIndex(256), |_| unreachable!("it does not fit")),
        "a frame carries 1 MiB"
    );
    let mut out = Vec::new();
    FrameWriter::new(StreamId::FIRST)
        .send_batch(&mut out, &mut batch)
        .unwrap();
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    let Frame::Memory(batch) = buffer.receive(&mut out.as_slice()).unwrap() else {
        panic!("not memory");
    };
    let runs: Vec<_> = batch.runs().collect();
    assert_eq!(runs.len(), 1);
    assert_eq!(runs[0].0, range(0, 256));
    let RunContents::Data(data) = runs[0].1 else {
        panic!("not data");
    };
    assert_eq!(data[255 * PAGE], 255);
}

/// A reader that counts what is taken from it and never ends.
struct Endless {
    header: Vec<u8>,
    taken: usize,
}

impl Read for Endless {
    fn read(&mut self, into: &mut [u8]) -> std::io::Result<usize> {
        let from_header = self.header.len().min(into.len());
        into[..from_header].copy_from_slice(&self.header[..from_header]);
        self.header.drain(..from_header);
        into[from_header..].fill(0);
        self.taken += into.len();
        Ok(into.len())
    }
}

#[test]
fn a_length_beyond_the_kinds_bound_is_refused_before_the_body_is_read() {
    for kind in FrameKind::ALL {
        let mut header = Header {
            kind,
            stream: StreamId::FIRST,
            length: 0,
            number: 0,
        }
        .encode();
        header[8..12].copy_from_slice(&(kind.body_bytes_max() + 1).to_le_bytes());
        let mut endless = Endless {
            header: header.to_vec(),
            taken: 0,
        };
        let error = FrameBuffer::new(StreamId::FIRST)
            .receive(&mut endless)
            .unwrap_err();
        assert!(
            matches!(error, WireError::TooLong { .. }),
            "{kind:?}: {error}"
        );
        assert_eq!(endless.taken, HEADER_BYTES, "{kind:?}");
    }
}

#[test]
fn memory_is_allocated_only_as_the_bytes_of_a_body_arrive() {
    let header = Header {
        kind: FrameKind::Memory,
        stream: StreamId::FIRST,
        length: FrameKind::Memory.body_bytes_max(),
        number: 0,
    };
    let mut bytes = header.encode().to_vec();
    bytes.extend_from_slice(&[0; 100]);
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    assert!(matches!(
        buffer.receive(&mut bytes.as_slice()),
        Err(WireError::Io(_))
    ));
    assert!(
        format!("{buffer:?}").len() < 1 << 20,
        "one step of 64 KiB at most"
    );
}

#[test]
fn a_missing_or_repeated_frame_ends_the_stream() {
    let mut writer = FrameWriter::new(StreamId::FIRST);
    let (mut first, mut second) = (Vec::new(), Vec::new());
    writer.send(&mut first, &Frame::Ping { token: 1 }).unwrap();
    writer.send(&mut second, &Frame::Ping { token: 2 }).unwrap();
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    assert!(matches!(
        buffer.receive(&mut second.as_slice()),
        Err(WireError::OutOfSequence {
            expected: 0,
            found: 1,
            ..
        })
    ));
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    buffer.receive(&mut first.as_slice()).unwrap();
    assert!(buffer.receive(&mut first.as_slice()).is_err());
}

#[test]
fn bodies_that_their_kind_does_not_allow_are_refused() {
    let cases: &[(FrameKind, Vec<u8>)] = &[
        (FrameKind::Hello, vec![0; 104]),
        (FrameKind::Welcome, vec![0; 39]),
        (FrameKind::Memory, vec![0; 8]),
        (FrameKind::Memory, [0xff; 8].to_vec()),
        (FrameKind::Config, vec![0; 16]),
        (FrameKind::RoundEnd, vec![0; 8]),
        (FrameKind::State, vec![]),
        (FrameKind::Ping, vec![0; 7]),
        (FrameKind::RoundAck, vec![0, 0, 0, 0, 1, 0, 0, 0]),
        (FrameKind::Abort, vec![1]),
        (FrameKind::Abort, vec![1, 0, 0xff]),
    ];
    for (kind, body) in cases {
        let error = Frame::decode(*kind, body).unwrap_err();
        assert!(
            matches!(error, WireError::Malformed { .. }),
            "{kind:?}: {error}"
        );
    }
}

#[test]
fn a_batch_whose_contents_do_not_match_its_runs_is_refused() {
    let mut body = vec![1, 0, 0, 0, 0, 0, 0, 0];
    body.extend_from_slice(&5u64.to_le_bytes());
    body.extend_from_slice(&2u32.to_le_bytes());
    body.extend_from_slice(&1u32.to_le_bytes());
    body.resize(body.len() + 2 * PAGE, 7);
    assert!(Frame::decode(FrameKind::Memory, &body).is_ok());
    body.pop();
    assert!(Frame::decode(FrameKind::Memory, &body).is_err());
    let zero_kind_with_data = {
        body.push(7);
        body[20] = 0;
        body.clone()
    };
    assert!(Frame::decode(FrameKind::Memory, &zero_kind_with_data).is_err());
    body[20] = 2;
    assert!(
        Frame::decode(FrameKind::Memory, &body).is_err(),
        "unknown kind of run"
    );
}

#[test]
fn a_hello_of_a_later_version_can_be_read() {
    let mut bytes = bytes_of(&Frame::Hello(hello()));
    bytes.extend_from_slice(b"fields of version 4");
    bytes[8] += 19;
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    assert_eq!(
        buffer.receive(&mut bytes.as_slice()).unwrap(),
        Frame::Hello(hello())
    );
}

#[test]
fn an_aborts_text_is_cut_at_a_characters_boundary() {
    let abort = Abort::new(AbortReason::Internal, "é".repeat(400));
    assert_eq!(abort.text.len(), 512);
    let bytes = bytes_of(&Frame::Abort(abort.clone()));
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    let frame = buffer.receive(&mut bytes.as_slice()).unwrap();
    assert_eq!(frame, Frame::Abort(abort));
    for number in 0..40 {
        assert_eq!(AbortReason::from_wire(number).number(), number);
    }
}

proptest! {
    #[test]
    fn no_bytes_crash_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let mut buffer = FrameBuffer::new(StreamId::FIRST);
        let mut from = bytes.as_slice();
        while buffer.receive(&mut from).is_ok() {}
    }

    #[test]
    fn no_body_crashes_its_kind(
        kind in 0..FrameKind::ALL.len(),
        body in proptest::collection::vec(any::<u8>(), 0..300),
    ) {
        if let Ok(Frame::Memory(batch)) = Frame::decode(FrameKind::ALL[kind], &body) {
            for (range, contents) in batch.runs() {
                if let RunContents::Data(data) = contents {
                    prop_assert_eq!(data.len() as u64, range.bytes().0);
                }
            }
        }
    }

    #[test]
    fn a_frame_with_one_byte_changed_is_refused_or_is_another_valid_frame(
        which in 0..14usize,
        at in any::<prop::sample::Index>(),
        flip in 1..=255u8,
    ) {
        let mut bytes = bytes_of(&samples()[which]);
        let at = at.index(bytes.len());
        bytes[at] ^= flip;
        let mut buffer = FrameBuffer::new(StreamId::FIRST);
        let read = buffer.receive(&mut bytes.as_slice());
        if at < 2 || at == 3 {
            prop_assert!(read.is_err());
        } else if let Ok(frame) = read {
            prop_assert_ne!(&frame, &samples()[which]);
        }
    }

    #[test]
    fn batches_read_back_as_they_were_pushed(
        pages in proptest::collection::btree_map(0..2000u64, any::<Option<u8>>(), 1..200),
    ) {
        let mut batch = BatchBuilder::new();
        for (&page, fill) in &pages {
            let fitted = match fill {
                Some(byte) => batch.push_page(PageIndex(page), |place| place.fill(*byte)),
                None => batch.push_zero(range(page, 1)),
            };
            prop_assert!(fitted);
        }
        let mut out = Vec::new();
        FrameWriter::new(StreamId::FIRST).send_batch(&mut out, &mut batch).unwrap();
        let mut buffer = FrameBuffer::new(StreamId::FIRST);
        let Frame::Memory(batch) = buffer.receive(&mut out.as_slice()).unwrap() else {
            panic!("not memory");
        };
        let mut seen = std::collections::BTreeMap::new();
        for (run, contents) in batch.runs() {
            for index in 0..run.pages().0 {
                let fill = match contents {
                    RunContents::Zero => None,
                    RunContents::Data(data) => Some(data[usize::try_from(index).unwrap() * PAGE]),
                };
                seen.insert(run.first().0 + index, fill);
            }
        }
        prop_assert_eq!(seen, pages);
    }
}
