//! The disk check: one virtio-blk request at a time, polled, so that a stalled disk stalls nothing
//! else in the guest.
//!
//! ```text
//! Survey ──all slots read──► Pause ──► ReadOld ──► Write ──► Flush ──► ReadBack ──► Pause
//!                              └──► Identify ──► ReadOld
//! ```
//!
//! At the first block, and at every sixteenth, it reads the disk's serial number, which must not change.
//!
//! A block counts as acknowledged once its flush has completed. Before a slot is overwritten it must
//! still hold the block that this guest (or an earlier run) wrote: another writer is detected.

use bascule_probe_wire::block::{BLOCK_BYTES, Block, Survey};
use bascule_probe_wire::guest_report::Report;
use bascule_probe_wire::options::Options;
use bascule_probe_wire::pattern::mix;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::arena;
use crate::hal::Identity;
use crate::pci::QueueTransport;
use crate::serial::Console;

/// The disk and the state of its check.
pub(crate) struct Disk {
    device: Device,
    slots: u64,
    step: Step,
    /// The step's request in flight.
    pending: Option<u16>,
    survey: Survey,
    boot: u64,
    /// The block that is being written.
    seq: u64,
    /// The serial number that was read first.
    serial: Option<[u8; SERIAL_BYTES]>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    Survey { slot: u64 },
    Pause { until_us: u64 },
    Identify,
    ReadOld,
    Write,
    Flush,
    ReadBack,
}

impl Disk {
    /// Initializes the device.
    pub(crate) fn new(transport: QueueTransport, options: &Options, boot: u64) -> Option<Self> {
        let device = Device::new(transport)?;
        let slots = options.disk_slots.min(device.sectors / SECTORS_PER_BLOCK);
        let step = Step::Survey { slot: 0 };
        let survey = Survey::default();
        (slots > 1).then_some(Self {
            device,
            slots,
            step,
            pending: None,
            survey,
            boot,
            seq: 0,
            serial: None,
        })
    }

    /// Advances the check as far as possible without waiting for the device.
    pub(crate) fn poll(
        &mut self,
        now_us: u64,
        report: &mut Report,
        options: &Options,
        console: Console,
    ) {
        if let Step::Pause { until_us } = self.step {
            if now_us < until_us {
                return;
            }
            self.seq += 1;
            let due = self.serial.is_none() || self.seq.is_multiple_of(IDENTIFY_BLOCKS);
            self.step = if due { Step::Identify } else { Step::ReadOld };
        }
        let Some(token) = self.pending else {
            self.pending = self.submit();
            return;
        };
        let Some(status) = self.device.completed(token) else {
            return;
        };
        self.pending = None;
        if status == STATUS_OK {
            self.step = self.completed(now_us, report, options, console);
        } else {
            report.disk_errors += 1;
            console.line(format_args!(
                "bad: disk status {status} in {:?} {}",
                self.step, self.seq
            ));
            if !matches!(self.step, Step::Survey { .. }) {
                self.seq -= 1;
            }
            self.step = match self.step {
                survey @ Step::Survey { .. } => survey,
                _ => Step::Pause {
                    until_us: now_us + ERROR_PAUSE_US,
                },
            };
        }
    }

    fn submit(&mut self) -> Option<u16> {
        let slot = self.seq % self.slots;
        match self.step {
            Step::Survey { slot } => {
                let blocks = (self.slots - slot).min(SURVEY_BLOCKS);
                self.device.read(slot, blocks as usize)
            }
            Step::Identify => self.device.identify(),
            Step::ReadOld | Step::ReadBack => self.device.read(slot, 1),
            Step::Write => {
                let block = Block {
                    seq: self.seq,
                    boot: self.boot,
                };
                block.encode(self.device.block_mut(0));
                self.device.write(slot)
            }
            Step::Flush => self.device.flush(),
            Step::Pause { .. } => None,
        }
    }

    fn completed(
        &mut self,
        now_us: u64,
        report: &mut Report,
        options: &Options,
        console: Console,
    ) -> Step {
        match self.step {
            Step::Survey { slot } => self.survey_more(slot, report, console),
            Step::Identify => {
                self.check_serial(report, console);
                Step::ReadOld
            }
            Step::ReadOld => {
                self.check_old(report, console);
                Step::Write
            }
            Step::Write => Step::Flush,
            Step::Flush => {
                report.disk_ack = self.seq;
                Step::ReadBack
            }
            Step::ReadBack => {
                let expected = Block {
                    seq: self.seq,
                    boot: self.boot,
                };
                let found = Block::decode(self.device.block_mut(0));
                if found != Ok(expected) {
                    report.disk_bad += 1;
                    console.line(format_args!(
                        "bad: disk wrote {expected:?}, reads {found:?}"
                    ));
                }
                Step::Pause {
                    until_us: now_us + options.disk_ms * 1000,
                }
            }
            Step::Pause { .. } => self.step,
        }
    }

    fn check_serial(&mut self, report: &mut Report, console: Console) {
        let mut read = [0; SERIAL_BYTES];
        read.copy_from_slice(&self.device.data[..SERIAL_BYTES]);
        let first = *self.serial.get_or_insert(read);
        report.disk_serial = first
            .iter()
            .fold(0, |sum, &byte| mix(sum ^ u64::from(byte)));
        report.disk_serial_reads += 1;
        if read != first {
            report.disk_serial_bad += 1;
            console.line(format_args!("bad: disk serial was {first:?}, is {read:?}"));
        }
    }

    fn survey_more(&mut self, slot: u64, report: &mut Report, console: Console) -> Step {
        let blocks = (self.slots - slot).min(SURVEY_BLOCKS);
        for index in 0..blocks {
            let found = Block::decode(self.device.block_mut(index as usize));
            self.survey.add(slot + index, self.slots, found);
        }
        if slot + blocks < self.slots {
            return Step::Survey {
                slot: slot + blocks,
            };
        }
        self.seq = self.survey.last;
        report.disk_start = self.survey.last;
        report.disk_ack = self.survey.last;
        report.disk_start_bad = self.survey.faults(self.slots);
        console.line(format_args!(
            "disk last={} faults={} slots={} flush={}",
            self.survey.last, report.disk_start_bad, self.slots, self.device.can_flush,
        ));
        Step::Pause { until_us: 0 }
    }

    /// The slot must hold what was written to it one round ago, by this run or an earlier one. What
    /// the survey found wrong was reported then and is not reported again.
    fn check_old(&mut self, report: &mut Report, console: Console) {
        let found = Block::decode(self.device.block_mut(0));
        let Some(seq) = self.seq.checked_sub(self.slots).filter(|&seq| seq > 0) else {
            return;
        };
        let own = seq > self.survey.last;
        let as_expected = match found {
            Ok(block) if own => {
                block
                    == Block {
                        seq,
                        boot: self.boot,
                    }
            }
            Ok(block) => block.seq == seq && block.boot != self.boot,
            Err(_) => !own,
        };
        if !as_expected {
            report.disk_bad += 1;
            console.line(format_args!("bad: disk slot of {seq} holds {found:?}"));
        }
    }
}

/// The block device: one request, one buffer.
struct Device {
    transport: QueueTransport,
    queue: VirtQueue<Identity, QUEUE_SIZE>,
    sectors: u64,
    can_flush: bool,
    header: &'static mut [u8],
    data: &'static mut [u8],
    status: &'static mut [u8],
    /// What the request in flight is, to give its descriptors back.
    in_flight: Request,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Read { bytes: usize },
    Write,
    Flush,
}

impl Device {
    fn new(mut transport: QueueTransport) -> Option<Self> {
        let hello = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(hello);
        let features =
            transport.read_device_features() & (FEATURE_VERSION_1 | FEATURE_FLUSH | FEATURE_EVENT);
        transport.write_driver_features(features);
        transport.set_status(hello | DeviceStatus::FEATURES_OK);
        if !transport.get_status().contains(DeviceStatus::FEATURES_OK) {
            return None;
        }
        let low: u32 = transport.read_config_space(0).ok()?;
        let high: u32 = transport.read_config_space(4).ok()?;
        let event_idx = features & FEATURE_EVENT != 0;
        let mut queue = VirtQueue::new(&mut transport, 0, false, event_idx).ok()?;
        queue.set_dev_notify(false);
        transport.finish_init();
        Some(Self {
            transport,
            queue,
            sectors: u64::from(low) | u64::from(high) << 32,
            can_flush: features & FEATURE_FLUSH != 0,
            header: arena::bytes(16),
            data: arena::bytes(SURVEY_BLOCKS as usize * BLOCK_BYTES),
            status: arena::bytes(1),
            in_flight: Request::Flush,
        })
    }

    fn block_mut(&mut self, index: usize) -> &mut [u8; BLOCK_BYTES] {
        let (blocks, _) = self.data.as_chunks_mut::<BLOCK_BYTES>();
        &mut blocks[index]
    }

    fn read(&mut self, block: u64, count: usize) -> Option<u16> {
        self.submit(
            0,
            block,
            Request::Read {
                bytes: count * BLOCK_BYTES,
            },
        )
    }

    /// Asks for the serial number: VIRTIO_BLK_T_GET_ID (virtio 1.2, 5.2.6). QEMU writes a shorter one with its NUL
    /// only.
    fn identify(&mut self) -> Option<u16> {
        let bytes = SERIAL_BYTES;
        self.data[..bytes].fill(0);
        self.submit(8, 0, Request::Read { bytes })
    }

    fn write(&mut self, block: u64) -> Option<u16> {
        self.submit(1, block, Request::Write)
    }

    /// A device without the flush feature writes through; the guest then asks for the flush's
    /// completion in the form of a read.
    fn flush(&mut self) -> Option<u16> {
        if self.can_flush {
            self.submit(4, 0, Request::Flush)
        } else {
            self.read(0, 1)
        }
    }

    fn submit(&mut self, kind: u32, block: u64, request: Request) -> Option<u16> {
        self.header[..4].copy_from_slice(&kind.to_le_bytes());
        self.header[8..16].copy_from_slice(&(block * SECTORS_PER_BLOCK).to_le_bytes());
        self.status[0] = 0xff;
        self.in_flight = request;
        let (header, status) = (&*self.header, &mut *self.status);
        let queue = &mut self.queue;
        let token = match request {
            Request::Read { bytes } => {
                let data = &mut self.data[..bytes];
                // SAFETY: header, data and status are never freed and are not touched until
                // `completed` pops this token: one request is in flight at a time.
                unsafe { queue.add(&[header], &mut [data, status]) }
            }
            Request::Write => {
                let data = &self.data[..BLOCK_BYTES];
                // SAFETY: as above.
                unsafe { queue.add(&[header, data], &mut [status]) }
            }
            // SAFETY: as above.
            Request::Flush => unsafe { queue.add(&[header], &mut [status]) },
        };
        if self.queue.should_notify() {
            self.transport.notify(0);
        }
        token.ok()
    }

    /// The status byte of the request, once it has completed.
    fn completed(&mut self, token: u16) -> Option<u8> {
        if !self.queue.can_pop() {
            return None;
        }
        let (header, status) = (&*self.header, &mut *self.status);
        let queue = &mut self.queue;
        let popped = match self.in_flight {
            Request::Read { bytes } => {
                let data = &mut self.data[..bytes];
                // SAFETY: these are the buffers of the one request in flight.
                unsafe { queue.pop_used(token, &[header], &mut [data, status]) }
            }
            Request::Write => {
                let data = &self.data[..BLOCK_BYTES];
                // SAFETY: as above.
                unsafe { queue.pop_used(token, &[header, data], &mut [status]) }
            }
            // SAFETY: as above.
            Request::Flush => unsafe { queue.pop_used(token, &[header], &mut [status]) },
        };
        assert!(
            popped.is_ok(),
            "the disk completed a request that was not submitted"
        );
        Some(self.status[0])
    }
}

const QUEUE_SIZE: usize = 16;
const SECTORS_PER_BLOCK: u64 = BLOCK_BYTES as u64 / 512;
const SURVEY_BLOCKS: u64 = 32;
/// As long as the device's answer is.
const SERIAL_BYTES: usize = 20;
const IDENTIFY_BLOCKS: u64 = 16;
const STATUS_OK: u8 = 0;
const ERROR_PAUSE_US: u64 = 100_000;
const FEATURE_FLUSH: u64 = 1 << 9;
const FEATURE_EVENT: u64 = 1 << 29;
const FEATURE_VERSION_1: u64 = 1 << 32;
