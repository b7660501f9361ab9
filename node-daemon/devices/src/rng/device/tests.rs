use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::testing::{Buffer, TestDriver, TestMachine, assert_golden, migrate, wait_until};

fn make(machine: &TestMachine) -> RngDevice {
    let config = RngConfig {
        name: "rng0".into(),
    };
    RngDevice::new(&config, machine.context()).unwrap()
}

fn request(driver: &mut TestDriver, length: usize) -> Vec<u8> {
    let buffer = driver.buffer(length, 0);
    let head = driver.offer(0, &[Buffer::writable(buffer, length)]);
    driver.notify(0);
    let (used, written) = driver.used(0);
    assert_eq!(used, head);
    let mut data = vec![0; usize::try_from(written).unwrap()];
    driver
        .ram
        .read_slice(&mut data, GuestAddress(buffer))
        .unwrap();
    data
}

#[test]
fn a_guest_gets_different_bytes_each_time() {
    let machine = TestMachine::new();
    let device = make(&machine);
    let mut driver = TestDriver::new(&machine, device.function);
    driver.start(0, 1);
    let first = request(&mut driver, 32);
    assert_eq!(first.len(), 32);
    assert_ne!(first, request(&mut driver, 32));
    assert_eq!(
        request(&mut driver, 1 << 20).len(),
        64 << 10,
        "a request is answered in part"
    );
    let counts = device.metrics.counts();
    assert_eq!((counts.requests, counts.bytes), (3, 64 + (64 << 10)));
}

#[test]
fn requests_complete_after_a_migration() {
    let machine = TestMachine::new();
    let mut driver = TestDriver::new(&machine, make(&machine).function);
    driver.start(0, 1);
    request(&mut driver, 8);
    let other = TestMachine::with_ram(machine.ram.clone());
    migrate(&mut driver, make(&other).function);
    assert_eq!(request(&mut driver, 8).len(), 8);
}

#[test]
fn a_request_with_nothing_to_write_to_is_a_bad_virtqueue() {
    let machine = TestMachine::new();
    let mut driver = TestDriver::new(&machine, make(&machine).function);
    driver.start(0, 1);
    driver.offer(0, &[Buffer::readable(0x1000, 8)]);
    driver.notify(0);
    wait_until("the report", || !machine.failures.all().is_empty());
    let text = machine.failures.all()[0].to_string();
    assert_eq!(
        text,
        "rng0: bad virtqueue 0: malformed request: nothing to write to"
    );
}

#[test]
fn golden_state_version_1_is_still_read_and_written() {
    let machine = TestMachine::new();
    let golden = include_str!("../../../golden/virtio-rng-v1.json");
    let mut driver = TestDriver::new(&machine, make(&machine).function);
    driver.start(1 << 29, 1);
    request(&mut driver, 8);
    request(&mut driver, 8);
    assert_golden(&mut driver, make(&machine).function, golden);
}
