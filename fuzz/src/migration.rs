//! The stream of a migration, and a saved image, which has the same frames.

use arbitrary::{Arbitrary, Unstructured};
use bascule_migrate::destination::{
    ExpectConfig, ExpectHello, ExpectMemory, ExpectState, Expected, Interface, Machine, MemoryStep,
    StateStep,
};
use bascule_migrate::wire::{
    Batch, BatchBuilder, Config, Features, FrameKind, HEADER_BYTES, Header, Hello, PAGE, RoundEnd,
    RunContents, STATE_BYTES_MAX, StateEnd, StreamId, StreamMark,
};
use bascule_migrate::{Frame, FrameBuffer, FrameWriter, MemoryLayout, PageIndex, PageRange, Pages};
use bascule_types::{AttemptId, Bytes, Epoch, Generation, Owner, SlotId, VmUid, VolumeId};

/// What a source sends next.
#[derive(Arbitrary, Debug)]
enum Sent {
    /// A frame of any kind with a valid header.
    Body {
        kind: u8,
        body: Vec<u8>,
    },
    /// Bytes that need not be a frame.
    Raw(Vec<u8>),
    Hello {
        offered: u8,
    },
    Config {
        mtus: Option<[u16; 2]>,
    },
    Zeroes {
        first: u16,
        pages: u8,
    },
    Page {
        first: u16,
        fill: u8,
    },
    RoundEnd {
        round: u8,
        wrong_by: u8,
    },
    State {
        byte: u8,
        length: u16,
    },
    StateEnd {
        wrong: bool,
    },
    Ping,
}

/// The destination in any of its phases.
enum Phase {
    Hello(ExpectHello),
    Config(ExpectConfig),
    Memory(ExpectMemory),
    State(ExpectState),
}

pub(crate) fn stream(data: &[u8]) {
    let mut input = Unstructured::new(data);
    let (Ok(image), Ok(sent)) = (
        bool::arbitrary(&mut input),
        Vec::<Sent>::arbitrary(&mut input),
    ) else {
        return;
    };
    let bytes = write(&sent);
    let mut from = bytes.as_slice();
    let mut buffer = FrameBuffer::new(StreamId::FIRST);
    let mut phase = Some(Phase::Hello(ExpectHello::new(expected())));
    let mut rounds = 0;
    loop {
        let (before, mark) = (from, buffer.mark());
        let Ok(frame) = buffer.receive(&mut from) else {
            return;
        };
        let read = &before[..before.len() - from.len()];
        reads_back(&frame, read, mark.frames);
        phase = phase.and_then(|phase| phase.take(frame, mark, image, &mut rounds));
    }
}

impl Phase {
    /// The next phase; none when the destination gives up or is complete.
    fn take(
        self,
        frame: Frame<'_>,
        mark: StreamMark,
        image: bool,
        rounds: &mut u32,
    ) -> Option<Self> {
        match self {
            Self::Hello(_) if image => {
                let expected = expected();
                let whose = (expected.vm, expected.volume, Epoch(9));
                ExpectConfig::of_image(frame, whose).ok().map(Self::Config)
            }
            Self::Hello(hello) => {
                let (next, welcome) = hello.hello(frame).ok()?;
                assert!(Features::KNOWN.contains(welcome.features));
                Some(Self::Config(next))
            }
            Self::Config(config) => config.config(frame, &machine()).ok().map(Self::Memory),
            Self::Memory(memory) => match memory.frame(frame, mark).ok()? {
                MemoryStep::Apply(next, batch) => {
                    assert!(batch.runs().all(|(run, _)| layout().contains(run)));
                    Some(Self::Memory(next))
                }
                MemoryStep::RoundEnded(next, round) => {
                    assert_eq!(round, *rounds + 1, "rounds end in order");
                    *rounds = round;
                    Some(Self::Memory(next.resident()))
                }
                MemoryStep::State(next) => {
                    assert_ne!(*rounds, 0, "the state comes after a round");
                    Some(Self::State(next))
                }
                MemoryStep::Ping(next, _) | MemoryStep::Progress(next, _) => {
                    Some(Self::Memory(next))
                }
            },
            Self::State(state) => match state.frame(&frame).ok()? {
                StateStep::More(next) => Some(Self::State(next)),
                StateStep::Complete(_, state) => {
                    assert!(state.len() as u64 <= STATE_BYTES_MAX);
                    None
                }
            },
        }
    }
}

/// A frame that was read from `bytes` is written with the same bytes, but for the fields of later versions.
fn reads_back(frame: &Frame<'_>, bytes: &[u8], number: u32) {
    let mut writer = FrameWriter::new(StreamId::FIRST);
    // A writer counts its frames.
    for _ in 0..number {
        writer
            .send(&mut std::io::sink(), &Frame::Ping { token: 0 })
            .unwrap();
    }
    let mut again = Vec::new();
    match frame {
        Frame::Memory(batch) => return same_contents(batch),
        frame => writer.send(&mut again, frame).unwrap(),
    };
    match frame {
        // Fields of later versions are ignored.
        Frame::Hello(_) => assert_eq!(again[HEADER_BYTES..], bytes[HEADER_BYTES..again.len()]),
        // A reason of a later version is kept as a number.
        _ => assert_eq!(again, bytes),
    }
}

/// The runs of a batch make the same batch again, page by page.
fn same_contents(batch: &Batch<'_>) {
    let mut builder = BatchBuilder::new();
    for (run, contents) in batch.runs() {
        match contents {
            RunContents::Zero => assert!(builder.push_zero(run)),
            RunContents::Data(data) => {
                assert_eq!(data.len() as u64, run.bytes().0);
                for (page, data) in (run.first().0..).zip(data.chunks_exact(PAGE)) {
                    let fits =
                        builder.push_page(PageIndex(page), |room| room.copy_from_slice(data));
                    assert!(fits);
                }
            }
        }
    }
    let (head, data) = builder.parts();
    let body = [head, data].concat();
    let Ok(Frame::Memory(again)) = Frame::decode(FrameKind::Memory, &body) else {
        panic!("the batch is not read back");
    };
    let pages = |batch: &Batch<'_>| batch.runs().map(|(run, _)| run.pages().0).sum::<u64>();
    assert_eq!(pages(&again), pages(batch));
}

/// The bytes of a stream.
fn write(sent: &[Sent]) -> Vec<u8> {
    let mut out = Vec::new();
    let mut writer = FrameWriter::new(StreamId::FIRST);
    let mut state = Vec::new();
    for sent in sent.iter().take(FRAMES_MAX) {
        match sent {
            Sent::Raw(bytes) => out.extend_from_slice(bytes),
            Sent::Body { kind, body } => {
                let kind = FrameKind::ALL[usize::from(*kind) % FrameKind::ALL.len()];
                let header = Header {
                    kind,
                    stream: StreamId::FIRST,
                    length: u32::try_from(body.len()).unwrap(),
                    number: writer.mark().frames,
                };
                // Counts the frame.
                let ping = Frame::Ping { token: 0 };
                writer.send(&mut std::io::sink(), &ping).unwrap();
                out.extend_from_slice(&header.encode());
                out.extend_from_slice(body);
            }
            Sent::Zeroes { first, pages } => {
                let mut batch = BatchBuilder::new();
                let (first, pages) = (PageIndex((*first).into()), Pages(u64::from(*pages) + 1));
                assert!(batch.push_zero(PageRange::new(first, pages).unwrap()));
                writer.send_batch(&mut out, &mut batch).unwrap();
            }
            Sent::Page { first, fill } => {
                let mut batch = BatchBuilder::new();
                assert!(batch.push_page(PageIndex((*first).into()), |page| page.fill(*fill)));
                writer.send_batch(&mut out, &mut batch).unwrap();
            }
            Sent::State { byte, length } => {
                let piece = vec![*byte; usize::from(*length)];
                state.extend_from_slice(&piece);
                writer.send(&mut out, &Frame::State(&piece)).unwrap();
            }
            other => {
                let frame = frame(other, writer.mark(), &state);
                writer.send(&mut out, &frame).unwrap();
            }
        }
    }
    out
}

/// A frame without contents of its own.
fn frame(sent: &Sent, mut mark: StreamMark, state: &[u8]) -> Frame<'static> {
    match sent {
        Sent::Hello { offered } => Frame::Hello(hello(u64::from(*offered))),
        Sent::Config { mtus } => Frame::Config(Config {
            vcpus: 2,
            state_version: 1,
            layout: layout(),
            description: b"{}".to_vec(),
            offered_mtus: mtus.map(Vec::from).unwrap_or_default(),
        }),
        Sent::RoundEnd { round, wrong_by } => {
            mark.frames = mark.frames.wrapping_add(u32::from(*wrong_by));
            Frame::RoundEnd(RoundEnd {
                round: u32::from(*round),
                marks: vec![mark],
            })
        }
        Sent::StateEnd { wrong } => Frame::StateEnd(StateEnd {
            length: Bytes(state.len() as u64),
            crc32c: crc32c::crc32c(state) ^ u32::from(*wrong),
        }),
        _ => Frame::Ping { token: 8 },
    }
}

fn hello(offered: u64) -> Hello {
    let expected = expected();
    Hello {
        version_min: 1,
        version_max: 1,
        streams: 1,
        offered: Features(offered),
        required: Features(0),
        vm: expected.vm,
        attempt: expected.attempt,
        epoch: Epoch(9),
        source: owner(1),
        volume: expected.volume,
    }
}

fn expected() -> Expected {
    Expected {
        vm: VmUid::from_bytes([0x11; 16]),
        attempt: AttemptId::from_bytes([0x22; 16]),
        volume: VolumeId::from_bytes([0x33; 16]),
        destination: owner(2),
        restore_estimate: std::time::Duration::from_millis(5),
    }
}

const fn owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(7),
    }
}

fn machine() -> Machine {
    let interface = |mtu| Interface {
        bridge: "br0".to_owned(),
        mtu,
    };
    Machine {
        vcpus: 2,
        state_versions: (1, 1),
        layout: layout(),
        description: b"{}".to_vec(),
        interfaces: vec![interface(Some(1500)), interface(None)],
    }
}

/// Two regions with a hole between them.
fn layout() -> MemoryLayout {
    let range = |first, pages| PageRange::new(PageIndex(first), Pages(pages)).unwrap();
    MemoryLayout::new(vec![range(0, 256), range(0x400, 16)]).unwrap()
}

/// Frames of one input; a guess at what still runs fast.
const FRAMES_MAX: usize = 64;
