//! A guest's driver: fixed descriptors for each request in flight, which are offered again when they come back.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_devices::GuestRam;
use bascule_devices::blk::{BlkConfig, BlkDevice, Serial};
use bascule_devices::disk::{Disk, VolumeGate};
use bascule_devices::failure::{DeviceFailure, FailureSink};
use bascule_devices::interrupt::{Gsi, MsiMessage, MsiRouter};
use bascule_devices::ioeventfd::IoeventfdRegistry;
use bascule_devices::pci::PciFunction;
use bascule_devices::virtio::{DeviceContext, VirtioFunction};
use bascule_types::{BootTime, Bytes, ExtentRun, Generation, Lba, Owner, SlotId, VolumeId};
use bascule_volume_gate::{GateReader, GateWriter, WriterPage};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{Bytes as _, GuestAddress};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{FILE_MIB, Figures, Work};

/// Performs `work` on `file` for `time`.
pub(crate) fn measure(file: &File, work: Work, time: Duration) -> Result<Figures> {
    let scratch = tempfile::tempdir()?;
    let host = Arc::new(Host::default());
    let mut driver = Driver::new(file, work, &host, scratch.path())?;
    let end = Instant::now() + time;
    let mut times: Vec<Duration> = Vec::new();
    let (start, cpu) = (Instant::now(), cpu_time());
    for slot in 0..work.depth {
        driver.offer(slot)?;
    }
    driver.publish()?;
    loop {
        driver.await_interrupt()?;
        let now = Instant::now();
        while let Some(slot) = driver.take_used()? {
            times.push(now - driver.offered_at[usize::from(slot)]);
            if now < end {
                driver.offer(slot)?;
            }
        }
        driver.publish()?;
        if driver.in_flight == 0 {
            break;
        }
    }
    let (elapsed, cpu) = (start.elapsed(), cpu_time().saturating_sub(cpu));
    let failures = host.failures.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(failures.is_empty(), "the device failed: {failures:?}");
    times.sort_unstable();
    let count = u32::try_from(times.len())?;
    Ok(Figures {
        per_second: f64::from(count) / elapsed.as_secs_f64(),
        median: *times.get(times.len() / 2).context("no request completed")?,
        cpu: cpu.checked_div(count).context("no request completed")?,
    })
}

/// The CPU time of this process.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.try_into().unwrap_or_default()
}

struct Driver {
    ram: Arc<GuestRam>,
    /// Its thread ends when it is dropped.
    _function: VirtioFunction,
    host: Arc<Host>,
    /// Watches the queue's interrupt.
    interrupts: Epoll,
    /// Keeps the gate open.
    _gate: GateWriter,
    work: Work,
    random: u64,
    offered_at: Vec<Instant>,
    available: u16,
    published: u16,
    seen: u16,
    in_flight: u16,
}

impl Driver {
    fn new(file: &File, work: Work, host: &Arc<Host>, scratch: &Path) -> Result<Self> {
        let ram = GuestRam::from_ranges(&[(GuestAddress(0), RAM_BYTES)])?;
        let ram = Arc::new(ram);
        let (gate_writer, gate) = gate(scratch)?;
        let size = Bytes(FILE_MIB << 20);
        let run = ExtentRun {
            start: Lba(0),
            length: size,
        };
        let disk = Disk::new(file.try_clone()?.into(), &[run], size, Arc::new(gate))?;
        let context = DeviceContext {
            ram: Arc::clone(&ram),
            msi: Arc::clone(host) as Arc<dyn MsiRouter>,
            ioeventfds: Arc::clone(host) as Arc<dyn IoeventfdRegistry>,
            failures: Arc::clone(host) as Arc<dyn FailureSink>,
        };
        let config = BlkConfig {
            name: "blk0".into(),
            serial: Serial::of_name("bench"),
            queue_count: 1,
            read_only: false,
        };
        let mut function = BlkDevice::new(&config, disk, context)?.function;
        function.place_bar(0, GuestAddress(BAR));
        start(&mut function);
        let interrupts = Epoll::new()?;
        let event = EpollEvent::new(EventSet::IN, 0);
        interrupts.ctl(ControlOperation::Add, host.irq()?.as_raw_fd(), event)?;
        let mut driver = Self {
            ram,
            _function: function,
            host: Arc::clone(host),
            interrupts,
            _gate: gate_writer,
            work,
            random: 0x9E37_79B9_7F4A_7C15,
            offered_at: vec![Instant::now(); usize::from(work.depth)],
            available: 0,
            published: 0,
            seen: 0,
            in_flight: 0,
        };
        for slot in 0..work.depth {
            driver.describe(slot)?;
        }
        Ok(driver)
    }

    /// Writes the three descriptors of `slot`: header, data, status.
    fn describe(&mut self, slot: u16) -> Result<()> {
        let kind = u32::from(self.work.is_write);
        self.ram.write_obj(kind, header_at(slot))?;
        let data_flags = if self.work.is_write {
            NEXT
        } else {
            NEXT | WRITABLE
        };
        let bytes = u32::try_from(self.work.bytes)?;
        let chain = [
            (header_at(slot), 16, NEXT),
            (data_at(slot), bytes, data_flags),
            (status_at(slot), 1, WRITABLE),
        ];
        for (index, (start, length, flags)) in (3 * slot..).zip(chain) {
            let at = DESCRIPTORS + 16 * u64::from(index);
            self.ram.write_obj(start.0, GuestAddress(at))?;
            self.ram.write_obj::<u32>(length, GuestAddress(at + 8))?;
            self.ram.write_obj::<u16>(flags, GuestAddress(at + 12))?;
            self.ram
                .write_obj::<u16>(index + 1, GuestAddress(at + 14))?;
        }
        Ok(())
    }

    /// Gives the request of `slot` a place by chance, and makes it available with the next publication.
    fn offer(&mut self, slot: u16) -> Result<()> {
        // xorshift64 (Marsaglia, 2003).
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        let bytes = u64::try_from(self.work.bytes)?;
        let sector = self.random % ((FILE_MIB << 20) / bytes) * (bytes / 512);
        self.ram
            .write_obj(sector, GuestAddress(header_at(slot).0 + 8))?;
        self.ram.write_obj(0xEE_u8, status_at(slot))?;
        let entry = AVAILABLE + 4 + 2 * u64::from(self.available % QUEUE_SIZE);
        self.ram.write_obj(3 * slot, GuestAddress(entry))?;
        self.available = self.available.wrapping_add(1);
        self.in_flight += 1;
        self.offered_at[usize::from(slot)] = Instant::now();
        Ok(())
    }

    /// Shows the device what was offered, and notifies it unless it is looking anyway.
    fn publish(&mut self) -> Result<()> {
        if self.available == self.published {
            return Ok(());
        }
        self.published = self.available;
        let index = GuestAddress(AVAILABLE + 2);
        self.ram.store(self.available, index, Ordering::SeqCst)?;
        std::sync::atomic::fence(Ordering::SeqCst);
        let flags: u16 = self.ram.load(GuestAddress(USED), Ordering::SeqCst)?;
        if flags & NO_NOTIFY == 0 {
            self.host.kick()?;
        }
        Ok(())
    }

    fn await_interrupt(&self) -> Result<()> {
        let irq = self.host.irq()?;
        self.interrupts.wait(-1, &mut [EpollEvent::default()])?;
        irq.read().context("take the interrupt")?;
        Ok(())
    }

    /// The next request that the device has completed.
    fn take_used(&mut self) -> Result<Option<u16>> {
        let index: u16 = self.ram.load(GuestAddress(USED + 2), Ordering::Acquire)?;
        if index == self.seen {
            return Ok(None);
        }
        let entry = USED + 4 + 8 * u64::from(self.seen % QUEUE_SIZE);
        self.seen = self.seen.wrapping_add(1);
        self.in_flight -= 1;
        let head: u32 = self.ram.read_obj(GuestAddress(entry))?;
        let slot = u16::try_from(head / 3)?;
        let status: u8 = self.ram.read_obj(status_at(slot))?;
        ensure!(status == 0, "a request failed with status {status}");
        Ok(Some(slot))
    }
}

/// A hypervisor without a guest: the eventfds that stand for its interrupts and notifications.
#[derive(Debug, Default)]
struct Host {
    irqs: Mutex<Vec<Arc<EventFd>>>,
    kick: Mutex<Option<EventFd>>,
    failures: Mutex<Vec<DeviceFailure>>,
}

impl Host {
    /// The interrupt of the queue, which has MSI-X vector 1.
    fn irq(&self) -> Result<Arc<EventFd>> {
        let irqs = self.irqs.lock().unwrap_or_else(PoisonError::into_inner);
        irqs.get(1).cloned().context("no vector 1")
    }

    fn kick(&self) -> Result<()> {
        let kick = self.kick.lock().unwrap_or_else(PoisonError::into_inner);
        let kick = kick.as_ref().context("no ioeventfd")?;
        kick.write(1).context("notify the device")
    }
}

impl MsiRouter for Host {
    fn allocate_gsi(&self) -> io::Result<Gsi> {
        let irqs = self.irqs.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(Gsi(u32::try_from(irqs.len()).map_err(io::Error::other)?))
    }

    fn set_route(&self, _: Gsi, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn attach_irqfd(&self, _: Gsi, irqfd: &EventFd) -> io::Result<()> {
        let mut irqs = self.irqs.lock().unwrap_or_else(PoisonError::into_inner);
        irqs.push(Arc::new(irqfd.try_clone()?));
        Ok(())
    }
}

impl IoeventfdRegistry for Host {
    fn register(&self, ioeventfd: &EventFd, _: GuestAddress) -> io::Result<()> {
        let mut kick = self.kick.lock().unwrap_or_else(PoisonError::into_inner);
        *kick = Some(ioeventfd.try_clone()?);
        Ok(())
    }

    fn unregister(&self, _: &EventFd, _: GuestAddress) -> io::Result<()> {
        Ok(())
    }
}

impl FailureSink for Host {
    fn device_failed(&self, failure: DeviceFailure) {
        let mut failures = self.failures.lock().unwrap_or_else(PoisonError::into_inner);
        failures.push(failure);
    }
}

/// A gate that stays open, with the pages of a volume.
fn gate(scratch: &Path) -> Result<(GateWriter, VolumeGate)> {
    let path = scratch.join("gate");
    let (writer, _) = GateWriter::open(&path, VolumeId::from_bytes([7; 16]))?;
    let owner = Owner {
        slot: SlotId(1),
        generation: Generation(1),
    };
    writer.publish(owner, BootTime(u64::MAX / 2))?;
    let (page, _) = WriterPage::create(&scratch.join("writer"))?;
    let reader = Arc::new(GateReader::open(&path)?);
    Ok((writer, VolumeGate::new(reader, owner, Some(page))))
}

/// Brings the device to DRIVER_OK with queue 0 and MSI-X (virtio 1.2, 3.1.1 and 4.1.5.1).
fn start(function: &mut VirtioFunction) {
    let mut write = |at: u64, bytes: &[u8]| function.bar_write(0, at, bytes);
    write(0x14, &[0]);
    write(0x14, &[3]);
    // VIRTIO_F_VERSION_1 and VIRTIO_BLK_F_FLUSH.
    write(0x08, &0_u32.to_le_bytes());
    write(0x0C, &(1_u32 << 9).to_le_bytes());
    write(0x08, &1_u32.to_le_bytes());
    write(0x0C, &1_u32.to_le_bytes());
    write(0x14, &[11]);
    write(0x16, &0_u16.to_le_bytes());
    write(0x18, &QUEUE_SIZE.to_le_bytes());
    write(0x1A, &1_u16.to_le_bytes());
    write(0x20, &DESCRIPTORS.to_le_bytes());
    write(0x28, &AVAILABLE.to_le_bytes());
    write(0x30, &USED.to_le_bytes());
    for vector in [0, 1] {
        let entry = 0x4000 + 16 * vector;
        write(entry, &0xFEE0_0000_u64.to_le_bytes());
        write(entry + 8, &33_u32.to_le_bytes());
        write(entry + 12, &[0; 4]);
    }
    write(0x1C, &1_u16.to_le_bytes());
    write(0x14, &[15]);
    let msix = msix_capability(function);
    function.config_write(msix + 2, &0x8000_u16.to_le_bytes());
}

/// The register of the MSI-X capability (PCI Local Bus 3.0, 6.8.2).
fn msix_capability(function: &mut VirtioFunction) -> u16 {
    let mut byte = |register: u16| {
        let mut byte = [0];
        function.config_read(register, &mut byte);
        u16::from(byte[0])
    };
    let mut at = byte(0x34);
    while at != 0 && byte(at) != 0x11 {
        at = byte(at + 1);
    }
    at
}

fn header_at(slot: u16) -> GuestAddress {
    GuestAddress(HEADERS + 64 * u64::from(slot))
}

fn status_at(slot: u16) -> GuestAddress {
    GuestAddress(HEADERS + 64 * u64::from(slot) + 32)
}

fn data_at(slot: u16) -> GuestAddress {
    GuestAddress(DATA + DATA_BYTES * u64::from(slot))
}

const BAR: u64 = 0xC000_0000;
const QUEUE_SIZE: u16 = 256;
const DESCRIPTORS: u64 = 0x1_0000;
const AVAILABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const HEADERS: u64 = 0x4_0000;
const DATA: u64 = 0x10_0000;
const DATA_BYTES: u64 = 128 << 10;
const RAM_BYTES: usize = 16 << 20;
const NEXT: u16 = 1;
const WRITABLE: u16 = 2;
const NO_NOTIFY: u16 = 1;
