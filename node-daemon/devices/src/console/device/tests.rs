use std::io::{Read as _, Write as _};
use std::os::fd::{AsRawFd as _, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};

use bascule_types::WriterState;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::device::Device as _;
use crate::testing::{Buffer, TestDriver, TestMachine, assert_golden, migrate, wait_until};

const MULTIPORT: u64 = 1 << 1;
const EVENT_IDX: u64 = 1 << 29;
const QUEUES: u16 = 6;
const CONTROL_IN: u16 = 2;
const CONTROL_OUT: u16 = 3;
const INPUT: u16 = 4;
const OUTPUT: u16 = 5;

#[derive(Debug)]
struct Port {
    stream: UnixStream,
    open: AtomicBool,
}

impl HostPort for Port {
    fn raw_fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }
    fn receive(&self, data: &mut [u8]) -> io::Result<usize> {
        (&self.stream).read(data)
    }
    fn send(&self, data: &[u8]) -> io::Result<usize> {
        (&self.stream).write(data)
    }
    fn guest_opened(&self, open: bool) {
        self.open.store(open, Ordering::Release);
    }
}

/// The host's side: what the device calls, and the other end of its stream.
struct Host {
    port: Arc<Port>,
    stream: UnixStream,
}

impl Host {
    fn sees_open(&self, open: bool) {
        let is = || self.port.open.load(Ordering::Acquire) == open;
        wait_until("the guest to open or close the port", is);
    }

    fn read(&mut self, length: usize) -> Vec<u8> {
        let mut data = vec![0; length];
        self.stream.read_exact(&mut data).unwrap();
        data
    }
}

fn make(machine: &TestMachine) -> (VirtioFunction, Host) {
    let (ours, stream) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let port = Arc::new(Port {
        stream: ours,
        open: AtomicBool::new(false),
    });
    let config = ConsoleConfig {
        name: "agent0".into(),
        port: "org.qemu.guest_agent.0".into(),
    };
    let device = ConsoleDevice::new(&config, port.clone(), machine.context()).unwrap();
    (device.function, Host { port, stream })
}

/// Gives the device a buffer on `queue` and returns what it writes there.
fn receive(driver: &mut TestDriver, queue: u16) -> Vec<u8> {
    let start = offer_buffer(driver, queue);
    driver.notify(queue);
    let (_, written) = driver.used(queue);
    read(driver, start, written)
}

fn offer_buffer(driver: &mut TestDriver, queue: u16) -> u64 {
    let start = driver.buffer(4096, 0);
    driver.offer(queue, &[Buffer::writable(start, 4096)]);
    start
}

fn read(driver: &TestDriver, start: u64, length: u32) -> Vec<u8> {
    let mut data = vec![0; usize::try_from(length).unwrap()];
    driver
        .ram
        .read_slice(&mut data, GuestAddress(start))
        .unwrap();
    data
}

fn send(driver: &mut TestDriver, queue: u16, data: &[u8]) {
    let start = driver.buffer(data.len(), 0);
    driver.ram.write_slice(data, GuestAddress(start)).unwrap();
    driver.offer(queue, &[Buffer::readable(start, data.len())]);
    driver.notify(queue);
}

fn control(driver: &mut TestDriver, port: u32, event: u16, value: u16) {
    let mut message = port.to_le_bytes().to_vec();
    message.extend(event.to_le_bytes());
    message.extend(value.to_le_bytes());
    send(driver, CONTROL_OUT, &message);
}

fn pause(driver: &mut TestDriver) {
    assert_eq!(driver.function.pause(), WriterState::Clean);
}

/// What Linux does when it finds the device and a program opens the port.
fn open(driver: &mut TestDriver) {
    driver.start(MULTIPORT | EVENT_IDX, QUEUES);
    control(driver, 0xFFFF_FFFF, 0, 1);
    assert_eq!(receive(driver, CONTROL_IN), [1, 0, 0, 0, 1, 0, 1, 0]);
    control(driver, 1, 3, 1);
    let name = receive(driver, CONTROL_IN);
    assert_eq!(name[..8], [1, 0, 0, 0, 7, 0, 1, 0]);
    assert_eq!(&name[8..], b"org.qemu.guest_agent.0");
    assert_eq!(receive(driver, CONTROL_IN), [1, 0, 0, 0, 6, 0, 1, 0]);
    control(driver, 1, 6, 1);
}

#[test]
fn virtio_5_3_6_2_a_driver_finds_a_named_port_that_the_host_has_open() {
    let machine = TestMachine::new();
    let (function, host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    assert_eq!(driver.config(4, 4), [2, 0, 0, 0], "max_nr_ports");
    open(&mut driver);
    host.sees_open(true);
    control(&mut driver, 1, 6, 0);
    host.sees_open(false);
}

#[test]
fn bytes_pass_in_both_directions() {
    let machine = TestMachine::new();
    let (function, mut host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    open(&mut driver);
    send(&mut driver, OUTPUT, b"from the guest");
    assert_eq!(host.read(14), b"from the guest");
    assert_eq!(driver.used(OUTPUT).1, 0);
    host.sees_open(true);
    host.stream.write_all(b"to the guest").unwrap();
    assert_eq!(receive(&mut driver, INPUT), b"to the guest");
}

#[test]
fn input_that_comes_while_no_program_has_the_port_open_is_dropped() {
    let machine = TestMachine::new();
    let (function, mut host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    open(&mut driver);
    control(&mut driver, 1, 6, 0);
    host.sees_open(false);
    host.stream.write_all(b"to nobody").unwrap();
    // A resumed device looks at its input before all else.
    pause(&mut driver);
    driver.function.resume();
    control(&mut driver, 1, 6, 1);
    host.sees_open(true);
    host.stream.write_all(b"to somebody").unwrap();
    assert_eq!(receive(&mut driver, INPUT), b"to somebody");
}

/// Without a bound, a guest whose host does not read would have the device keep all that it writes.
#[test]
fn output_that_the_host_does_not_take_stays_in_the_guests_queue_and_none_is_lost() {
    let machine = TestMachine::new();
    let (function, mut host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    open(&mut driver);
    let output: Vec<u8> = (0..1_u32 << 20)
        .map(|at| (at / 7).to_le_bytes()[0])
        .collect();
    send(&mut driver, OUTPUT, &output);
    let first = host.read(1);
    assert_eq!(
        driver.poll_used(OUTPUT),
        None,
        "the host has taken one byte"
    );
    // The place in the chain moves with the guest. What the host had in hand is lost with it.
    let other = TestMachine::with_ram(machine.ram.clone());
    let (function, mut there) = make(&other);
    migrate(&mut driver, function);
    host.stream.shutdown(std::net::Shutdown::Write).unwrap();
    drop(std::mem::replace(&mut host.port, there.port.clone()));
    let mut here = Vec::new();
    host.stream.read_to_end(&mut here).unwrap();
    let rest = there.read(output.len() - first.len() - here.len());
    assert_eq!([first, here, rest].concat(), output);
    driver.used(OUTPUT);
}

#[test]
fn a_port_that_is_open_is_open_after_a_migration() {
    let machine = TestMachine::new();
    let (function, host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    open(&mut driver);
    host.sees_open(true);
    let other = TestMachine::with_ram(machine.ram.clone());
    let (function, mut there) = make(&other);
    assert!(!there.port.open.load(Ordering::Acquire));
    migrate(&mut driver, function);
    there.sees_open(true);
    there.stream.write_all(b"hello").unwrap();
    assert_eq!(receive(&mut driver, INPUT), b"hello");
    driver.write8(0x14, 0);
    there.sees_open(false);
}

/// A guest could have had the device queue replies without end by never giving it buffers for them.
#[test]
fn requests_wait_while_their_replies_have_no_buffers() {
    let machine = TestMachine::new();
    let mut driver = TestDriver::new(&machine, make(&machine).0);
    driver.start(MULTIPORT, QUEUES);
    for _ in 0..40 {
        control(&mut driver, 1, 3, 1);
    }
    let mut taken = 0;
    wait_until("the device to stop taking requests", || {
        taken += usize::from(driver.poll_used(CONTROL_OUT).is_some());
        taken == 8
    });
    pause(&mut driver);
    assert_eq!(driver.poll_used(CONTROL_OUT), None);
    driver.function.resume();
    // With buffers, all are answered.
    for _ in 0..80 {
        receive(&mut driver, CONTROL_IN);
    }
}

#[test]
fn messages_that_no_driver_sends_are_ignored() {
    let machine = TestMachine::new();
    let (function, host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    driver.start(MULTIPORT, QUEUES);
    send(&mut driver, CONTROL_OUT, b"short");
    for (port, event) in [(0, 3), (2, 3), (0, 6), (7, 6), (1, 0x7777)] {
        control(&mut driver, port, event, 1);
    }
    control(&mut driver, 0xFFFF_FFFF, 0, 1);
    assert_eq!(receive(&mut driver, CONTROL_IN)[4], 1, "only PORT_ADD");
    assert!(!host.port.open.load(Ordering::Acquire));
    assert!(machine.failures.all().is_empty());
}

#[test]
fn a_driver_without_named_ports_gets_none() {
    let machine = TestMachine::new();
    let (function, host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    driver.start(0, 2);
    pause(&mut driver);
    driver.function.resume();
    assert!(!host.port.open.load(Ordering::Acquire));
    assert!(machine.failures.all().is_empty());
}

#[test]
fn golden_state_version_1_is_still_read_and_written() {
    let machine = TestMachine::new();
    let golden = include_str!("../../../golden/virtio-console-v1.json");
    let (function, host) = make(&machine);
    let mut driver = TestDriver::new(&machine, function);
    open(&mut driver);
    host.sees_open(true);
    // One more reply than the guest has buffers for.
    control(&mut driver, 0xFFFF_FFFF, 0, 1);
    driver.used(CONTROL_OUT);
    assert_golden(&mut driver, make(&machine).0, golden);
}

#[test]
fn a_state_of_another_port_or_with_too_many_replies_is_refused() {
    let parse = |change: fn(&mut crate::console::state::ConsoleState)| {
        let mut state = crate::console::state::ConsoleState::new("a".into());
        change(&mut state);
        crate::console::state::ConsoleState::from_value(&state.to_value(), "a").map(drop)
    };
    assert_eq!(parse(|_| {}), Ok(()));
    parse(|state| state.port = "b".into()).unwrap_err();
    parse(|state| state.replies = vec![crate::console::state::Reply::Add; 17].into()).unwrap_err();
}
