//! Malicious drivers and corrupted states for fuzzing: `fuzz_tests.rs` makes them at random, and the targets of
//! `fuzz/` of what libFuzzer finds. A device may stop or refuse with a named reason; it never panics, it can always be
//! paused, and it works again after a reset (I7).

#![expect(
    clippy::unwrap_used,
    reason = "an expectation that does not hold is a finding"
)]

use std::collections::BTreeSet;
use std::os::unix::net::UnixDatagram;

use bascule_types::WriterState;
use vm_memory::{Bytes, GuestAddress};

use crate::device::Device;
use crate::failure::DeviceFailure;
use crate::net::MacAddress;
use crate::pci::{PciFunction, PciRoot};
use crate::state::DeviceState;
use crate::testing::{
    BAR_AT, Buffer, QUEUE_SIZE, RAM_BYTES, TestDriver, TestMachine, dirty_pages, rings,
    write_descriptor,
};
use crate::virtio::VirtioFunction;

mod targets;

use targets::entropy_device;
pub(crate) use targets::{GOLDEN_MAC, block_device, console_device, network_device};

/// One action of a malicious driver.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum DriverAction {
    /// Writes a descriptor (address, length, flags, next) of the table, or of the page after it, which indirect
    /// tables use.
    Descriptor {
        queue: u16,
        index: u16,
        fields: (u64, u32, u16, u16),
    },
    /// Makes a head available.
    Offer { queue: u16, head: u16 },
    /// Overwrites two bytes of the rings.
    Overwrite { queue: u16, at: u64, value: u16 },
    /// Writes a virtio-blk request header at [`DATA_AT`].
    Header { kind: u32, sector: u64 },
    /// Writes the doorbell.
    Notify { queue: u16 },
    /// The machine is paused, saved and resumed.
    PauseAndResume,
}

/// The address at which most descriptors point.
pub const DATA_AT: u64 = 0x30_0000;
/// The address of most indirect tables.
pub const TABLE_AT: u64 = 0x40_0000;
/// The queues that a malicious driver uses are 0 to this, exclusive.
pub const QUEUES: u16 = 3;
/// The same of a console device with two ports: the control queues are 2 and 3.
pub const CONSOLE_QUEUES: u16 = 6;
/// The part of a queue's rings that is overwritten: the available and the used ring.
pub const OVERWRITTEN: std::ops::Range<u64> = 0x4000..0x9000;

/// What the device may have written, as far as the driver's actions say.
#[derive(Debug, Default)]
struct Expected {
    /// The pages that the driver wrote, or gave to the device to write.
    pages: BTreeSet<u64>,
    /// Chains made available, by queue.
    offers: [u32; CONSOLE_QUEUES as usize],
    /// Whether the device could write to descriptors, or the driver changed the rings past the actions.
    is_vague: bool,
}

impl Expected {
    fn note(&mut self, action: &DriverAction) {
        match *action {
            DriverAction::Descriptor { fields, .. } => {
                let (address, length, flags, _) = fields;
                self.pages.insert(TABLE_AT / PAGE);
                let end = address.saturating_add(length.into());
                // Other tables may have anything in them.
                self.is_vague |=
                    flags & INDIRECT != 0 && !(TABLE_AT <= address && end <= TABLE_AT + PAGE);
                let ram = RAM_BYTES as u64;
                if flags & WRITABLE != 0 && address < ram {
                    self.pages
                        .extend(address / PAGE..end.min(ram).div_ceil(PAGE));
                    let tables = [0..rings(CONSOLE_QUEUES)[0], TABLE_AT..TABLE_AT + PAGE];
                    self.is_vague |= tables
                        .iter()
                        .any(|table| address < table.end && table.start < end);
                }
            }
            DriverAction::Offer { queue, .. } => self.offers[usize::from(queue)] += 1,
            DriverAction::Overwrite { .. } => self.is_vague = true,
            DriverAction::Header { .. } => {
                self.pages.insert(DATA_AT / PAGE);
            }
            DriverAction::Notify { .. } | DriverAction::PauseAndResume => {}
        }
    }

    /// Checks a paused device: it has written only where it was told to, and answered each chain once at most.
    fn check(&self, driver: &TestDriver, queue_count: u16) {
        if self.is_vague {
            return;
        }
        let in_rings = 0..rings(queue_count.max(QUEUES))[0] / PAGE;
        for page in dirty_pages(&driver.ram) {
            let expected = in_rings.contains(&page) || self.pages.contains(&page);
            assert!(expected, "page {page:#x} was written");
        }
        for queue in 0..queue_count {
            let used: u16 = driver
                .ram
                .read_obj(GuestAddress(rings(queue)[2] + 2))
                .unwrap();
            let offers = self.offers[usize::from(queue)];
            assert!(
                u32::from(used) <= offers,
                "{used} answers to {offers} chains"
            );
        }
    }
}

/// A malicious driver of a block device; a correct one is served afterwards.
pub fn block_queues(actions: &[DriverAction]) {
    let machine = TestMachine::new();
    let device = block_device(&machine, 128 << 10, QUEUES);
    survives(&machine, device, QUEUES, actions, |driver| {
        let header = driver.buffer(16, 0);
        driver
            .ram
            .write_slice(&[0; 16], GuestAddress(header))
            .unwrap();
        let data = driver.buffer(513, 0);
        driver.offer(
            2,
            &[Buffer::readable(header, 16), Buffer::writable(data, 513)],
        );
        driver.notify(2);
        assert_eq!(driver.used(2).1, 513);
    });
}

/// A malicious driver of a network device; a correct one is served afterwards.
pub fn network_queues(actions: &[DriverAction]) {
    let machine = TestMachine::new();
    let (device, network) = network_device(&machine, MacAddress([2; 6]));
    for fill in 0..5 {
        network.send(&[fill; 600]).unwrap();
    }
    survives(&machine, device, QUEUES, actions, |driver| {
        // Frames of the malicious driver must not block those of the correct one.
        while network.recv(&mut [0; 70_000]).is_ok() {}
        let frame = driver.buffer(72, 0);
        driver.offer(1, &[Buffer::readable(frame, 72)]);
        driver.notify(1);
        driver.used(1);
    });
}

/// A malicious driver of an entropy device; a correct one is served afterwards.
pub fn entropy_queues(actions: &[DriverAction]) {
    let machine = TestMachine::new();
    let device = entropy_device(&machine);
    survives(&machine, device, 1, actions, |driver| {
        let buffer = driver.buffer(8, 0);
        driver.offer(0, &[Buffer::writable(buffer, 8)]);
        driver.notify(0);
        assert_eq!(driver.used(0).1, 8);
    });
}

/// A malicious driver of a console device; a correct one is served afterwards.
pub fn console_queues(actions: &[DriverAction]) {
    let machine = TestMachine::new();
    let (device, host) = console_device(&machine);
    host.send(&[7; 600]).unwrap();
    survives(&machine, device, CONSOLE_QUEUES, actions, |driver| {
        // Output of the malicious driver must not block that of the correct one.
        while host.recv(&mut [0; 4096]).is_ok() {}
        let output = driver.buffer(72, 0);
        driver.offer(5, &[Buffer::readable(output, 72)]);
        driver.notify(5);
        driver.used(5);
    });
}

/// A console device loads a state with corruptions, or refuses it.
pub fn console_state(corruptions: &[Corruption]) {
    let machine = machine_with_requests();
    let (device, _host) = console_device(&machine);
    let golden = include_str!("../golden/virtio-console-v1.json");
    survives_state(&machine, device, golden, corruptions);
}

/// A block device loads a state with corruptions, or refuses it.
pub fn block_state(corruptions: &[Corruption]) {
    let machine = machine_with_requests();
    let golden = include_str!("../golden/virtio-blk-v1.json");
    survives_state(
        &machine,
        block_device(&machine, 1 << 20, 2),
        golden,
        corruptions,
    );
}

/// A network device loads a state with corruptions, or refuses it.
pub fn network_state(corruptions: &[Corruption]) {
    let machine = machine_with_requests();
    let (device, _network) = network_device(&machine, GOLDEN_MAC);
    let golden = include_str!("../golden/virtio-net-v1.json");
    survives_state(&machine, device, golden, corruptions);
}

/// An access of a guest's CPU to the bus, or to its memory.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum BusAccess {
    Ecam {
        offset: u64,
        data: Option<Vec<u8>>,
        length: u8,
    },
    Port {
        port: u16,
        data: Option<Vec<u8>>,
        length: u8,
    },
    /// `at` is relative to the start of the window in which BARs are placed.
    Mmio {
        at: u64,
        data: Option<Vec<u8>>,
        length: u8,
    },
    Ram {
        at: u64,
        value: u64,
    },
    PauseAndResume,
}

/// Any accesses to a bus with one device of each kind: it can be saved, restored in another machine, and reset.
pub fn bus(accesses: &[BusAccess]) {
    let machine = TestMachine::new();
    let (bus, _network) = bus_of(&machine);
    assert_eq!(bus.pause(), WriterState::Clean);
    let fresh = bus.save();
    bus.resume();
    for access in accesses {
        access_bus(&machine, &bus, access);
    }
    assert_eq!(bus.pause(), WriterState::Clean);
    let saved = bus.save();
    let other = TestMachine::with_ram(machine.ram.clone());
    let (restored, _network) = bus_of(&other);
    assert_eq!(restored.pause(), WriterState::Clean);
    restored.restore(&saved).unwrap();
    assert_eq!(
        restored.save(),
        saved,
        "a restored bus saves what it loaded"
    );
    bus.reset();
    assert_eq!(bus.save(), fresh, "a reset bus is as it was made");
    for failure in machine.failures.all() {
        assert!(
            matches!(failure, DeviceFailure::BadVirtqueue { .. }),
            "{failure}"
        );
    }
}

fn bus_of(machine: &TestMachine) -> (PciRoot, UnixDatagram) {
    let window = GuestAddress(BAR_AT)..GuestAddress(BAR_AT + WINDOW_BYTES);
    let mut bus = PciRoot::new(window);
    let (net, network) = network_device(machine, MacAddress([2; 6]));
    bus.add(Box::new(block_device(machine, 128 << 10, 2)))
        .unwrap();
    bus.add(Box::new(net)).unwrap();
    bus.add(Box::new(entropy_device(machine))).unwrap();
    (bus, network)
}

fn access_bus(machine: &TestMachine, bus: &PciRoot, access: &BusAccess) {
    let room = |length: u8| vec![0; [1, 2, 4, 8][usize::from(length % 4)]];
    match access {
        BusAccess::Ecam {
            offset,
            data,
            length,
        } => match data {
            Some(data) => bus.ecam_write(*offset, data),
            None => bus.ecam_read(*offset, &mut room(*length)),
        },
        BusAccess::Port { port, data, length } => match data {
            Some(data) => bus.io_write(*port, data),
            None => bus.io_read(*port, &mut room(*length % 3)),
        },
        BusAccess::Mmio { at, data, length } => {
            let at = GuestAddress(BAR_AT.wrapping_add(*at));
            match data {
                Some(data) => bus.mmio_write(at, data),
                None => bus.mmio_read(at, &mut room(*length)),
            };
        }
        BusAccess::Ram { at, value } => {
            let at = at % (RAM_BYTES as u64 - 8);
            machine.ram.write_obj(*value, GuestAddress(at)).unwrap();
        }
        BusAccess::PauseAndResume => {
            assert_eq!(bus.pause(), WriterState::Clean);
            bus.resume();
        }
    }
}

fn perform(driver: &mut TestDriver, action: &DriverAction) {
    match *action {
        DriverAction::Descriptor {
            queue,
            index,
            fields,
        } => {
            let table = rings(queue)[0];
            let (table, index) = if index < QUEUE_SIZE {
                (table, index)
            } else {
                (TABLE_AT, index % 8)
            };
            write_descriptor(&driver.ram, table, index, fields);
        }
        DriverAction::Offer { queue, head } => driver.offer_head(queue, head),
        DriverAction::Overwrite { queue, at, value } => {
            driver
                .ram
                .write_obj(value, GuestAddress(rings(queue)[0] + at))
                .unwrap();
        }
        DriverAction::Header { kind, sector } => {
            driver.ram.write_obj(kind, GuestAddress(DATA_AT)).unwrap();
            driver
                .ram
                .write_obj(sector, GuestAddress(DATA_AT + 8))
                .unwrap();
        }
        DriverAction::Notify { queue } => driver.notify(queue),
        DriverAction::PauseAndResume => {
            assert_eq!(driver.function.pause(), WriterState::Clean);
            let saved = driver.function.save();
            assert_eq!(driver.function.save(), saved);
            driver.function.resume();
        }
    }
}

/// Runs the actions of the malicious driver; then the device must serve `work` of a correct driver, and be as
/// it was made after a reset of its machine.
fn survives(
    machine: &TestMachine,
    function: VirtioFunction,
    queue_count: u16,
    actions: &[DriverAction],
    work: impl FnOnce(&mut TestDriver),
) {
    let mut driver = TestDriver::new(machine, function);
    let offered = driver.offered();
    driver.write32(0x00, 0);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let fresh = driver.function.save();
    driver.function.resume();
    driver.start(u64::MAX, queue_count);
    driver.enable_vector(0, 7);
    let mut expected = Expected::default();
    for action in actions {
        expected.note(action);
        perform(&mut driver, action);
    }
    assert_eq!(driver.function.pause(), WriterState::Clean);
    expected.check(&driver, queue_count);
    driver.function.resume();
    driver.start(1 << 29, queue_count);
    work(&mut driver);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    assert_ne!(driver.function.save(), fresh);
    driver.function.reset();
    assert_eq!(driver.function.save(), fresh);
    driver.function.resume();
    assert_eq!(driver.offered(), offered);
    for failure in machine.failures.all() {
        assert!(
            matches!(failure, DeviceFailure::BadVirtqueue { .. }),
            "{failure}"
        );
    }
}

/// A changed value in a saved state.
#[derive(Clone, Debug)]
pub struct Corruption {
    /// The index of the value to replace, modulo the number of values.
    pub place: usize,
    /// What replaces it.
    pub value: serde_json::Value,
}

/// Every value in `state` that is not the configuration space, which is compared byte for byte.
fn places<'a>(state: &'a mut serde_json::Value, found: &mut Vec<&'a mut serde_json::Value>) {
    match state {
        serde_json::Value::Object(fields) => {
            for (name, field) in fields {
                if field.as_array().is_some_and(Vec::is_empty) {
                    found.push(field);
                    continue;
                }
                if name != "config_space" {
                    places(field, found);
                }
            }
        }
        serde_json::Value::Array(items) => items.iter_mut().for_each(|item| places(item, found)),
        leaf => found.push(leaf),
    }
}

/// A machine in whose memory every third descriptor starts a valid write request, to which the
/// incomplete requests of the states may refer.
pub(crate) fn machine_with_requests() -> TestMachine {
    let machine = TestMachine::new();
    machine.ram.write_obj(1_u32, GuestAddress(DATA_AT)).unwrap();
    for queue in 0..3 {
        for index in 0..QUEUE_SIZE {
            let fields = match index % 3 {
                0 => (DATA_AT, 16, 1, index + 1),
                1 => (DATA_AT + 0x1000, 512, 1, index + 1),
                _ => (DATA_AT + 0x2000, 1, 2, 0),
            };
            write_descriptor(&machine.ram, rings(queue)[0], index, fields);
        }
    }
    machine
}

fn survives_state(
    machine: &TestMachine,
    mut function: VirtioFunction,
    golden: &str,
    corruptions: &[Corruption],
) {
    let mut state: DeviceState = serde_json::from_str(golden).unwrap();
    for Corruption { place, value } in corruptions {
        let mut found = Vec::new();
        places(&mut state.body, &mut found);
        let place = place % found.len();
        *found.swap_remove(place) = value.clone();
    }
    function.place_bar(0, GuestAddress(BAR_AT));
    assert_eq!(function.pause(), WriterState::Clean);
    // The state may be refused or loaded.
    if function.restore(&state).is_ok() {
        function.resume();
        assert_eq!(function.pause(), WriterState::Clean);
        let saved = function.save();
        assert_eq!(saved.kind, state.kind);
    }
    drop(function);
    for failure in machine.failures.all() {
        assert!(
            matches!(failure, DeviceFailure::BadVirtqueue { .. }),
            "{failure}"
        );
    }
}

const PAGE: u64 = 4096;
/// VIRTQ_DESC_F_WRITE
const WRITABLE: u16 = 2;
/// VIRTQ_DESC_F_INDIRECT
const INDIRECT: u16 = 4;
/// Room for the BARs of three devices, and some in which nothing decodes.
pub const WINDOW_BYTES: u64 = 1 << 20;
