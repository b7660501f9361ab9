use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use bascule_types::{Bytes as ByteCount, ExtentRun, Lba, OnError};
use proptest::prelude::*;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::*;
use crate::disk::errors::GATE_POLL;
use crate::disk::{
    AlwaysOpen, ErrorPolicy, ExtentMap, Operation, VolumeGate, WriteGate, block_bytes_of,
};
use crate::testing::wait_until;
use crate::virtio::{Segment, Segments};

mod failures;
mod work;

/// The extents of the disk: three, out of order.
const RUNS: [(u64, u64); 3] = [(64, 8), (0, 8), (32, 16)];
const DISK_BYTES: usize = 32 * 4096;
const VOLUME_BYTES: usize = 128 * 4096;
/// Short, so that tests need not wait long.
const SETTLE: Duration = Duration::from_millis(20);

#[derive(Debug, Default)]
struct TestGate {
    open: AtomicBool,
    checks: AtomicUsize,
    /// What it was told: how many threads may have a write submitted, and of a failure.
    active: AtomicUsize,
    failed: AtomicBool,
}

impl WriteGate for TestGate {
    fn is_open(&self) -> bool {
        self.checks.fetch_add(1, Ordering::Relaxed);
        assert_eq!(self.active.load(Ordering::Relaxed), 1, "told before");
        self.open.load(Ordering::Relaxed)
    }

    fn write_begins(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    fn writes_ended(&self) {
        self.active.fetch_sub(1, Ordering::Relaxed);
    }

    fn write_failed(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }
}

struct Bench {
    engine: DiskEngine,
    volume: File,
    errors: Arc<ErrorPolicy>,
    ram: Arc<GuestRam>,
    done: Vec<Completion>,
    next_tag: u64,
}

impl Bench {
    fn new(block_bytes: u32) -> Self {
        Self::with(block_bytes, Arc::new(AlwaysOpen), true)
    }

    fn with(block_bytes: u32, gate: Arc<dyn WriteGate>, writable: bool) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(VOLUME_BYTES as u64).unwrap();
        let volume = file.reopen().unwrap();
        let opened = File::options()
            .read(true)
            .write(writable)
            .open(file.path())
            .unwrap();
        Self::on(opened, volume, block_bytes, gate)
    }

    /// With direct I/O, if the file system of the temporary files has it.
    fn direct() -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(VOLUME_BYTES as u64).unwrap();
        let volume = file.reopen().unwrap();
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_DIRECT);
        let opened = options.open(file.path()).ok()?;
        let block_bytes = block_bytes_of(&opened).unwrap();
        Some(Self::on(opened, volume, block_bytes, Arc::new(AlwaysOpen)))
    }

    fn on(opened: File, volume: File, block_bytes: u32, gate: Arc<dyn WriteGate>) -> Self {
        let runs = RUNS.map(|(start, blocks)| ExtentRun {
            start: Lba(start),
            length: ByteCount(blocks * 4096),
        });
        let errors = Arc::new(ErrorPolicy::default());
        let disk = Disk {
            file: opened.into(),
            extents: ExtentMap::new(&runs, ByteCount(DISK_BYTES as u64)).unwrap(),
            block_bytes,
            gate,
            probe_offset: 0,
            errors: Arc::clone(&errors),
            settle: SETTLE,
        };
        let ranges = [
            (GuestAddress(0), 0x10_0000),
            (GuestAddress(0x10_0000), 0x10_0000),
        ];
        let ram = Arc::new(GuestRam::from_ranges(&ranges).unwrap());
        Self {
            engine: DiskEngine::new(disk, ram.clone()).unwrap(),
            volume,
            errors,
            ram,
            done: Vec::new(),
            next_tag: 0,
        }
    }

    fn enqueue(&mut self, operation: Operation) -> u64 {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.engine.enqueue(DiskRequest { tag, operation });
        tag
    }

    fn write(&mut self, offset: u64, at: u64, bytes: &[u8]) -> u64 {
        self.ram.write_slice(bytes, GuestAddress(at)).unwrap();
        self.enqueue(Operation::Write {
            offset,
            data: segments(at, bytes.len()),
            durable: false,
        })
    }

    fn read(&mut self, offset: u64, at: u64, length: usize) -> u64 {
        self.enqueue(Operation::Read {
            offset,
            data: segments(at, length),
        })
    }

    fn progress(&mut self) {
        self.done.extend(self.engine.progress().unwrap());
    }

    fn is_done(&self, tag: u64) -> bool {
        self.done.iter().any(|done| done.tag == tag)
    }

    fn wait(&mut self, tag: u64) -> io::Result<()> {
        wait_until("a completion", || {
            self.progress();
            self.is_done(tag)
        });
        let index = self.done.iter().position(|done| done.tag == tag).unwrap();
        self.done.swap_remove(index).result
    }

    /// The disk's bytes as they lie on the volume.
    fn on_volume(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (start, blocks) in RUNS {
            let mut run = vec![0; usize::try_from(blocks).unwrap() * 4096];
            self.volume.read_exact_at(&mut run, start * 4096).unwrap();
            bytes.extend(run);
        }
        bytes
    }

    fn guest(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.ram.read_slice(&mut bytes, GuestAddress(at)).unwrap();
        bytes
    }
}

fn segments(at: u64, length: usize) -> Segments {
    let segment = Segment {
        start: GuestAddress(at),
        length_bytes: length,
    };
    [segment].into_iter().collect()
}

#[test]
fn a_write_lands_on_every_extent_that_it_covers_and_reads_back() {
    let mut bench = Bench::new(512);
    let bytes: Vec<u8> = (0..DISK_BYTES)
        .map(|index| u8::try_from(index / 512).unwrap() | 1)
        .collect();
    let tag = bench.write(0, 0x1000, &bytes);
    bench.wait(tag).unwrap();
    assert_eq!(bench.on_volume(), bytes);
    let tag = bench.read(7 * 4096, 0x10_0000 - 4096, 3 * 4096);
    bench.wait(tag).unwrap();
    assert_eq!(
        bench.guest(0x10_0000 - 4096, 3 * 4096),
        bytes[7 * 4096..10 * 4096],
        "across extents and across regions of guest memory"
    );
}

#[test]
fn every_page_that_a_read_fills_is_marked_dirty() {
    let mut bench = Bench::new(4096);
    let region = |bench: &Bench, at: u64| {
        let region = bench.ram.find_region(GuestAddress(0)).unwrap();
        region.bitmap().dirty_at(usize::try_from(at).unwrap())
    };
    let tag = bench.read(0, 0x4000, 8192);
    bench.wait(tag).unwrap();
    assert!(region(&bench, 0x4000) && region(&bench, 0x5FFF), "direct");
    assert!(!region(&bench, 0x3FFF) && !region(&bench, 0x6000));
    let tag = bench.read(512, 0x8200, 512);
    bench.wait(tag).unwrap();
    assert!(region(&bench, 0x8200), "bounced");
}

#[test]
fn concurrent_writes_of_sectors_of_one_block_lose_none() {
    let mut bench = Bench::new(4096);
    let tags: Vec<_> = (0..16_u8)
        .map(|sector| {
            let at = 0x1000 + 0x1000 * u64::from(sector) + u64::from(sector);
            bench.write(u64::from(sector) * 512, at, &[sector + 1; 512])
        })
        .collect();
    for tag in tags {
        bench.wait(tag).unwrap();
    }
    let expected: Vec<u8> = (0..16_u8).flat_map(|sector| [sector + 1; 512]).collect();
    assert_eq!(bench.on_volume()[..8192], expected);
    assert_eq!(bench.engine.stats().read_modify_writes, 16);
}

#[test]
fn a_closed_gate_holds_writes_and_flushes_back_and_lets_reads_through() {
    let gate = Arc::new(TestGate::default());
    let mut bench = Bench::with(4096, gate.clone(), true);
    let write = bench.write(0, 0x1000, &[7; 4096]);
    let merge = bench.write(8192 + 512, 0x3000, &[8; 512]);
    let flush = bench.enqueue(Operation::Flush);
    let read = bench.read(4096, 0x9000, 4096);
    bench.wait(read).unwrap();
    wait_until("the merge to stall", || {
        bench.progress();
        bench.engine.stats().stalled && bench.engine.drain().unwrap().completions.is_empty()
    });
    assert!(gate.checks.load(Ordering::Relaxed) > 0);
    let active = || gate.active.load(Ordering::Relaxed);
    assert_eq!(active(), 0, "a stalled write is not in flight");
    assert!([write, merge, flush].iter().all(|tag| !bench.is_done(*tag)));
    assert_eq!(bench.engine.retry_after(), Some(GATE_POLL));
    assert!(
        bench.on_volume().iter().all(|byte| *byte == 0),
        "nothing was written"
    );

    gate.open.store(true, Ordering::Relaxed);
    for tag in [write, merge, flush] {
        bench.wait(tag).unwrap();
    }
    assert_eq!(bench.engine.retry_after(), None);
    assert_eq!(bench.on_volume()[..4096], [7; 4096]);
    assert_eq!(bench.on_volume()[8192 + 512..8192 + 1024], [8; 512]);
    bench.progress();
    assert_eq!(active(), 0);
    assert!(!gate.failed.load(Ordering::Relaxed));
}

#[test]
fn every_batch_with_a_write_checks_the_gate_once() {
    let gate = Arc::new(TestGate::default());
    gate.open.store(true, Ordering::Relaxed);
    let mut bench = Bench::with(512, gate.clone(), true);
    // Eight blocks are one extent: the ninth makes a second command, and both are one batch.
    let tag = bench.write(0, 0x1000, &[1; 9 * 4096]);
    bench.wait(tag).unwrap();
    assert_eq!(gate.checks.load(Ordering::Relaxed), 1);
    let tag = bench.write(0, 0x1000, &[2; 512]);
    bench.wait(tag).unwrap();
    assert_eq!(gate.checks.load(Ordering::Relaxed), 2, "another batch");
    let tag = bench.read(0, 0x1000, 512);
    bench.wait(tag).unwrap();
    assert_eq!(gate.checks.load(Ordering::Relaxed), 2, "reads do not");
}

#[test]
fn of_a_batch_that_meets_a_closed_gate_no_write_is_submitted() {
    let gate = Arc::new(TestGate::default());
    let mut bench = Bench::with(512, gate.clone(), true);
    let before = bench.on_volume();
    let tags: Vec<u64> = (0..4)
        .map(|block| bench.write(block * 512, 0x1000, &[9; 512]))
        .collect();
    let read = bench.read(4096, 0x4000, 512);
    bench.wait(read).unwrap();
    // A write that was submitted all the same has landed after this.
    assert!(bench.engine.drain().unwrap().completions.is_empty());
    assert_eq!(bench.on_volume(), before);
    assert!(tags.iter().all(|tag| !bench.is_done(*tag)));
    gate.open.store(true, Ordering::Relaxed);
    for tag in tags {
        bench.wait(tag).unwrap();
    }
    assert_eq!(bench.on_volume()[..2048], [9; 2048]);
}

#[test]
fn a_flush_waits_only_for_writes_that_arrived_before_it() {
    let gate = Arc::new(TestGate::default());
    let mut bench = Bench::with(512, gate.clone(), true);
    let first = bench.enqueue(Operation::Flush);
    let write = bench.write(0, 0x1000, &[1; 512]);
    let second = bench.enqueue(Operation::Flush);
    bench.wait(first).unwrap();
    bench.progress();
    assert!(!bench.is_done(write) && !bench.is_done(second));
    gate.open.store(true, Ordering::Relaxed);
    bench.wait(second).unwrap();
    assert!(bench.is_done(write), "the write came first");
}

#[test]
fn a_read_beyond_the_end_of_a_device_fails_only_that_read() {
    let mut bench = Bench::new(512);
    bench.volume.set_len(70 * 4096).unwrap();
    let read = bench.read(0, 0x1000, 8 * 4096);
    let error = bench.wait(read).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert_eq!(bench.engine.take_failure(), None);
    let write = bench.write(0, 0x1000, &[1; 512]);
    bench.wait(write).unwrap();
}

#[test]
fn a_range_beyond_the_disk_is_refused() {
    let mut bench = Bench::new(512);
    let size = DISK_BYTES as u64;
    for (offset, length) in [
        (size, 512),
        (size - 512, 1024),
        (1, 512),
        (0, 513),
        (u64::MAX - 511, 512),
    ] {
        let tag = bench.read(offset, 0x1000, length);
        let error = bench.wait(tag).unwrap_err();
        assert_eq!(
            error.kind(),
            io::ErrorKind::InvalidInput,
            "{offset} {length}"
        );
    }
    let tag = bench.read(size, 0x1000, 0);
    bench.wait(tag).unwrap();
}

#[test]
fn a_cleared_engine_drops_stalled_requests() {
    let gate = Arc::new(TestGate::default());
    let mut bench = Bench::with(4096, gate.clone(), true);
    bench.write(0, 0x1000, &[1; 512]);
    bench.write(512, 0x1000, &[1; 512]);
    bench.progress();
    bench.engine.drain().unwrap();
    bench.engine.clear();
    gate.open.store(true, Ordering::Relaxed);
    let tag = bench.read(0, 0x8000, 4096);
    bench.wait(tag).unwrap();
    assert_eq!(bench.guest(0x8000, 4096), [0; 4096]);
    assert_eq!(bench.engine.bounce_bytes, 0);
}

#[test]
fn the_volumes_gate_opens_for_the_owner_of_a_valid_lease_alone() {
    use bascule_types::{BootTime, Generation, Owner, SlotId, VolumeId};
    use bascule_volume_gate::{GateReader, GateWriter, boot_time_now};

    let dir = tempfile::tempdir().unwrap();
    let volume = VolumeId::random();
    let (writer, _) = GateWriter::open(dir.path().join("gate"), volume).unwrap();
    let reader = Arc::new(GateReader::open(dir.path().join("gate")).unwrap());
    let owner = |generation| Owner {
        slot: SlotId(1),
        generation: Generation(generation),
    };
    let gate = VolumeGate::new(reader, owner(4), None);
    assert!(!gate.is_open(), "no lease was published");
    writer
        .publish(owner(4), boot_time_now().after(Duration::from_secs(60)))
        .unwrap();
    assert!(gate.is_open());
    writer
        .publish(owner(5), boot_time_now().after(Duration::from_secs(60)))
        .unwrap();
    assert!(!gate.is_open(), "another generation");
    gate.set_owner(owner(5));
    assert!(gate.is_open(), "the ownership was kept");
    writer.publish(owner(5), BootTime(1)).unwrap();
    assert!(!gate.is_open(), "the lease ended");
}

#[derive(Clone, Copy, Debug)]
struct Step {
    sector: usize,
    sectors: usize,
    misalign: u64,
    fill: u8,
}

fn steps() -> impl Strategy<Value = Vec<Vec<Step>>> {
    let step = (
        0_usize..256,
        1_usize..32,
        prop::sample::select(vec![0_u64, 512, 1, 100]),
        any::<u8>(),
    )
        .prop_map(|(sector, sectors, misalign, fill)| Step {
            sector,
            sectors: sectors.min(256 - sector),
            misalign,
            fill,
        });
    prop::collection::vec(prop::collection::vec(step, 1..24), 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn concurrent_writes_of_any_alignment_end_as_if_done_in_order(
        batches in steps(),
        block_bytes in prop::sample::select(vec![None, Some(512_u32), Some(4096)]),
    ) {
        let direct = if block_bytes.is_none() { Bench::direct() } else { None };
        let mut bench = direct.unwrap_or_else(|| Bench::new(block_bytes.unwrap_or(4096)));
        let mut model = vec![0_u8; DISK_BYTES];
        for batch in batches {
            let mut tags = Vec::new();
            for (slot, step) in (0_u64..).zip(&batch) {
                let at = 0x1000 + slot * 0x8000 + step.misalign;
                let bytes = vec![step.fill; step.sectors * 512];
                tags.push(bench.write(step.sector as u64 * 512, at, &bytes));
                model[step.sector * 512..][..bytes.len()].copy_from_slice(&bytes);
                if step.fill % 5 == 0 {
                    bench.progress();
                }
            }
            for tag in tags {
                bench.wait(tag).unwrap();
            }
            prop_assert_eq!(&bench.on_volume(), &model);
            for step in &batch {
                let tag = bench.read(step.sector as u64 * 512, 0x10_0000 + step.misalign, step.sectors * 512);
                bench.wait(tag).unwrap();
                let expected = &model[step.sector * 512..][..step.sectors * 512];
                prop_assert_eq!(&bench.guest(0x10_0000 + step.misalign, step.sectors * 512), expected);
            }
        }
    }
}
