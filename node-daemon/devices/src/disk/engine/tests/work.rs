//! How much the engine does for a request, however many others wait.

use std::collections::VecDeque;
use std::time::Instant;

use super::*;
use crate::disk::steps::take_steps;
use crate::disk::{DeviceCommand, SimulatedDevice, SimulatedRing, Transferred};

/// A device that completes one command at a time: after each the engine looks for what can go on.
#[derive(Debug, Default)]
struct OneByOne {
    submitted: VecDeque<(u64, Transferred)>,
    was_reaped: bool,
}

impl SimulatedDevice for OneByOne {
    fn submit(&mut self, tag: u64, command: DeviceCommand) {
        let transferred = match command {
            DeviceCommand::Read { length, .. } => Transferred::Read(vec![0; length]),
            DeviceCommand::Write { bytes, .. } => Transferred::Written(bytes.len()),
            DeviceCommand::Sync => Transferred::Written(0),
        };
        self.submitted.push_back((tag, transferred));
    }

    fn reap(&mut self) -> Option<(u64, io::Result<Transferred>)> {
        if std::mem::take(&mut self.was_reaped) {
            return None;
        }
        let (tag, transferred) = self.submitted.pop_front()?;
        self.was_reaped = true;
        Some((tag, Ok(transferred)))
    }

    fn wait(&mut self) {}

    fn is_killed(&self) -> bool {
        false
    }

    fn now(&self) -> Instant {
        Instant::now()
    }
}

type Engine = DiskEngine<SimulatedRing<OneByOne>>;

fn engine(gate: Arc<dyn WriteGate>) -> Engine {
    let run = ExtentRun {
        start: Lba(0),
        length: ByteCount(WORK_DISK_BYTES),
    };
    let disk = Disk {
        file: File::open("/dev/null").unwrap().into(),
        extents: ExtentMap::new(&[run], run.length).unwrap(),
        block_bytes: 4096,
        gate,
        probe_offset: 0,
        errors: Arc::default(),
        settle: SETTLE,
    };
    let ram = GuestRam::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
    let ring = SimulatedRing::new(OneByOne::default(), RING_ROOM);
    DiskEngine::with_ring(disk, Arc::new(ram), ring)
}

/// Of many segments that are not aligned.
fn scattered(length: usize) -> Segments {
    let segment = |n: usize| Segment {
        start: GuestAddress(0x1001 + 0x1000 * n as u64),
        length_bytes: length / SEGMENTS,
    };
    (0..SEGMENTS).map(segment).collect()
}

fn write(block: usize, length: usize) -> Operation {
    Operation::Write {
        offset: block as u64 * 4096,
        data: scattered(length),
        durable: false,
    }
}

fn read(block: usize, length: usize) -> Operation {
    Operation::Read {
        offset: block as u64 * 4096,
        data: scattered(length),
    }
}

/// The steps that an engine takes for requests which are all queued before the first begins.
fn steps(gate: Arc<dyn WriteGate>, operations: Vec<Operation>, answers: usize) -> usize {
    let mut engine = engine(gate);
    take_steps();
    for (tag, operation) in (0..).zip(operations) {
        engine.enqueue(DiskRequest { tag, operation });
    }
    let mut answered = 0;
    while answered < answers {
        let more = engine.progress().unwrap();
        let goes_on = !more.is_empty() || engine.retry_after() == Some(Duration::ZERO);
        assert!(goes_on, "it stopped after {answered} of {answers}");
        answered += more.len();
    }
    take_steps()
}

/// A guest could delay the pause of its own disk: at each completion the engine looked at every waiting request again, at all
/// its segments, and compared it with each earlier one.
#[test]
fn the_work_for_a_request_does_not_grow_with_the_requests_that_wait() {
    let half_and_half =
        |n: usize, first: fn(usize) -> Operation, second: fn(usize) -> Operation| {
            let (first, second) = ((0..n / 2).map(first), (0..n / 2).map(second));
            first.chain(second).collect::<Vec<_>>()
        };
    let open = || Arc::new(AlwaysOpen) as Arc<dyn WriteGate>;
    let queued = |name, n: usize| match name {
        "writes of one block" => steps(open(), (0..n).map(|_| write(0, 4096)).collect(), n),
        "writes of everything, and a write of each block" => {
            let all = half_and_half(n, |_| write(0, ALL_BLOCKS * 4096), |n| write(n, 4096));
            steps(open(), all, n)
        }
        "a write of each block, and writes of everything" => {
            let all = half_and_half(n, |n| write(n, 4096), |_| write(0, ALL_BLOCKS * 4096));
            steps(open(), all, n)
        }
        "writes without room for their buffers" => {
            let far = |n| write(n * ALL_BLOCKS, ALL_BLOCKS * 4096);
            steps(open(), (0..n).map(far).collect(), n)
        }
        "reads without room for their buffers" => {
            let all = |_| read(0, ALL_BLOCKS * 4096);
            steps(open(), (0..n).map(all).collect(), n)
        }
        "a flush behind each write" => {
            let pair = |_| [write(0, 4096), Operation::Flush];
            steps(open(), (0..n / 2).flat_map(pair).collect(), n)
        }
        "reads while writes wait for the gate" => {
            let all = half_and_half(n, |n| write(n, 4096), |n| read(n, 4096));
            steps(Arc::new(TestGate::default()), all, n / 2)
        }
        other => panic!("{other}"),
    };
    for name in [
        "writes of one block",
        "writes of everything, and a write of each block",
        "a write of each block, and writes of everything",
        "writes without room for their buffers",
        "reads without room for their buffers",
        "a flush behind each write",
        "reads while writes wait for the gate",
    ] {
        let [once, twice] = [REQUESTS, 2 * REQUESTS].map(|n| queued(name, n));
        println!("{name}: {once} steps for {REQUESTS} requests, {twice} for twice as many");
        assert!(2 * twice < 5 * once, "{name}: {once}, then {twice} steps");
    }
}

#[test]
fn a_device_that_completes_at_once_does_not_keep_a_pause_waiting() {
    let mut engine = engine(Arc::new(AlwaysOpen));
    for tag in 0..64 {
        let operation = write(0, 4096);
        engine.enqueue(DiskRequest { tag, operation });
    }
    let answered = engine.progress().unwrap().len();
    assert!(answered <= ROUNDS_MAX, "{answered} in one call");
    assert_eq!(engine.retry_after(), Some(Duration::ZERO));
    // The rest is not begun by a pause.
    let drained = engine.drain().unwrap().completions.len();
    assert!(drained <= RING_ROOM, "{drained}");
    let mut all = answered + drained;
    while engine.retry_after().is_some() {
        all += engine.progress().unwrap().len();
    }
    assert_eq!(all, 64);
}

/// Like an indirect table, though shorter.
const SEGMENTS: usize = 4;
/// Enough that what grows with their square is most of the steps.
const REQUESTS: usize = 128;
/// Blocks of the longest requests: with them [`BOUNCE_BYTES_MAX`] is half of what all requests need.
const ALL_BLOCKS: usize = REQUESTS;
const WORK_DISK_BYTES: u64 = (2 * REQUESTS * ALL_BLOCKS * 4096) as u64;
/// Less than the requests that are ready at a time.
const RING_ROOM: usize = 8;
