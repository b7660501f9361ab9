//! What becomes of commands that fail.

use super::*;

#[test]
fn the_gate_is_told_of_a_failed_write_before_it_is_told_that_none_is_in_flight() {
    #[derive(Debug, Default)]
    struct Log(std::sync::Mutex<Vec<&'static str>>);
    impl WriteGate for Log {
        fn is_open(&self) -> bool {
            self.0.lock().unwrap().push("check");
            true
        }
        fn write_begins(&self) {
            self.0.lock().unwrap().push("begins");
        }
        fn writes_ended(&self) {
            self.0.lock().unwrap().push("ended");
        }
        fn write_failed(&self) {
            self.0.lock().unwrap().push("failed");
        }
    }
    let gate = Arc::new(Log::default());
    let mut bench = Bench::with(512, gate.clone(), false);
    let write = bench.write(0, 0x1000, &[1; 512]);
    bench.wait(write).unwrap_err();
    bench.progress();
    let log = gate.0.lock().unwrap().clone();
    assert_eq!(log, ["begins", "check", "failed", "ended"]);
}

/// The engine used to refuse every write after the first one that failed.
#[test]
fn a_failed_write_is_an_error_of_that_write_alone() {
    let mut bench = Bench::with(512, Arc::new(AlwaysOpen), false);
    let write = bench.write(0, 0x1000, &[1; 512]);
    bench.wait(write).unwrap_err();
    let (operation, reason) = bench.engine.take_failure().unwrap();
    assert_eq!(operation, "write");
    assert!(reason.contains("Bad file descriptor"), "{reason}");
    assert_eq!(bench.engine.take_failure(), None, "returned once");
    let flush = bench.enqueue(Operation::Flush);
    bench.wait(flush).unwrap();
    let write = bench.write(0, 0x1000, &[1; 512]);
    let error = bench.wait(write).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EBADF), "it was submitted");
    assert_eq!(bench.engine.take_failure(), None, "only the first one");
    let read = bench.read(0, 0x1000, 512);
    bench.wait(read).unwrap();
    assert_eq!(bench.engine.writer_state(), WriterState::Unclean);
}

#[test]
fn a_write_waits_for_a_lost_path_and_lands_when_it_is_back() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, connect, socket};
    let socket = socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    // Without a peer it refuses writes with ENOTCONN.
    let path = File::from(socket.try_clone().unwrap());
    let dir = tempfile::tempdir().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("target")).unwrap();
    let volume = tempfile::tempfile().unwrap();
    let mut bench = Bench::on(path, volume, 512, Arc::new(AlwaysOpen));
    // Where the volume begins: a socket has no other offset.
    let write = bench.write(8 * 4096, 0x1000, &[7; 512]);
    wait_until("the stall", || {
        bench.progress();
        bench.engine.stats().stalled
    });
    assert!(!bench.is_done(write), "the guest sees no error");
    assert!(bench.engine.retry_after().unwrap() > GATE_POLL, "no storm");
    assert_eq!(bench.engine.writer_state(), WriterState::Unclean);

    connect(
        &socket,
        &SocketAddrUnix::new(dir.path().join("target")).unwrap(),
    )
    .unwrap();
    bench.wait(write).unwrap();
    assert_eq!(bench.engine.retry_after(), None);
    let (mut target, _) = listener.accept().unwrap();
    let mut landed = [0; 512];
    io::Read::read_exact(&mut target, &mut landed).unwrap();
    assert_eq!(landed, [7; 512]);
    assert_eq!(
        bench.engine.writer_state(),
        WriterState::Unclean,
        "an attempt that failed may land once more"
    );
}

/// The memory of this process as a device: where nothing is mapped, reads and writes fail with `EIO`.
struct MemoryDevice {
    base: usize,
}

impl MemoryDevice {
    const BYTES: usize = 16 * 4096;

    fn new() -> Self {
        let mut device = Self { base: 0 };
        device.base = device.map(0, Self::BYTES, 0);
        device
    }

    /// Maps zeroes at `at`, or anywhere.
    #[expect(unsafe_code, reason = "holes in the address space")]
    fn map(&self, at: usize, length: usize, fixed: libc::c_int) -> usize {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | fixed;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let at = std::ptr::with_exposed_provenance_mut(at);
        // SAFETY: new memory, at a place where nothing else is: chosen by the kernel, or not to be replaced.
        let address = unsafe { libc::mmap(at, length, access, flags, -1, 0) };
        assert_ne!(address, libc::MAP_FAILED, "{}", io::Error::last_os_error());
        address.expose_provenance()
    }

    fn set_there(&self, block: usize, there: bool) {
        let at = self.base + block * 4096;
        if there {
            self.map(at, 4096, libc::MAP_FIXED_NOREPLACE);
        } else {
            self.unmap(at);
        }
    }

    #[expect(unsafe_code, reason = "holes in the address space")]
    fn unmap(&self, at: usize) {
        // SAFETY: a page of this device, into which no reference exists.
        let failed = unsafe { libc::munmap(std::ptr::with_exposed_provenance_mut(at), 4096) };
        assert_eq!(failed, 0);
    }

    /// A disk on its blocks from 8 on; its block 0 is the one that is read to see whether it is there.
    fn bench(&self) -> Bench {
        let open = || {
            File::options()
                .read(true)
                .write(true)
                .open("/proc/self/mem")
        };
        let mut bench = Bench::on(open().unwrap(), open().unwrap(), 512, Arc::new(AlwaysOpen));
        let start = u64::try_from(self.base / 4096 + 8).unwrap();
        let run = ExtentRun {
            start: Lba(start),
            length: ByteCount(8 * 4096),
        };
        let disk = Disk {
            file: open().unwrap().into(),
            extents: ExtentMap::new(&[run], ByteCount(8 * 4096)).unwrap(),
            block_bytes: 512,
            gate: Arc::new(AlwaysOpen),
            probe_offset: u64::try_from(self.base).unwrap(),
            errors: Arc::clone(&bench.errors),
            settle: SETTLE,
        };
        bench.engine = DiskEngine::new(disk, bench.ram.clone()).unwrap();
        bench
    }
}

#[test]
fn an_io_error_of_one_block_is_the_guests_while_the_device_is_there() {
    let device = MemoryDevice::new();
    let mut bench = device.bench();
    device.set_there(9, false);
    let bad = bench.read(4096, 0x1000, 512);
    let good = bench.read(0, 0x2000, 512);
    bench.wait(good).unwrap();
    let error = bench.wait(bad).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EIO));
    assert_eq!(bench.engine.writer_state(), WriterState::Clean);
    let write = bench.write(4096, 0x1000, &[7; 512]);
    bench.wait(write).unwrap_err();
    assert_eq!(bench.engine.writer_state(), WriterState::Unclean);
}

/// Linux says `EIO` for each of its blocks, as for a bad sector.
#[test]
fn an_io_error_of_a_device_that_is_gone_is_a_lost_path_for_the_guest() {
    let device = MemoryDevice::new();
    let mut bench = device.bench();
    for block in [0, 9] {
        device.set_there(block, false);
    }
    // The policy for a bad sector does not matter.
    bench.errors.set(OnError::Pause);
    let read = bench.read(4096, 0x1000, 512);
    wait_until("the stall", || {
        bench.progress();
        bench.engine.stats().stalled
    });
    assert!(!bench.is_done(read), "the guest sees no error");
    assert!(bench.engine.retry_after().unwrap() > GATE_POLL, "no storm");
    assert_eq!(bench.engine.take_held(), None, "nothing to confirm");
    for block in [0, 9] {
        device.set_there(block, true);
    }
    bench.wait(read).unwrap();
    assert_eq!(bench.engine.writer_state(), WriterState::Clean);
}

#[test]
fn a_failed_write_leaves_the_engine_unclean_for_good() {
    let mut bench = Bench::with(512, Arc::new(AlwaysOpen), false);
    let read = bench.read(0, 0x1000, 512);
    bench.wait(read).unwrap();
    assert_eq!(bench.engine.writer_state(), WriterState::Clean);
    let write = bench.write(0, 0x1000, &[1; 512]);
    bench.wait(write).unwrap_err();
    let drained = bench.engine.drain().unwrap();
    assert_eq!(bench.engine.stats().in_flight, 0);
    assert_eq!(
        drained.writer_state,
        WriterState::Unclean,
        "an idle engine whose write failed"
    );
    let read = bench.read(0, 0x1000, 512);
    bench.wait(read).unwrap();
    bench.engine.take_failure().unwrap();
    bench.engine.clear();
    let drained = bench.engine.drain().unwrap();
    assert_eq!(drained.writer_state, WriterState::Unclean);
    assert_eq!(bench.engine.stats().writer_state, WriterState::Unclean);
}

#[test]
fn a_failed_flush_leaves_the_engine_unclean() {
    let volume = tempfile::tempfile().unwrap();
    // The null device accepts writes and refuses fdatasync.
    let null = File::options().write(true).open("/dev/null").unwrap();
    let mut bench = Bench::on(null, volume, 512, Arc::new(AlwaysOpen));
    let write = bench.write(0, 0x1000, &[1; 512]);
    bench.wait(write).unwrap();
    let drained = bench.engine.drain().unwrap();
    assert_eq!(drained.writer_state, WriterState::Clean);
    let flush = bench.enqueue(Operation::Flush);
    bench.wait(flush).unwrap_err();
    let drained = bench.engine.drain().unwrap();
    assert_eq!(drained.writer_state, WriterState::Unclean);
}

#[test]
fn refused_requests_failed_reads_and_stalled_writes_leave_the_engine_clean() {
    let gate = Arc::new(TestGate::default());
    let mut bench = Bench::with(512, gate, true);
    let refused = bench.write(DISK_BYTES as u64, 0x1000, &[1; 512]);
    bench.wait(refused).unwrap_err();
    bench.volume.set_len(70 * 4096).unwrap();
    let read = bench.read(0, 0x1000, 8 * 4096);
    bench.wait(read).unwrap_err();
    bench.write(0, 0x1000, &[1; 512]);
    bench.progress();
    assert!(bench.engine.stats().stalled);
    let drained = bench.engine.drain().unwrap();
    assert_eq!(
        drained.writer_state,
        WriterState::Clean,
        "a write that was never submitted cannot land"
    );
}

/// A descriptor without the right to write stands for a bad sector.
#[test]
fn with_the_policy_to_pause_a_failed_write_is_held_and_tried_again_on_request() {
    let mut bench = Bench::with(512, Arc::new(AlwaysOpen), false);
    bench.errors.set(OnError::Pause);
    let write = bench.write(0, 0x1000, &[1; 512]);
    let mut held = None;
    wait_until("the request to be held", || {
        bench.progress();
        held = bench.engine.take_held();
        held.is_some()
    });
    let (operation, reason) = held.unwrap();
    assert_eq!(operation, "write");
    assert!(reason.contains("Bad file descriptor"), "{reason}");
    assert_eq!(bench.engine.writer_state(), WriterState::Unclean);
    // Nothing goes on meanwhile, and nothing polls.
    let read = bench.read(0, 0x2000, 512);
    bench.progress();
    assert!(!bench.is_done(write) && !bench.is_done(read));
    assert_eq!(bench.engine.retry_after(), None);
    assert!(bench.engine.stats().stalled);

    // It fails again, and is held again.
    bench.engine.retry_held();
    wait_until("the request to be held again", || {
        bench.progress();
        bench.engine.take_held().is_some()
    });
    assert!(!bench.is_done(write));

    // With the other policy the guest gets the error of the next attempt.
    bench.errors.set(OnError::Report);
    bench.engine.retry_held();
    bench.wait(write).unwrap_err();
    bench.wait(read).unwrap();
}

#[test]
fn a_failed_flush_is_the_guests_error_whatever_the_policy() {
    let volume = tempfile::tempfile().unwrap();
    // The null device refuses fdatasync.
    let null = File::options().write(true).open("/dev/null").unwrap();
    let mut bench = Bench::on(null, volume, 512, Arc::new(AlwaysOpen));
    bench.errors.set(OnError::Pause);
    let flush = bench.enqueue(Operation::Flush);
    bench.wait(flush).unwrap_err();
    assert_eq!(bench.engine.take_held(), None);
}

/// The engine used to submit it at once: the failed write could land after it, and undo it.
#[test]
fn a_write_waits_until_one_that_failed_on_its_blocks_has_settled() {
    let volume = tempfile::tempfile().unwrap();
    let read_only = || File::open("/dev/zero").unwrap();
    let mut bench = Bench::on(read_only(), volume, 4096, Arc::new(AlwaysOpen));
    bench.engine.disk.settle = Duration::from_secs(3600);
    bench.engine.unsettled = Unsettled::new(bench.engine.disk.settle);
    let failed = bench.write(512, 0x1000, &[1; 512]);
    bench.wait(failed).unwrap_err();
    let same_block = bench.write(0, 0x1000, &[2; 512]);
    let flush = bench.enqueue(Operation::Flush);
    let other_block = bench.write(4096, 0x2000, &[3; 4096]);
    let read = bench.read(0, 0x3000, 4096);
    bench.wait(other_block).unwrap_err();
    bench.wait(read).unwrap();
    assert!(!bench.is_done(same_block) && !bench.is_done(flush));
    assert!(bench.engine.stats().stalled);
    let wait = bench.engine.retry_after().unwrap();
    assert!(wait > GATE_POLL && wait <= bench.engine.disk.settle);
    // The device is reset: the guest knows nothing of the write any more, and the range stays.
    bench.engine.drain().unwrap();
    bench.engine.clear();
    assert_eq!(bench.engine.retry_after(), None);
    let again = bench.write(0, 0x1000, &[2; 512]);
    bench.progress();
    assert!(!bench.is_done(again) && bench.engine.stats().stalled);
}
