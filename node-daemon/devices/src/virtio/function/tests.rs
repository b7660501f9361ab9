use std::io;
use std::os::fd::RawFd;

use proptest::prelude::*;

use super::*;
use crate::testing::{
    BAR_AT, Buffer, QUEUE_SIZE, TestDriver, TestMachine, migrate, rings, wait_until,
    write_descriptor,
};
use crate::virtio::queue_handler::HandlerError;

/// Completes every chain by writing its sequence number to it.
#[derive(Default)]
struct Counter {
    answered: u8,
    panic: bool,
}

impl QueueHandler for Counter {
    fn watched(&self) -> Vec<RawFd> {
        Vec::new()
    }
    fn start(&mut self, active: &mut Active) -> Result<(), HandlerError> {
        (0..active.queues.len()).try_for_each(|queue| self.queue_notified(active, queue))
    }
    fn queue_notified(&mut self, active: &mut Active, queue: usize) -> Result<(), HandlerError> {
        assert!(!self.panic, "panic requested");
        let failed = HandlerError::for_queue(queue);
        let Some(own) = &mut active.queues[queue] else {
            return Ok(());
        };
        while let Some(chain) = own.pop(&active.ram).map_err(&failed)? {
            self.answered += 1;
            let written = chain.writable.write(&active.ram, &[self.answered]);
            own.push_used(&active.ram, chain.head, written)
                .map_err(&failed)?;
            if own.wants_interrupt(&active.ram).map_err(&failed)? {
                active.shared.signal_queue(queue);
            }
        }
        Ok(())
    }
    fn fd_ready(&mut self, _: &mut Active, _: usize) -> Result<(), HandlerError> {
        Ok(())
    }
    fn quiesce(&mut self, _: &mut Active) -> Result<(), HandlerError> {
        Ok(())
    }
    fn reset(&mut self) {
        self.answered = 0;
    }
    fn save(&self) -> Value {
        self.answered.into()
    }
    fn restore(&mut self, _: Option<&mut Active>, state: &Value) -> Result<(), String> {
        let answered = state.as_u64().and_then(|count| u8::try_from(count).ok());
        self.answered = answered.ok_or("no count")?;
        Ok(())
    }
}

fn function(machine: &TestMachine, handler: Counter) -> io::Result<VirtioFunction> {
    let model = Model {
        name: "counter0".into(),
        kind: "counter",
        version: 1,
        device_type: 4,
        class: [0xFF, 0, 0],
        features: 1 << 5,
        features_of_state: 0,
        queue_sizes: vec![64, 128],
        config: vec![0xAA, 0xBB],
    };
    VirtioFunction::new(model, machine.context(), |_| handler)
}

fn driver(machine: &TestMachine) -> TestDriver {
    TestDriver::new(machine, function(machine, Counter::default()).unwrap())
}

/// Offers a buffer of one byte and waits until the device has written it.
fn request(driver: &mut TestDriver, queue: u16) -> u8 {
    let buffer = driver.buffer(1, 0);
    let head = driver.offer(queue, &[Buffer::writable(buffer, 1)]);
    driver.notify(queue);
    assert_eq!(driver.used(queue), (head, 1));
    vm_memory::Bytes::read_obj(&*driver.ram, GuestAddress(buffer)).unwrap()
}

#[test]
fn virtio_4_1_4_the_capabilities_lead_to_every_structure() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    for (kind, offset) in [(1, 0), (2, 0x3000), (3, 0x1000), (4, 0x2000)] {
        let at = driver.capability(9, kind).unwrap();
        let mut raw = [0; 16];
        driver.function.space.read(at, &mut raw);
        assert_eq!(
            u32::from_le_bytes([raw[8], raw[9], raw[10], raw[11]]),
            offset,
            "type {kind}"
        );
        assert_eq!(raw[4], 0, "all are in BAR 0");
    }
    let notify = driver.capability(9, 2).unwrap();
    assert_eq!(driver.config_byte(notify + 2), 20);
    assert_eq!(
        driver.config_byte(notify + 16),
        4,
        "the notification multiplier"
    );
    assert_eq!(driver.config_byte(2) | (driver.config_byte(3) << 8), 0x1044);
    assert!(driver.capability(0x11, 0).is_some());
}

#[test]
fn a_driver_that_polls_needs_neither_interrupts_nor_ioeventfds() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(0, 2);
    assert_eq!(request(&mut driver, 0), 1);
    assert_eq!(request(&mut driver, 1), 2);
    assert_eq!(request(&mut driver, 0), 3);
    assert!((0..3).all(|gsi| machine.router.raised(gsi) == 0));
    wait_until("the interrupt status", || driver.read8(0x1000) == 1);
    assert_eq!(driver.read8(0x1000), 0, "reading clears it");
    assert_eq!(machine.failures.all(), []);
}

#[test]
fn a_used_buffer_raises_its_queues_vector() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(0, 2);
    driver.enable_vector(2, 0x31);
    driver.write16(0x16, 1);
    driver.write16(0x1A, 2);
    assert_eq!(driver.read16(0x1A), 2);
    request(&mut driver, 1);
    wait_until("the interrupt", || machine.router.raised(2) == 1);
    assert_eq!(machine.router.route(2).unwrap().data, 0x31);

    driver.write16(0x1A, 9);
    assert_eq!(
        driver.read16(0x1A),
        0xFFFF,
        "a vector that does not exist is refused"
    );
    let available = rings(1)[1];
    vm_memory::Bytes::write_obj(&*driver.ram, 1_u16, GuestAddress(available)).unwrap();
    driver.write16(0x1A, 2);
    request(&mut driver, 1);
    request(&mut driver, 0);
    assert_eq!(
        machine.router.raised(2),
        1,
        "the driver disabled interrupts"
    );
}

#[test]
fn ioeventfds_follow_the_bar() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    assert_eq!(
        machine.ioeventfds.addresses(),
        [BAR_AT + 0x3000, BAR_AT + 0x3004]
    );
    driver.start(0, 2);
    driver
        .function
        .config_write(0x10, &0xD000_0000_u32.to_le_bytes());
    assert_eq!(machine.ioeventfds.addresses(), [0xD000_3000, 0xD000_3004]);
    let buffer = driver.buffer(1, 0);
    driver.offer(1, &[Buffer::writable(buffer, 1)]);
    machine.ioeventfds.ring(0xD000_3004);
    driver.used(1);
    driver.function.config_write(4, &[0, 0]);
    assert_eq!(machine.ioeventfds.addresses(), [0_u64; 0]);
}

#[test]
fn virtio_3_1_1_features_that_were_not_offered_are_refused() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.write8(0x14, 3);
    driver.write32(0x08, 0);
    driver.write32(0x0C, 1 << 6);
    driver.write32(0x08, 1);
    driver.write32(0x0C, 1);
    driver.write8(0x14, 11);
    assert_eq!(driver.status(), 3, "FEATURES_OK is not accepted");
    driver.write8(0x14, 15);
    assert_eq!(driver.status(), 3, "and so is no DRIVER_OK");
    driver.write32(0x08, 0);
    driver.write32(0x0C, 1 << 5);
    driver.write8(0x14, 11);
    assert_eq!(driver.status(), 11);
    driver.write32(0x08, 1);
    driver.write32(0x0C, 0);
    assert_eq!(
        driver.read32(0x0C),
        1,
        "features are fixed after FEATURES_OK"
    );
}

#[test]
fn a_driver_without_version_1_is_refused() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.write8(0x14, 11);
    assert_eq!(driver.status(), 3);
}

#[test]
fn i7_a_bad_virtqueue_stops_the_device_with_a_reason_until_a_reset() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(0, 2);
    let [table, ..] = rings(0);
    write_descriptor(&driver.ram, table, 5, (0x1000, 1, 1, 5));
    driver.offer_head(0, 5);
    driver.notify(0);
    wait_until("NEEDS_RESET", || driver.status() & 0x40 != 0);
    let expected = DeviceFailure::BadVirtqueue {
        device: "counter0".into(),
        queue: 0,
        reason: "descriptor chain 5 has more than 64 descriptors".into(),
    };
    assert_eq!(machine.failures.all(), [expected]);

    driver.start(0, 2);
    assert_eq!(driver.status(), 15);
    assert_eq!(request(&mut driver, 0), 1);
}

#[test]
fn a_queue_that_is_enabled_too_late_stays_off_and_harms_no_migration() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(0, 1);
    driver.write16(0x16, 1);
    driver.write16(0x1C, 1);
    assert_eq!(driver.read16(0x1C), 0);
    driver.notify(1);
    let fresh = function(&machine, Counter::default()).unwrap();
    migrate(&mut driver, fresh);
    assert_eq!(request(&mut driver, 0), 1);
}

#[test]
fn rings_outside_of_memory_are_refused_when_the_driver_starts() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.negotiate(0);
    driver.write16(0x16, 1);
    driver.write32(0x24, 0xFFFF);
    driver.write16(0x1C, 1);
    driver.write8(0x14, 15);
    assert_ne!(driver.status() & 0x40, 0);
    let failures = machine.failures.all();
    assert!(
        matches!(failures[..], [DeviceFailure::BadVirtqueue { queue: 1, .. }]),
        "{failures:?}"
    );
}

#[test]
fn an_available_index_that_runs_ahead_is_refused() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(0, 1);
    let available = rings(0)[1];
    vm_memory::Bytes::write_obj(&*driver.ram, QUEUE_SIZE + 1, GuestAddress(available + 2)).unwrap();
    driver.notify(0);
    wait_until("NEEDS_RESET", || driver.status() & 0x40 != 0);
    let reason = machine.failures.all()[0].to_string();
    assert!(reason.contains("available ring index"), "{reason}");
}

#[test]
fn a_panic_in_the_device_thread_is_reported_blocks_no_caller_and_is_unclean() {
    let machine = TestMachine::new();
    let handler = Counter {
        panic: true,
        ..Counter::default()
    };
    let mut driver = TestDriver::new(&machine, function(&machine, handler).unwrap());
    driver.start(0, 1);
    wait_until("the report", || !machine.failures.all().is_empty());
    let failures = machine.failures.all();
    assert!(
        matches!(&failures[0], DeviceFailure::Panicked { reason, .. } if reason == "panic requested")
    );
    assert_eq!(driver.function.pause(), WriterState::Unclean);
    driver.function.resume();
    driver.write8(0x14, 0);
    driver.notify(0);
}

#[test]
fn no_request_completes_while_paused_and_all_after_resume() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(0, 1);
    request(&mut driver, 0);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let before = driver.function.save();
    let buffer = driver.buffer(1, 0);
    let head = driver.offer(0, &[Buffer::writable(buffer, 1)]);
    driver.notify(0);
    assert_eq!(
        driver.function.save(),
        before,
        "a paused device does not move"
    );
    assert_eq!(driver.poll_used(0), None);
    driver.function.resume();
    assert_eq!(driver.used(0), (head, 1));
}

#[test]
fn a_restored_device_interrupts_once_for_notifications_that_may_be_lost() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    driver.start(1 << 29, 1);
    driver.enable_vector(1, 0x31);
    driver.write16(0x16, 0);
    driver.write16(0x1A, 1);
    assert_eq!(request(&mut driver, 0), 1);
    let other = TestMachine::with_ram(machine.ram.clone());
    let fresh = function(&other, Counter::default()).unwrap();
    migrate(&mut driver, fresh);
    wait_until("the interrupt", || other.router.raised(1) > 0);
    assert_eq!(other.router.route(1).unwrap().data, 0x31);
    assert_eq!(request(&mut driver, 0), 2);
}

#[test]
fn a_state_that_does_not_fit_is_refused_by_name() {
    let machine = TestMachine::new();
    let mut source = driver(&machine);
    source.start(0, 1);
    assert_eq!(source.function.pause(), WriterState::Clean);
    let saved = source.function.save();

    let refused = |change: &dyn Fn(&mut Value)| {
        let mut state = saved.clone();
        change(&mut state.body);
        let mut fresh = function(&machine, Counter::default()).unwrap();
        assert_eq!(fresh.pause(), WriterState::Clean);
        fresh.restore(&state).unwrap_err().to_string()
    };
    let text = refused(&|body| body["features"] = 1.into());
    assert!(
        text.contains("counter0: state does not fit: the source offered features"),
        "{text}"
    );
    let text = refused(&|body| body["registers"]["queues"][0]["size"] = 77.into());
    assert!(text.contains("queue 0"), "{text}");
    let text = refused(&|body| body["registers"]["queues"][0]["used"] = u64::MAX.into());
    assert!(text.contains("queue 0"), "{text}");
    let text = refused(&|body| body["msix"]["vectors"] = Value::Array(vec![]));
    assert!(text.contains("interrupt vectors"), "{text}");
    let text = refused(&|body| body["device"] = "x".into());
    assert!(text.contains("no count"), "{text}");
    let text = refused(&|body| body["registers"] = Value::Null);
    assert!(text.contains("malformed"), "{text}");
}

#[test]
fn virtio_4_1_4_9_registers_are_reachable_through_configuration_space() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    let access = driver.capability(9, 5).unwrap();
    driver.function.config_write(access + 4, &[0]);
    driver
        .function
        .config_write(access + 8, &0x14_u32.to_le_bytes());
    driver
        .function
        .config_write(access + 12, &1_u32.to_le_bytes());
    driver.function.config_write(access + 16, &[3]);
    assert_eq!(driver.status(), 3);
    assert_eq!(driver.config_byte(access + 16), 3);
    driver
        .function
        .config_write(access + 8, &0x2001_u32.to_le_bytes());
    assert_eq!(driver.config_byte(access + 16), 0xBB);
}

#[test]
fn a_guest_reboot_returns_the_device_to_its_initial_state() {
    let machine = TestMachine::new();
    let mut driver = driver(&machine);
    assert_eq!(driver.function.pause(), WriterState::Clean);
    let fresh = driver.function.save();
    driver.function.resume();
    driver.start(0, 1);
    driver.enable_vector(0, 1);
    driver
        .function
        .config_write(0x10, &0xD000_0000_u32.to_le_bytes());
    request(&mut driver, 0);
    driver.function.reset();
    assert_eq!(driver.function.pause(), WriterState::Clean);
    assert_eq!(driver.function.save(), fresh);
    assert_eq!(machine.ioeventfds.addresses()[0], BAR_AT + 0x3000);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn i7_no_sequence_of_register_accesses_panics(
        accesses in prop::collection::vec(
            (any::<bool>(), 0_u64..0x8000, prop::sample::select(vec![1_usize, 2, 4, 8]), any::<u64>()),
            0..200,
        ),
        config in prop::collection::vec((0_u16..253, any::<u32>()), 0..50),
    ) {
        let machine = TestMachine::new();
        let mut function = function(&machine, Counter::default()).unwrap();
        function.place_bar(0, GuestAddress(BAR_AT));
        assert_eq!(function.pause(), WriterState::Clean);
        let fresh = function.save();
        function.resume();
        for (register, value) in config {
            function.config_write(register & !3, &value.to_le_bytes());
            function.config_read(register & !3, &mut [0; 4]);
        }
        for (write, offset, length, value) in accesses {
            // Half of the accesses go to the common configuration.
            let offset = if value & 1 == 0 { offset % 0x38 } else { offset };
            if write {
                function.bar_write(0, offset, &value.to_le_bytes()[..length]);
            } else {
                function.bar_read(0, offset, &mut [0; 8][..length]);
            }
        }
        assert_eq!(function.pause(), WriterState::Clean);
        function.reset();
        assert_eq!(function.save(), fresh);
    }
}
