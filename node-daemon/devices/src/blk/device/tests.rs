use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};

use bascule_types::{Bytes as ByteCount, ExtentRun, Lba, OnError, WriterState};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::blk::Serial;
use crate::device::Device;
use crate::disk::{AlwaysOpen, ErrorPolicy, WriteGate};
use crate::failure::DeviceFailure;
use crate::testing::{
    Buffer, TestDriver, TestMachine, assert_golden, clear_dirty, dirty_pages, migrate, rings,
    wait_until, write_descriptor,
};

const DISK_BYTES: u64 = 1 << 20;
const FLUSH: u64 = F_FLUSH;

#[derive(Debug, Default)]
struct Switch(AtomicBool);

impl WriteGate for Switch {
    fn is_open(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }
}

/// A volume in a temporary file, on which the disk lies from block 16 on.
struct Volume {
    path: tempfile::TempPath,
    file: File,
}

impl Volume {
    fn new() -> Self {
        let named = tempfile::NamedTempFile::new().unwrap();
        named.as_file().set_len(DISK_BYTES + 16 * 4096).unwrap();
        let file = named.reopen().unwrap();
        Self {
            path: named.into_temp_path(),
            file,
        }
    }

    fn disk(&self, gate: Arc<dyn WriteGate>, block_bytes: u32, writable: bool) -> Disk {
        let file = File::options()
            .read(true)
            .write(writable)
            .open(&self.path)
            .unwrap();
        let run = ExtentRun {
            start: Lba(16),
            length: ByteCount(DISK_BYTES),
        };
        let mut disk = Disk::new(file.into(), &[run], ByteCount(DISK_BYTES), gate).unwrap();
        disk.block_bytes = block_bytes;
        disk
    }

    fn device(&self, machine: &TestMachine, gate: Arc<dyn WriteGate>) -> BlkDevice {
        BlkDevice::new(&config(), self.disk(gate, 4096, true), machine.context()).unwrap()
    }

    fn bytes(&self, offset: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, 16 * 4096 + offset)
            .unwrap();
        bytes
    }
}

fn config() -> BlkConfig {
    BlkConfig {
        name: "blk0".into(),
        serial: Serial::of_name("6fa459ea-ee8a-4ca4-894e-db77e160355e"),
        queue_count: 2,
        read_only: false,
    }
}

/// A request whose descriptor the device has not returned yet.
struct Out {
    head: u16,
    data: u64,
    status: u64,
}

fn offer(driver: &mut TestDriver, queue: u16, kind: u32, sector: u64, data: Buffer) -> Out {
    let header = driver.buffer(16, 0);
    driver.ram.write_obj(kind, GuestAddress(header)).unwrap();
    driver
        .ram
        .write_obj(sector, GuestAddress(header + 8))
        .unwrap();
    let status = driver.buffer(1, 0);
    driver.ram.write_obj(0xEE_u8, GuestAddress(status)).unwrap();
    let buffers = [
        Buffer::readable(header, 16),
        data,
        Buffer::writable(status, 1),
    ];
    let buffers: Vec<_> = buffers
        .into_iter()
        .filter(|buffer| buffer.length > 0)
        .collect();
    let head = driver.offer(queue, &buffers);
    Out {
        head,
        data: data.start,
        status,
    }
}

fn offer_write(
    driver: &mut TestDriver,
    queue: u16,
    sector: u64,
    bytes: &[u8],
    misalign: u64,
) -> Out {
    let data = driver.buffer(bytes.len(), misalign);
    driver.ram.write_slice(bytes, GuestAddress(data)).unwrap();
    offer(
        driver,
        queue,
        1,
        sector,
        Buffer::readable(data, bytes.len()),
    )
}

fn offer_read(
    driver: &mut TestDriver,
    queue: u16,
    sector: u64,
    length: usize,
    misalign: u64,
) -> Out {
    let data = driver.buffer(length, misalign);
    offer(driver, queue, 0, sector, Buffer::writable(data, length))
}

/// Notifies the queue and waits until `out` completes. Returns its status and length.
fn answer(driver: &mut TestDriver, queue: u16, out: &Out) -> (u8, u32) {
    driver.notify(queue);
    let (head, length) = driver.used(queue);
    assert_eq!(head, out.head);
    (status(driver, out), length)
}

fn status(driver: &TestDriver, out: &Out) -> u8 {
    driver.ram.read_obj(GuestAddress(out.status)).unwrap()
}

fn data(driver: &TestDriver, out: &Out, length: usize) -> Vec<u8> {
    let mut bytes = vec![0; length];
    driver
        .ram
        .read_slice(&mut bytes, GuestAddress(out.data))
        .unwrap();
    bytes
}

fn started() -> (TestMachine, Volume, TestDriver) {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let device = volume.device(&machine, Arc::new(AlwaysOpen));
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 2);
    (machine, volume, driver)
}

#[test]
fn virtio_5_2_4_the_configuration_describes_the_disk() {
    let (_, _volume, mut driver) = started();
    assert_eq!(driver.config(0, 8), (DISK_BYTES / 512).to_le_bytes());
    assert_eq!(driver.config(12, 4), 254_u32.to_le_bytes());
    assert_eq!(driver.config(20, 4), 4096_u32.to_le_bytes());
    assert_eq!(driver.config(34, 2), 2_u16.to_le_bytes());
    assert_eq!(driver.config(36, 2), [0, 0], "nothing beyond the structure");
}

#[test]
fn data_written_through_one_queue_is_read_through_another() {
    let (machine, volume, mut driver) = started();
    for (sector, length, misalign) in [(0, 4096, 0), (9, 512, 0), (33, 1536, 3), (64, 65536, 512)] {
        let bytes: Vec<u8> = (0..length)
            .map(|index: usize| u8::try_from(index % 251).unwrap() + 1)
            .collect();
        let out = offer_write(&mut driver, 0, sector, &bytes, misalign);
        assert_eq!(answer(&mut driver, 0, &out), (0, 1));
        assert_eq!(volume.bytes(sector * 512, length), bytes);
        let out = offer_read(&mut driver, 1, sector, length, misalign);
        assert_eq!(
            answer(&mut driver, 1, &out),
            (0, u32::try_from(length).unwrap() + 1)
        );
        assert_eq!(data(&driver, &out, length), bytes);
    }
    let out = offer(&mut driver, 0, 4, 0, Buffer::readable(0, 0));
    assert_eq!(answer(&mut driver, 0, &out), (0, 1), "flush");
    assert_eq!(machine.failures.all(), []);
}

#[test]
fn many_requests_at_once_on_two_queues_are_all_answered() {
    let (_machine, volume, mut driver) = started();
    let outs: Vec<_> = (0..20_u8)
        .map(|index| {
            let queue = u16::from(index % 2);
            let out = offer_write(&mut driver, queue, u64::from(index), &[index + 1; 512], 0);
            (queue, out)
        })
        .collect();
    driver.notify(0);
    driver.notify(1);
    for _ in 0..10 {
        driver.used(0);
        driver.used(1);
    }
    assert!(outs.iter().all(|(_, out)| status(&driver, out) == 0));
    let expected: Vec<u8> = (0..20_u8).flat_map(|index| [index + 1; 512]).collect();
    assert_eq!(volume.bytes(0, 20 * 512), expected);
}

#[test]
fn a_header_and_a_status_may_share_descriptors_with_the_data() {
    // 2.7.4.2: a device makes no assumptions about framing.
    let (_, volume, mut driver) = started();
    let request = driver.buffer(16 + 512, 0);
    driver.ram.write_obj(1_u32, GuestAddress(request)).unwrap();
    driver
        .ram
        .write_obj(5_u64, GuestAddress(request + 8))
        .unwrap();
    driver
        .ram
        .write_slice(&[0x5A; 512], GuestAddress(request + 16))
        .unwrap();
    let status = driver.buffer(1, 0);
    let buffers = [
        Buffer::readable(request, 7),
        Buffer::readable(request + 7, 100),
        Buffer::readable(request + 107, 421),
        Buffer::writable(status, 1),
    ];
    driver.offer(0, &buffers);
    driver.notify(0);
    driver.used(0);
    assert_eq!(volume.bytes(5 * 512, 512), [0x5A; 512]);
    let mut request = [0; 16];
    request[8] = 5;
    let header = driver.buffer(16, 0);
    driver
        .ram
        .write_slice(&request, GuestAddress(header))
        .unwrap();
    let data = driver.buffer(513, 0);
    driver.offer(
        0,
        &[Buffer::readable(header, 16), Buffer::writable(data, 513)],
    );
    driver.notify(0);
    assert_eq!(driver.used(0).1, 513);
    let mut read = [1; 513];
    driver
        .ram
        .read_slice(&mut read, GuestAddress(data))
        .unwrap();
    assert_eq!(read[..512], [0x5A; 512]);
    assert_eq!(read[512], 0, "the status is the last byte");
}

#[test]
fn virtio_5_2_6_the_guest_reads_the_disks_serial_number() {
    let (_, _volume, mut driver) = started();
    let buffer = driver.buffer(20, 0);
    let out = offer(&mut driver, 0, 8, 0, Buffer::writable(buffer, 20));
    assert_eq!(answer(&mut driver, 0, &out), (0, 21));
    assert_eq!(data(&driver, &out, 20), b"6fa459ea-ee-1836b567");
}

#[test]
fn requests_beyond_the_disk_or_unknown_are_answered_with_a_status() {
    let (machine, _volume, mut driver) = started();
    let last = DISK_BYTES / 512;
    for (kind, sector, length, expected) in [
        (0, last, 512, 1),
        (0, u64::MAX, 512, 1),
        (0, 0, 100, 1),
        (11, 0, 512, 2),
        (99, 0, 512, 2),
    ] {
        let buffer = driver.buffer(length, 0);
        let out = offer(
            &mut driver,
            0,
            kind,
            sector,
            Buffer::writable(buffer, length),
        );
        assert_eq!(
            answer(&mut driver, 0, &out),
            (expected, 1),
            "type {kind} sector {sector}"
        );
    }
    let out = offer_write(&mut driver, 0, last - 1, &[1; 1024], 0);
    assert_eq!(answer(&mut driver, 0, &out), (1, 1));
    assert_eq!(
        machine.failures.all(),
        [],
        "invalid requests are not failures of the disk"
    );
}

#[test]
fn a_read_only_disk_refuses_writes() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let config = BlkConfig {
        read_only: true,
        ..config()
    };
    let disk = volume.disk(Arc::new(AlwaysOpen), 512, false);
    let device = BlkDevice::new(&config, disk, machine.context()).unwrap();
    let mut driver = TestDriver::new(&machine, device.function);
    assert_ne!(driver.offered() & F_RO, 0);
    driver.start(FLUSH | F_RO, 1);
    let out = offer_write(&mut driver, 0, 0, &[1; 512], 0);
    assert_eq!(answer(&mut driver, 0, &out), (1, 1));
    assert_eq!(machine.failures.all(), []);
}

#[test]
fn a_closed_gate_stalls_the_guest_without_an_error() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let gate = Arc::new(Switch::default());
    let device = volume.device(&machine, gate.clone());
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 2);
    let write = offer_write(&mut driver, 0, 0, &[9; 4096], 0);
    driver.notify(0);
    wait_until("the stall", || device.metrics.counts().stalled);
    let read = offer_read(&mut driver, 1, 0, 4096, 0);
    assert_eq!(answer(&mut driver, 1, &read).0, 0, "reads continue");
    assert_eq!(data(&driver, &read, 4096), [0; 4096]);
    assert!(driver.poll_used(0).is_none());

    gate.0.store(true, Ordering::Relaxed);
    assert_eq!(driver.used(0).0, write.head);
    assert_eq!(status(&driver, &write), 0);
    wait_until("the stall's end", || !device.metrics.counts().stalled);
    assert_eq!(volume.bytes(0, 4096), [9; 4096]);
    assert_eq!(machine.failures.all(), []);
}

#[test]
fn every_page_that_the_device_writes_is_in_the_dirty_bitmap_when_it_has_paused() {
    let (_machine, _volume, mut driver) = started();
    let aligned = offer_read(&mut driver, 0, 0, 8192, 0);
    let bounced = offer_read(&mut driver, 1, 1, 512, 100);
    clear_dirty(&driver.ram);
    driver.notify(0);
    driver.notify(1);
    driver.used(0);
    driver.used(1);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let page = |address: u64| address / 4096;
    let expected = [
        page(aligned.data),
        page(aligned.data) + 1,
        page(aligned.status),
        page(bounced.data),
        page(bounced.status),
        page(rings(0)[2]),
        page(rings(1)[2]),
    ];
    assert_eq!(dirty_pages(&driver.ram), expected.into_iter().collect());
}

#[test]
fn i3_requests_that_were_stalled_are_performed_after_a_migration() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let device = volume.device(&machine, Arc::new(Switch::default()));
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 2);
    let whole = offer_write(&mut driver, 0, 0, &[1; 4096], 0);
    let sector = offer_write(&mut driver, 1, 100, &[2; 512], 3);
    let flush = offer(&mut driver, 1, 4, 0, Buffer::readable(0, 0));
    driver.notify(0);
    driver.notify(1);
    wait_until("the stall", || device.metrics.counts().stalled);

    let other = TestMachine::with_ram(machine.ram.clone());
    let fresh = volume.device(&other, Arc::new(AlwaysOpen));
    migrate(&mut driver, fresh.function);
    assert_eq!(driver.used(0).0, whole.head);
    let answered = [driver.used(1).0, driver.used(1).0];
    assert_eq!(answered, [sector.head, flush.head]);
    assert!(
        [&whole, &sector, &flush]
            .iter()
            .all(|out| status(&driver, out) == 0)
    );
    assert_eq!(volume.bytes(0, 4096), [1; 4096]);
    assert_eq!(volume.bytes(100 * 512, 512), [2; 512]);
    let read = offer_read(&mut driver, 0, 100, 512, 0);
    assert_eq!(answer(&mut driver, 0, &read).0, 0);
    assert_eq!(data(&driver, &read, 512), [2; 512]);
}

#[test]
fn i3_requests_under_way_at_a_migration_are_answered_exactly_once() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let gate = Arc::new(Switch(AtomicBool::new(true)));
    let device = volume.device(&machine, gate.clone());
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH | (1 << 29), 2);
    for round in 0..20_u8 {
        // In every third round the gate closes somewhere on the way.
        let outs: Vec<_> = (0..12_u8)
            .map(|index| {
                if round % 3 == 0 && index == 5 {
                    gate.0.store(false, Ordering::Relaxed);
                }
                let queue = u16::from(index % 2);
                let bytes = vec![round * 12 + index + 1; 512 + 4096 * usize::from(index % 3)];
                let sector = u64::from(index) * 20 + u64::from(round % 4);
                let out = offer_write(&mut driver, queue, sector, &bytes, 0);
                driver.notify(queue);
                (sector, bytes, out)
            })
            .collect();
        let other = TestMachine::with_ram(machine.ram.clone());
        migrate(&mut driver, volume.device(&other, gate.clone()).function);
        gate.0.store(true, Ordering::Relaxed);
        for queue in [0, 1] {
            let mut heads: Vec<_> = (0..6).map(|_| driver.used(queue).0).collect();
            heads.sort_unstable();
            heads.dedup();
            assert_eq!(heads.len(), 6, "each request is answered once");
            assert_eq!(driver.poll_used(queue), None);
        }
        for (sector, bytes, out) in outs {
            assert_eq!(status(&driver, &out), 0);
            assert_eq!(volume.bytes(sector * 512, bytes.len()), bytes);
        }
        driver.reuse_buffers();
    }
}

#[test]
fn a_stalled_guest_continues_after_an_aborted_migration_and_after_a_reset() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let gate = Arc::new(Switch::default());
    let device = volume.device(&machine, gate.clone());
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 1);
    let write = offer_write(&mut driver, 0, 0, &[9; 4096], 0);
    driver.notify(0);
    wait_until("the stall", || device.metrics.counts().stalled);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    driver.function.resume();
    gate.0.store(true, Ordering::Relaxed);
    assert_eq!(driver.used(0).0, write.head);

    gate.0.store(false, Ordering::Relaxed);
    offer_write(&mut driver, 0, 0, &[7; 4096], 0);
    driver.notify(0);
    wait_until("the stall", || device.metrics.counts().stalled);
    driver.start(FLUSH, 1);
    gate.0.store(true, Ordering::Relaxed);
    let read = offer_read(&mut driver, 0, 0, 4096, 0);
    assert_eq!(answer(&mut driver, 0, &read).0, 0);
    assert_eq!(
        data(&driver, &read, 4096),
        [9; 4096],
        "the write of a driver that was reset is dropped"
    );
}

#[test]
fn i3_a_reset_of_the_machine_drops_what_waits_for_the_gate_and_keeps_what_has_landed() {
    let (machine, volume) = (TestMachine::new(), Volume::new());
    let gate = Arc::new(Switch(AtomicBool::new(true)));
    let device = volume.device(&machine, gate.clone());
    let metrics = device.metrics.clone();
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 2);
    let landed = offer_write(&mut driver, 0, 0, &[1; 4096], 0);
    driver.notify(0);
    assert_eq!(answer(&mut driver, 0, &landed), (0, 1));
    gate.0.store(false, Ordering::Relaxed);
    let waiting = offer_write(&mut driver, 0, 8, &[2; 4096], 0);
    driver.notify(0);
    wait_until("a stall", || metrics.counts().stalled);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    driver.function.reset();
    assert!(!metrics.counts().stalled);
    gate.0.store(true, Ordering::Relaxed);
    driver.function.resume();
    // The driver of the next boot.
    driver.start(FLUSH, 2);
    let next = offer_write(&mut driver, 0, 16, &[3; 4096], 0);
    driver.notify(0);
    assert_eq!(answer(&mut driver, 0, &next), (0, 1));
    assert_eq!(status(&driver, &waiting), 0xEE, "it was not answered");
    assert_eq!(volume.bytes(0, 4096), [1; 4096]);
    assert_eq!(volume.bytes(4096, 4096), [0; 4096]);
    assert_eq!(volume.bytes(8192, 4096), [3; 4096]);
}

#[test]
fn a_failed_write_is_the_guests_error_and_is_reported_once() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let disk = volume.disk(Arc::new(AlwaysOpen), 512, false);
    let device = BlkDevice::new(&config(), disk, machine.context()).unwrap();
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 1);
    for _ in 0..2 {
        let out = offer_write(&mut driver, 0, 0, &[1; 512], 0);
        assert_eq!(answer(&mut driver, 0, &out), (1, 1));
    }
    let out = offer_read(&mut driver, 0, 0, 512, 0);
    assert_eq!(answer(&mut driver, 0, &out).0, 0);
    let failures = machine.failures.all();
    assert!(
        matches!(
            &failures[..],
            [DeviceFailure::DiskFailed {
                operation: "write",
                ..
            }]
        ),
        "{failures:?}"
    );
    assert!(!failures[0].ends_the_machine());
    assert_eq!(driver.status() & 0x40, 0, "the device itself works");
}

#[test]
fn with_the_policy_to_pause_the_guest_gets_no_error_and_its_request_waits_for_the_resume() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let errors = Arc::new(ErrorPolicy::new(OnError::Pause));
    let disk = volume.disk(Arc::new(AlwaysOpen), 512, false);
    let disk = disk.with_errors(Arc::clone(&errors));
    let device = BlkDevice::new(&config(), disk, machine.context()).unwrap();
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 1);
    let out = offer_write(&mut driver, 0, 0, &[1; 512], 0);
    driver.notify(0);
    let held = |failure: &DeviceFailure| {
        matches!(
            failure,
            DeviceFailure::DiskHeld {
                operation: "write",
                ..
            }
        )
    };
    wait_until("the request to be held", || {
        machine.failures.all().iter().any(held)
    });
    assert!(
        !machine
            .failures
            .all()
            .iter()
            .any(DeviceFailure::ends_the_machine)
    );
    assert_eq!(driver.function.pause(), WriterState::Unclean);
    errors.set(OnError::Report);
    driver.function.resume();
    assert_eq!(
        answer(&mut driver, 0, &out),
        (1, 1),
        "the next attempt's error"
    );
}

#[test]
fn a_device_whose_write_failed_pauses_unclean_even_after_a_reset() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let disk = volume.disk(Arc::new(AlwaysOpen), 512, false);
    let device = BlkDevice::new(&config(), disk, machine.context()).unwrap();
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 1);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    driver.function.resume();
    let out = offer_write(&mut driver, 0, 0, &[1; 512], 0);
    assert_eq!(answer(&mut driver, 0, &out), (1, 1));
    driver.start(FLUSH, 1);
    assert_eq!(driver.function.pause(), WriterState::Unclean);
    driver.function.reset();
    assert_eq!(driver.function.pause(), WriterState::Unclean);
    let counts = device.metrics.counts();
    assert_eq!(
        (counts.in_flight, counts.writer_state),
        (0, WriterState::Unclean)
    );
}

#[test]
fn i7_malformed_requests_stop_the_device_with_a_reason() {
    for (buffers, reason) in [
        (vec![Buffer::readable(0x1000, 16)], "no room for a status"),
        (
            vec![Buffer::readable(0x1000, 15), Buffer::writable(0x2000, 1)],
            "shorter than its header",
        ),
        (
            vec![
                Buffer::readable(0x1000, 16),
                Buffer::writable(0xF000_0000, 512),
            ],
            "not guest memory",
        ),
    ] {
        let (machine, _volume, mut driver) = started();
        driver.offer(1, &buffers);
        driver.notify(1);
        wait_until("NEEDS_RESET", || driver.status() & 0x40 != 0);
        let text = machine.failures.all()[0].to_string();
        assert!(
            text.starts_with("blk0: bad virtqueue 1: ") && text.contains(reason),
            "{text}"
        );
    }
}

#[test]
fn i7_a_chain_offered_again_and_again_is_refused_while_the_gate_is_closed() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let device = volume.device(&machine, Arc::new(Switch::default()));
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH, 1);
    let out = offer_write(&mut driver, 0, 0, &[1; 512], 0);
    for _ in 0..200 {
        driver.notify(0);
        if driver.status() & 0x40 != 0 {
            break;
        }
        driver.offer_head(0, out.head);
        std::thread::park_timeout(std::time::Duration::from_micros(100));
    }
    wait_until("NEEDS_RESET", || driver.status() & 0x40 != 0);
    let text = machine.failures.all()[0].to_string();
    assert!(
        text.contains("made available again") || text.contains("available ring index"),
        "{text}"
    );
    assert_eq!(driver.function.pause(), WriterState::Clean);
    driver.start(FLUSH, 1);
}

#[test]
fn requests_with_indirect_descriptors_complete() {
    let (_, volume, mut driver) = started();
    let table = driver.buffer(64, 0);
    let header = driver.buffer(16, 0);
    driver.ram.write_obj(1_u32, GuestAddress(header)).unwrap();
    driver
        .ram
        .write_obj(3_u64, GuestAddress(header + 8))
        .unwrap();
    let data = driver.buffer(512, 0);
    driver
        .ram
        .write_slice(&[0x77; 512], GuestAddress(data))
        .unwrap();
    let status = driver.buffer(1, 0);
    write_descriptor(&driver.ram, table, 0, (header, 16, 1, 1));
    write_descriptor(&driver.ram, table, 1, (data, 512, 1, 2));
    write_descriptor(&driver.ram, table, 2, (status, 1, 2, 0));
    write_descriptor(&driver.ram, rings(0)[0], 9, (table, 48, 4, 0));
    driver.offer_head(0, 9);
    driver.notify(0);
    assert_eq!(driver.used(0), (9, 1));
    assert_eq!(volume.bytes(3 * 512, 512), [0x77; 512]);
}

#[test]
fn a_disk_of_another_size_refuses_the_state_and_the_guest_keeps_its_block_size() {
    let (machine, volume, mut driver) = started();
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let saved = driver.function.save();
    let restore = |disk: Disk| {
        let device = BlkDevice::new(&config(), disk, machine.context()).unwrap();
        let mut other = TestDriver::new(&machine, device.function);
        assert_eq!(other.function.pause(), WriterState::Clean);
        let result = other.function.restore(&saved);
        (result, other)
    };
    let mut smaller = volume.disk(Arc::new(AlwaysOpen), 512, true);
    let run = ExtentRun {
        start: Lba(0),
        length: ByteCount(4096),
    };
    smaller.extents = crate::disk::ExtentMap::new(&[run], ByteCount(4096)).unwrap();
    let text = restore(smaller).0.unwrap_err().to_string();
    assert!(
        text.contains("the source has a disk of 1048576 bytes, this device one of 4096"),
        "{text}"
    );

    let (result, mut other) = restore(volume.disk(Arc::new(AlwaysOpen), 512, true));
    result.unwrap();
    assert_eq!(other.config(20, 4), 4096_u32.to_le_bytes());
}

#[test]
fn golden_state_version_1_is_still_read_and_written() {
    let machine = TestMachine::new();
    let volume = Volume::new();
    let gate = Arc::new(Switch::default());
    let device = volume.device(&machine, gate.clone());
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(FLUSH | (1 << 29), 2);
    driver.enable_vector(1, 0x31);
    driver.write16(0x16, 0);
    driver.write16(0x1A, 1);
    let read = offer_read(&mut driver, 0, 0, 512, 0);
    answer(&mut driver, 0, &read);
    offer_write(&mut driver, 1, 8, &[1; 512], 0);
    driver.notify(1);
    wait_until("the stall", || device.metrics.counts().stalled);
    let fresh = volume.device(&machine, gate).function;
    let golden = include_str!("../../../golden/virtio-blk-v1.json");
    assert_golden(&mut driver, fresh, golden);
}
