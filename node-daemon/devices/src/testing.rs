//! Test doubles: a hypervisor that records its calls, and a guest driver that accesses a function
//! through its registers only, as a real driver does.

#![expect(
    clippy::unwrap_used,
    reason = "an expectation that does not hold is a finding"
)]
#![cfg_attr(not(test), expect(dead_code, reason = "fuzzing uses a part of it"))]

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bascule_types::WriterState;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::EventFd;

use crate::device::Device;
use crate::failure::{DeviceFailure, FailureSink};
use crate::guest_ram::GuestRam;
use crate::interrupt::{Gsi, MsiMessage, MsiRouter};
use crate::ioeventfd::IoeventfdRegistry;
use crate::pci::PciFunction;
use crate::state::DeviceState;
use crate::virtio::{DeviceContext, VirtioFunction};

#[derive(Debug, Default)]
pub(crate) struct RecordingRouter(Mutex<Vec<RecordedGsi>>);

#[derive(Debug, Default)]
struct RecordedGsi {
    route: Option<MsiMessage>,
    irqfd: Option<EventFd>,
    raised: u64,
}

impl RecordingRouter {
    pub(crate) fn route(&self, gsi: usize) -> Option<MsiMessage> {
        self.0.lock().unwrap()[gsi].route
    }

    /// How often a GSI was raised since the router was made.
    pub(crate) fn raised(&self, gsi: usize) -> u64 {
        let mut gsis = self.0.lock().unwrap();
        let gsi = &mut gsis[gsi];
        gsi.raised += gsi.irqfd.as_ref().unwrap().read().unwrap_or(0);
        gsi.raised
    }
}

impl MsiRouter for RecordingRouter {
    fn allocate_gsi(&self) -> io::Result<Gsi> {
        let mut gsis = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gsis.push(RecordedGsi::default());
        Ok(Gsi(u32::try_from(gsis.len() - 1).map_err(io::Error::other)?))
    }

    fn set_route(&self, gsi: Gsi, message: MsiMessage) -> io::Result<()> {
        let mut gsis = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gsis[gsi.0 as usize].route = Some(message);
        Ok(())
    }

    fn attach_irqfd(&self, gsi: Gsi, irqfd: &EventFd) -> io::Result<()> {
        let mut gsis = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        gsis[gsi.0 as usize].irqfd = Some(irqfd.try_clone()?);
        Ok(())
    }
}

/// Ioeventfds that a test signals by address.
#[derive(Debug, Default)]
pub(crate) struct RecordingIoeventfds(Mutex<BTreeMap<u64, EventFd>>);

impl RecordingIoeventfds {
    pub(crate) fn addresses(&self) -> Vec<u64> {
        self.0.lock().unwrap().keys().copied().collect()
    }

    pub(crate) fn ring(&self, address: u64) {
        self.0.lock().unwrap()[&address].write(1).unwrap();
    }
}

impl IoeventfdRegistry for RecordingIoeventfds {
    fn register(&self, ioeventfd: &EventFd, address: GuestAddress) -> io::Result<()> {
        let mut ioeventfds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ioeventfds.insert(address.0, ioeventfd.try_clone()?);
        Ok(())
    }

    fn unregister(&self, _ioeventfd: &EventFd, address: GuestAddress) -> io::Result<()> {
        let mut ioeventfds = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        ioeventfds
            .remove(&address.0)
            .map(drop)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}

#[derive(Debug, Default)]
pub(crate) struct RecordingFailures(Mutex<Vec<DeviceFailure>>);

impl RecordingFailures {
    pub(crate) fn all(&self) -> Vec<DeviceFailure> {
        self.0.lock().unwrap().clone()
    }
}

impl FailureSink for RecordingFailures {
    fn device_failed(&self, failure: DeviceFailure) {
        self.0.lock().unwrap().push(failure);
    }
}

/// A virtual machine without vCPUs.
pub(crate) struct TestMachine {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) router: Arc<RecordingRouter>,
    pub(crate) ioeventfds: Arc<RecordingIoeventfds>,
    pub(crate) failures: Arc<RecordingFailures>,
}

impl TestMachine {
    pub(crate) fn new() -> Self {
        let range = [(GuestAddress(0), RAM_BYTES)];
        Self::with_ram(Arc::new(GuestRam::from_ranges(&range).unwrap()))
    }

    /// A second machine on the same memory: the destination of a migration.
    pub(crate) fn with_ram(ram: Arc<GuestRam>) -> Self {
        Self {
            ram,
            router: Arc::default(),
            ioeventfds: Arc::default(),
            failures: Arc::default(),
        }
    }

    pub(crate) fn context(&self) -> DeviceContext {
        DeviceContext {
            ram: self.ram.clone(),
            msi: self.router.clone(),
            ioeventfds: self.ioeventfds.clone(),
            failures: self.failures.clone(),
        }
    }
}

/// A guest driver for one function.
pub(crate) struct TestDriver {
    pub(crate) ram: Arc<GuestRam>,
    pub(crate) function: VirtioFunction,
    queues: Vec<DriverQueue>,
    next_buffer: u64,
}

#[derive(Clone, Copy, Default)]
struct DriverQueue {
    next_descriptor: u16,
    available: u16,
    seen: u16,
}

/// A descriptor of a chain.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Buffer {
    pub(crate) start: u64,
    pub(crate) length: u32,
    pub(crate) writable: bool,
}

impl Buffer {
    pub(crate) fn readable(start: u64, length: usize) -> Self {
        let length = u32::try_from(length).unwrap();
        Self {
            start,
            length,
            writable: false,
        }
    }

    pub(crate) fn writable(start: u64, length: usize) -> Self {
        Self {
            writable: true,
            ..Self::readable(start, length)
        }
    }
}

impl TestDriver {
    /// A driver for `function`, whose BAR 0 is placed at [`BAR_AT`].
    pub(crate) fn new(machine: &TestMachine, mut function: VirtioFunction) -> Self {
        function.place_bar(0, GuestAddress(BAR_AT));
        Self {
            ram: machine.ram.clone(),
            function,
            queues: vec![DriverQueue::default(); 16],
            next_buffer: FIRST_BUFFER,
        }
    }

    /// Initialises the device up to DRIVER_OK with `queue_count` queues and those of `features` that
    /// it offers. Returns the negotiated features.
    pub(crate) fn start(&mut self, features: u64, queue_count: u16) -> u64 {
        let negotiated = self.negotiate(features);
        assert_ne!(self.read8(0x14) & 8, 0, "FEATURES_OK stays");
        for queue in 0..queue_count {
            self.enable_queue(queue);
        }
        self.write8(0x14, 15);
        negotiated
    }

    /// Resets the device and negotiates features, up to FEATURES_OK.
    pub(crate) fn negotiate(&mut self, features: u64) -> u64 {
        self.write8(0x14, 0);
        assert_eq!(self.read8(0x14), 0, "a reset completes");
        self.write8(0x14, 3);
        let offered = self.offered();
        let chosen = offered & (features | (1 << 32));
        for (select, word) in [(0, chosen & 0xFFFF_FFFF), (1, chosen >> 32)] {
            self.write32(0x08, select);
            self.write32(0x0C, u32::try_from(word).unwrap());
        }
        self.write8(0x14, 11);
        chosen
    }

    pub(crate) fn offered(&mut self) -> u64 {
        self.write32(0x00, 0);
        let low = u64::from(self.read32(0x04));
        self.write32(0x00, 1);
        low | (u64::from(self.read32(0x04)) << 32)
    }

    pub(crate) fn enable_queue(&mut self, queue: u16) {
        self.write16(0x16, queue);
        self.write16(0x18, QUEUE_SIZE);
        let [descriptors, available, used] = rings(queue);
        self.write32(0x20, u32::try_from(descriptors).unwrap());
        self.write32(0x28, u32::try_from(available).unwrap());
        self.write32(0x30, u32::try_from(used).unwrap());
        self.ram
            .write_slice(&[0; RING_BYTES], GuestAddress(descriptors))
            .unwrap();
        self.queues[usize::from(queue)] = DriverQueue::default();
        self.write16(0x1C, 1);
    }

    /// Reserves guest memory; `misalign` bytes into a page.
    pub(crate) fn buffer(&mut self, length: usize, misalign: u64) -> u64 {
        let start = self.next_buffer.next_multiple_of(4096) + misalign;
        self.next_buffer = start + u64::try_from(length).unwrap();
        start
    }

    /// Frees all buffers.
    pub(crate) fn reuse_buffers(&mut self) {
        self.next_buffer = FIRST_BUFFER;
    }

    /// Writes a chain's descriptors and makes it available, without notifying. Returns its head.
    pub(crate) fn offer(&mut self, queue: u16, buffers: &[Buffer]) -> u16 {
        let [descriptors, ..] = rings(queue);
        let own = &mut self.queues[usize::from(queue)];
        let head = own.next_descriptor % QUEUE_SIZE;
        for (index, buffer) in (0_u16..).zip(buffers) {
            let at = (head + index) % QUEUE_SIZE;
            let last = usize::from(index) + 1 == buffers.len();
            let flags = u16::from(!last) | (u16::from(buffer.writable) << 1);
            let next = (at + 1) % QUEUE_SIZE;
            write_descriptor(
                &self.ram,
                descriptors,
                at,
                (buffer.start, buffer.length, flags, next),
            );
        }
        own.next_descriptor = (head + u16::try_from(buffers.len()).unwrap()) % QUEUE_SIZE;
        self.offer_head(queue, head);
        head
    }

    /// Makes a chain available whose descriptors are in the table already.
    pub(crate) fn offer_head(&mut self, queue: u16, head: u16) {
        let [_, available, _] = rings(queue);
        let own = &mut self.queues[usize::from(queue)];
        let entry = available + 4 + 2 * u64::from(own.available % QUEUE_SIZE);
        self.ram.write_obj(head, GuestAddress(entry)).unwrap();
        own.available = own.available.wrapping_add(1);
        let index = GuestAddress(available + 2);
        self.ram
            .store(own.available, index, std::sync::atomic::Ordering::Release)
            .unwrap();
    }

    /// Notifies through the BAR, as a guest without ioeventfds in its hypervisor.
    pub(crate) fn notify(&mut self, queue: u16) {
        let at = 0x3000 + 4 * u64::from(queue);
        self.function.bar_write(0, at, &queue.to_le_bytes());
    }

    /// Head and length of the next used buffer, if there is one.
    pub(crate) fn poll_used(&mut self, queue: u16) -> Option<(u16, u32)> {
        let [_, _, used] = rings(queue);
        let own = &mut self.queues[usize::from(queue)];
        let order = std::sync::atomic::Ordering::Acquire;
        let index: u16 = self.ram.load(GuestAddress(used + 2), order).unwrap();
        if index == own.seen {
            return None;
        }
        let entry = used + 4 + 8 * u64::from(own.seen % QUEUE_SIZE);
        own.seen = own.seen.wrapping_add(1);
        let head: u32 = self.ram.read_obj(GuestAddress(entry)).unwrap();
        let length = self.ram.read_obj(GuestAddress(entry + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), length))
    }

    /// Waits for the next used buffer.
    pub(crate) fn used(&mut self, queue: u16) -> (u16, u32) {
        let mut found = None;
        wait_until("a used buffer", || {
            found = self.poll_used(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// Replaces the function by one that was restored from its state.
    pub(crate) fn continue_on(&mut self, function: VirtioFunction) {
        self.function = function;
    }

    pub(crate) fn status(&mut self) -> u8 {
        self.read8(0x14)
    }

    pub(crate) fn config(&mut self, offset: u64, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.function.bar_read(0, 0x2000 + offset, &mut data);
        data
    }

    /// Unmasks vector `vector` with `data` as its message and switches MSI-X on.
    pub(crate) fn enable_vector(&mut self, vector: u64, data: u32) {
        let entry = 0x4000 + 16 * vector;
        self.function
            .bar_write(0, entry, &0xFEE0_0000_u64.to_le_bytes());
        self.function.bar_write(0, entry + 8, &data.to_le_bytes());
        self.function.bar_write(0, entry + 12, &[0; 4]);
        let msix = self.capability(0x11, 0).unwrap();
        self.function
            .config_write(msix + 2, &0x8000_u16.to_le_bytes());
    }

    /// The register of the capability with this id (and, for virtio's, this type).
    pub(crate) fn capability(&mut self, id: u8, kind: u8) -> Option<u16> {
        let mut at = self.config_byte(0x34);
        while at != 0 {
            let own = self.config_byte(at) == u16::from(id);
            if own && (kind == 0 || self.config_byte(at + 3) == u16::from(kind)) {
                return Some(at);
            }
            at = self.config_byte(at + 1);
        }
        None
    }

    pub(crate) fn config_byte(&mut self, register: u16) -> u16 {
        let mut byte = [0];
        self.function.config_read(register, &mut byte);
        byte[0].into()
    }

    pub(crate) fn read8(&mut self, at: u64) -> u8 {
        let mut data = [0];
        self.function.bar_read(0, at, &mut data);
        data[0]
    }

    pub(crate) fn read16(&mut self, at: u64) -> u16 {
        let mut data = [0; 2];
        self.function.bar_read(0, at, &mut data);
        u16::from_le_bytes(data)
    }

    pub(crate) fn read32(&mut self, at: u64) -> u32 {
        let mut data = [0; 4];
        self.function.bar_read(0, at, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write8(&mut self, at: u64, value: u8) {
        self.function.bar_write(0, at, &[value]);
    }

    pub(crate) fn write16(&mut self, at: u64, value: u16) {
        self.function.bar_write(0, at, &value.to_le_bytes());
    }

    pub(crate) fn write32(&mut self, at: u64, value: u32) {
        self.function.bar_write(0, at, &value.to_le_bytes());
    }
}

/// Migrates `driver`'s function: pauses and saves it, restores the state into `fresh` and resumes that.
pub(crate) fn migrate(driver: &mut TestDriver, mut fresh: VirtioFunction) {
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let saved = driver.function.save();
    assert_eq!(fresh.pause(), WriterState::Clean);
    fresh.place_bar(0, GuestAddress(BAR_AT));
    fresh.restore(&saved).unwrap();
    assert_eq!(
        fresh.save(),
        saved,
        "a restored device saves the state that it loaded"
    );
    driver.continue_on(fresh);
    driver.function.resume();
}

/// Checks that `driver`'s device saves exactly the golden state, and that `fresh` loads it and saves
/// it unchanged.
///
/// The golden file was made by the first release of its version and is never edited: a new layout
/// gets a new version and a new file.
pub(crate) fn assert_golden(driver: &mut TestDriver, mut fresh: VirtioFunction, golden: &str) {
    let golden = golden.trim_end();
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let saved = serde_json::to_string(&driver.function.save()).unwrap();
    assert_eq!(saved, golden, "\nthe device saves {saved}");
    let state: DeviceState = serde_json::from_str(golden).unwrap();
    fresh.place_bar(0, GuestAddress(BAR_AT));
    assert_eq!(fresh.pause(), WriterState::Clean);
    fresh.restore(&state).unwrap();
    assert_eq!(serde_json::to_string(&fresh.save()).unwrap(), golden);
}

/// Writes one descriptor: address, length, flags, next.
pub(crate) fn write_descriptor(
    ram: &GuestRam,
    table: u64,
    index: u16,
    fields: (u64, u32, u16, u16),
) {
    let (address, length, flags, next) = fields;
    let at = table + 16 * u64::from(index);
    ram.write_obj(address, GuestAddress(at)).unwrap();
    ram.write_obj(length, GuestAddress(at + 8)).unwrap();
    ram.write_obj(flags, GuestAddress(at + 12)).unwrap();
    ram.write_obj(next, GuestAddress(at + 14)).unwrap();
}

/// The addresses of a queue's descriptor table, available ring and used ring.
pub(crate) fn rings(queue: u16) -> [u64; 3] {
    let start = FIRST_RING + u64::from(queue) * 0x1_0000;
    [start, start + 0x4000, start + 0x8000]
}

/// Clears the dirty bitmap.
pub(crate) fn clear_dirty(ram: &GuestRam) {
    for region in ram.iter() {
        MmapRegion::bitmap(region).reset();
    }
}

/// The numbers of the dirty pages.
pub(crate) fn dirty_pages(ram: &GuestRam) -> BTreeSet<u64> {
    let regions = ram.iter().flat_map(|region| {
        let first = region.start_addr().0;
        let is_dirty = |at: &u64| region.bitmap().dirty_at(usize::try_from(*at).unwrap());
        let dirty = (0..region.len()).step_by(4096).filter(is_dirty);
        dirty.map(|at| (first + at) / 4096).collect::<Vec<_>>()
    });
    regions.collect()
}

/// Waits up to ten seconds for a condition.
pub(crate) fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "timed out after 10 s waiting for {what}"
        );
        std::thread::park_timeout(Duration::from_micros(200));
    }
}

pub(crate) const RAM_BYTES: usize = 16 << 20;
pub(crate) const BAR_AT: u64 = 0xC000_0000;
pub(crate) const QUEUE_SIZE: u16 = 64;
const FIRST_RING: u64 = 0x1_0000;
const RING_BYTES: usize = 0x1_0000;
const FIRST_BUFFER: u64 = 0x20_0000;
