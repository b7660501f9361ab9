//! Fuzz tests of the devices: a guest that writes arbitrary bytes into its queues, and a migration
//! peer that sends arbitrary states. A device may stop or refuse with a named reason; it never
//! panics, it can always be paused, and it works again after a reset (I7).

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use bascule_types::{Bytes as ByteCount, ExtentRun, Lba, WriterState};
use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use crate::blk::{BlkConfig, BlkDevice, Serial};
use crate::console::{ConsoleConfig, ConsoleDevice, HostPort};
use crate::device::Device;
use crate::disk::{AlwaysOpen, Disk};
use crate::failure::DeviceFailure;
use crate::net::{MacAddress, NetConfig, NetDevice, Tap};
use crate::pci::PciFunction;
use crate::rng::{RngConfig, RngDevice};
use crate::state::DeviceState;
use crate::testing::{
    BAR_AT, Buffer, QUEUE_SIZE, TestDriver, TestMachine, rings, write_descriptor,
};
use crate::virtio::VirtioFunction;

/// One action of a malicious driver.
#[derive(Clone, Debug)]
enum DriverAction {
    /// Writes a descriptor of the table, or of the page after it, which indirect tables use.
    Descriptor {
        queue: u16,
        index: u16,
        fields: (u64, u32, u16, u16),
    },
    /// Makes a head available.
    Offer {
        queue: u16,
        head: u16,
    },
    /// Overwrites two bytes of the rings.
    Overwrite {
        queue: u16,
        at: u64,
        value: u16,
    },
    /// Writes a virtio-blk request header at [`DATA_AT`].
    Header {
        kind: u32,
        sector: u64,
    },
    Notify {
        queue: u16,
    },
    PauseAndResume,
}

/// The address at which most descriptors point.
const DATA_AT: u64 = 0x30_0000;
/// The address of most indirect tables.
const TABLE_AT: u64 = 0x40_0000;

fn actions() -> impl Strategy<Value = Vec<DriverAction>> {
    let queue = || 0_u16..3;
    let address = prop_oneof![
        4 => Just(DATA_AT),
        2 => Just(TABLE_AT),
        2 => DATA_AT..DATA_AT + 0x1000,
        1 => any::<u64>(),
        1 => Just(0xFF_FFF0_u64),
    ];
    let length = prop_oneof![
        3 => Just(16_u32),
        2 => Just(512),
        1 => Just(1),
        1 => Just(0),
        1 => Just(48),
        1 => Just(1526),
        1 => any::<u32>(),
    ];
    let fields = (
        address,
        length,
        prop_oneof![6 => 0_u16..4, 2 => 4_u16..8, 1 => any::<u16>()],
        0_u16..70,
    );
    prop::collection::vec(
        prop_oneof![
            6 => (queue(), 0_u16..300, fields)
                .prop_map(|(queue, index, fields)| DriverAction::Descriptor { queue, index, fields }),
            4 => (queue(), 0_u16..66).prop_map(|(queue, head)| DriverAction::Offer { queue, head }),
            1 => (queue(), 0x4000_u64..0x9000, any::<u16>())
                .prop_map(|(queue, at, value)| DriverAction::Overwrite { queue, at: at & !1, value }),
            2 => (prop::sample::select(vec![0_u32, 1, 4, 8, 11, 77]), prop_oneof![0_u64..300, any::<u64>()])
                .prop_map(|(kind, sector)| DriverAction::Header { kind, sector }),
            3 => queue().prop_map(|queue| DriverAction::Notify { queue }),
            1 => Just(DriverAction::PauseAndResume),
        ],
        1..60,
    )
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
    for action in actions {
        perform(&mut driver, action);
    }
    assert_eq!(driver.function.pause(), WriterState::Clean);
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
struct Corruption {
    /// The index of the value to replace, modulo the number of values.
    place: usize,
    value: serde_json::Value,
}

fn corruptions() -> impl Strategy<Value = Vec<Corruption>> {
    let value = prop_oneof![
        4 => any::<u64>().prop_map(Into::into),
        4 => (0_u64..70_000).prop_map(Into::into),
        1 => any::<bool>().prop_map(Into::into),
        1 => Just(serde_json::Value::Null),
        1 => Just(serde_json::json!([])),
        1 => Just(serde_json::json!([{"queue": 0, "head": 7}, {"queue": 1, "head": 0}, {"queue": 9, "head": 9}])),
    ];
    let one = (any::<usize>(), value).prop_map(|(place, value)| Corruption { place, value });
    prop::collection::vec(one, 1..5)
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
fn machine_with_requests() -> TestMachine {
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
    corruptions: Vec<Corruption>,
) {
    let mut state: DeviceState = serde_json::from_str(golden).unwrap();
    for Corruption { place, value } in corruptions {
        let mut found = Vec::new();
        places(&mut state.body, &mut found);
        let place = place % found.len();
        *found.swap_remove(place) = value;
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

#[test]
fn the_states_are_loaded_when_they_are_not_corrupted() {
    let machine = machine_with_requests();
    let (net, _network) = network_device(&machine, MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    for (mut function, golden) in [
        (
            block_device(&machine, 1 << 20, 2),
            include_str!("../golden/virtio-blk-v1.json"),
        ),
        (
            console_device(&machine).0,
            include_str!("../golden/virtio-console-v1.json"),
        ),
        (net, include_str!("../golden/virtio-net-v1.json")),
    ] {
        function.place_bar(0, GuestAddress(BAR_AT));
        assert_eq!(function.pause(), WriterState::Clean);
        function
            .restore(&serde_json::from_str(golden).unwrap())
            .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn i7_no_state_panics_a_block_device(corruptions in corruptions()) {
        let machine = machine_with_requests();
        let golden = include_str!("../golden/virtio-blk-v1.json");
        survives_state(&machine, block_device(&machine, 1 << 20, 2), golden, corruptions);
    }

    #[test]
    fn i7_no_state_panics_a_network_device(corruptions in corruptions()) {
        let machine = machine_with_requests();
        let (device, _network) = network_device(&machine, MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
        let golden = include_str!("../golden/virtio-net-v1.json");
        survives_state(&machine, device, golden, corruptions);
    }

    #[test]
    fn i7_no_queue_content_stops_a_block_device_for_good(actions in actions()) {
        let machine = TestMachine::new();
        let device = block_device(&machine, 128 << 10, 3);
        survives(&machine, device, 3, &actions, |driver| {
            let header = driver.buffer(16, 0);
            driver.ram.write_slice(&[0; 16], GuestAddress(header)).unwrap();
            let data = driver.buffer(513, 0);
            driver.offer(2, &[Buffer::readable(header, 16), Buffer::writable(data, 513)]);
            driver.notify(2);
            assert_eq!(driver.used(2).1, 513);
        });
    }

    #[test]
    fn i7_no_queue_content_stops_a_network_device_for_good(actions in actions()) {
        let machine = TestMachine::new();
        let (device, network) = network_device(&machine, MacAddress([2; 6]));
        for fill in 0..5 {
            network.send(&[fill; 600]).unwrap();
        }
        survives(&machine, device, 3, &actions, |driver| {
            // Frames of the malicious driver must not block those of the correct one.
            while network.recv(&mut [0; 70_000]).is_ok() {}
            let frame = driver.buffer(72, 0);
            driver.offer(1, &[Buffer::readable(frame, 72)]);
            driver.notify(1);
            driver.used(1);
        });
    }

    #[test]
    fn i7_no_queue_content_stops_an_entropy_device_for_good(actions in actions()) {
        let machine = TestMachine::new();
        let config = RngConfig { name: "rng0".into() };
        let device = RngDevice::new(&config, machine.context()).unwrap();
        survives(&machine, device.function, 1, &actions, |driver| {
            let buffer = driver.buffer(8, 0);
            driver.offer(0, &[Buffer::writable(buffer, 8)]);
            driver.notify(0);
            assert_eq!(driver.used(0).1, 8);
        });
    }

    #[test]
    fn i7_no_queue_content_stops_a_console_device_for_good(actions in actions()) {
        let machine = TestMachine::new();
        let (device, host) = console_device(&machine);
        host.send(&[7; 600]).unwrap();
        survives(&machine, device, 6, &actions, |driver| {
            // Output of the malicious driver must not block that of the correct one.
            while host.recv(&mut [0; 4096]).is_ok() {}
            let output = driver.buffer(72, 0);
            driver.offer(5, &[Buffer::readable(output, 72)]);
            driver.notify(5);
            driver.used(5);
        });
    }

    #[test]
    fn i7_no_state_panics_a_console_device(corruptions in corruptions()) {
        let machine = machine_with_requests();
        let (device, _host) = console_device(&machine);
        let golden = include_str!("../golden/virtio-console-v1.json");
        survives_state(&machine, device, golden, corruptions);
    }
}

/// A console device and the host at the other end of its port.
fn console_device(machine: &TestMachine) -> (VirtioFunction, UnixDatagram) {
    let (port, host) = UnixDatagram::pair().unwrap();
    port.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let config = ConsoleConfig {
        name: "agent0".into(),
        port: "org.qemu.guest_agent.0".into(),
    };
    let port = Arc::new(SocketPort(port));
    let device = ConsoleDevice::new(&config, port, machine.context()).unwrap();
    (device.function, host)
}

#[derive(Debug)]
struct SocketPort(UnixDatagram);

impl HostPort for SocketPort {
    fn raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }
    fn receive(&self, data: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(data)
    }
    fn send(&self, data: &[u8]) -> std::io::Result<usize> {
        self.0.send(data)
    }
    fn guest_opened(&self, _open: bool) {}
}

fn block_device(machine: &TestMachine, size: u64, queue_count: u16) -> VirtioFunction {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let run = ExtentRun {
        start: Lba(0),
        length: ByteCount(size),
    };
    let mut disk = Disk::new(file.into(), &[run], run.length, Arc::new(AlwaysOpen)).unwrap();
    disk.block_bytes = 4096;
    let config = BlkConfig {
        name: "blk0".into(),
        serial: Serial::default(),
        queue_count,
        read_only: false,
    };
    BlkDevice::new(&config, disk, machine.context())
        .unwrap()
        .function
}

/// A network device and the network at its other end.
fn network_device(machine: &TestMachine, mac: MacAddress) -> (VirtioFunction, UnixDatagram) {
    let (socket, network) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    network.set_nonblocking(true).unwrap();
    let config = NetConfig {
        name: "net0".into(),
        mac,
        mtu: Some(1450),
        refuses_larger_mtu: true,
    };
    let tap = Arc::new(SocketTap(socket));
    let device = NetDevice::new(&config, tap, machine.context()).unwrap();
    (device.function, network)
}

#[derive(Debug)]
struct SocketTap(UnixDatagram);

impl Tap for SocketTap {
    fn raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }
    fn receive(&self, frame: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(frame)
    }
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        self.0.send(frame).map(drop)
    }
    fn set_offloads(&self, _flags: u32) -> std::io::Result<()> {
        Ok(())
    }
}
