//! Any access to any register: PCI configuration, BARs, I/O ports, and where nothing is.

use super::access::{self, WIDTHS};
use super::function::{BAR_0, COMMAND, CONFIG_ADDRESS, CONFIG_DATA, Function, select};
use super::playground::{MMIO_BYTES, MMIO_START};
use super::random::Random;
use crate::port;

/// Reads or writes the configuration space of some function, by ports or in memory.
pub(super) fn configuration(functions: &[Option<Function>], random: &mut Random) {
    let device = if random.chance(16) {
        random.below(256) as u8
    } else {
        let function = functions[random.below(functions.len() as u64) as usize].as_ref();
        function.map_or(0, |function| function.device)
    };
    let register = match random.below(4) {
        0 => COMMAND,
        1 => BAR_0 + 4 * random.below(6) as u8,
        _ => random.below(256) as u8,
    };
    let value = random.value();
    let ecam = ECAM_START | u64::from(device) << 15 | u64::from(register);
    match random.below(8) {
        0 => access::write(ecam + random.below(4096), random.pick(&WIDTHS), value),
        1 => access::write(ecam, random.pick(&WIDTHS), value),
        2 => drop_value(access::read(
            ecam + random.below(1 << 21),
            random.pick(&WIDTHS),
        )),
        3 => {
            port::write32(CONFIG_ADDRESS, value as u32);
            port_access(CONFIG_DATA + random.below(4) as u16, random);
        }
        _ => {
            select(device, register);
            let data = CONFIG_DATA + random.below(4) as u16;
            match random.below(4) {
                0 => port::write8(data, value as u8),
                1 => port::write16(data, value as u16),
                2 => port::write32(CONFIG_DATA, value as u32),
                _ => drop_value(u64::from(port::read32(data))),
            }
        }
    }
}

/// Reads or writes in BAR 0 of some function, wherever it was after the reset.
pub(super) fn device_register(functions: &[Option<Function>], random: &mut Random) {
    let function = functions[random.below(functions.len() as u64) as usize].as_ref();
    let Some(function) = function.filter(|function| function.bar != 0) else {
        return;
    };
    if !random.chance(8) {
        function.repair();
    }
    let region = random.below(8);
    let offset = match random.below(8) {
        0 => random.below(0x1000),
        1 => random.below(0x1000) | 0xff0,
        _ => random.below(0x48),
    };
    let address = function.bar + 0x1000 * region + offset;
    let width = random.pick(&WIDTHS);
    match random.below(8) {
        0..3 => drop_value(access::read(address, width)),
        3 => access::copy(SCRATCH, address, random.below(64)),
        4 => access::copy(address, SCRATCH, random.below(64)),
        _ => access::write(address, width, random.value()),
    }
}

/// Accesses an address between RAM and 4 GiB, rarely that of an interrupt controller.
pub(super) fn hole(random: &mut Random) {
    let address = match random.below(16) {
        0 => random.pick(&[IO_APIC, LOCAL_APIC]) + 16 * random.below(256),
        1 => (4 << 30) - 16 - random.below(1 << 16),
        _ => MMIO_START + random.below(MMIO_BYTES - 16),
    };
    let width = random.pick(&WIDTHS);
    if random.chance(2) {
        access::write(address, width, random.value());
    } else {
        drop_value(access::read(address, width));
    }
}

/// Accesses some port, rarely one that no device has.
pub(super) fn any_port(random: &mut Random) {
    let port = if random.chance(8) {
        random.below(0x10000) as u16
    } else {
        let (first, count) = random.pick(&PORTS);
        first + random.below(count) as u16
    };
    port_access(port, random);
}

fn port_access(port: u16, random: &mut Random) {
    if switches(port) {
        drop_value(u64::from(port::read8(port)));
        return;
    }
    let value = random.value();
    match random.below(8) {
        0 => port::write8(port, value as u8),
        1 => port::write16(port, value as u16),
        2 => port::write32(port, value as u32),
        3 => drop_value(u64::from(port::read8(port))),
        4 => drop_value(u64::from(port::read16(port))),
        5 => drop_value(u64::from(port::read32(port))),
        way => {
            let mut words = [0; STRING_BYTES];
            for (word, byte) in words.chunks_mut(8).zip(0..) {
                word.copy_from_slice(&(value ^ byte).to_le_bytes()[..word.len()]);
            }
            let length = random.below(STRING_BYTES as u64 + 1) as usize;
            let width = random.pick(&[1, 2, 4]);
            if way == 6 {
                port::read_string(port, width, &mut words[..length]);
            } else {
                port::write_words(port, width, &words[..length]);
            }
        }
    }
}

/// Whether a write to the port may switch the machine off or reset it, which are steps of their own. A wide
/// access reaches the next ports too, on other machines than this one.
const fn switches(port: u16) -> bool {
    matches!(port, 0x5fd..=0x602 | 0x61..=0x64 | 0xcf6..=0xcf7 | 0xcf9 | 0x92)
}

/// That a register was read is all that counts.
fn drop_value(value: u64) {
    core::hint::black_box(value);
}

/// Ports with something behind them, as first port and number: serial, clock, timer, interrupt controllers,
/// ACPI, power management timer, configuration space, keyboard.
const PORTS: [(u16, u64); 10] = [
    (0x3f8, 8),
    (0x70, 2),
    (0x40, 4),
    (0x20, 2),
    (0xa0, 2),
    (0x600, 12),
    (0x608, 4),
    (CONFIG_ADDRESS, 8),
    (0x60, 5),
    (0x4d0, 2),
];
const STRING_BYTES: usize = 1100;
/// Memory that nothing else uses.
const SCRATCH: u64 = 30 << 20;
const ECAM_START: u64 = MMIO_START;
const IO_APIC: u64 = 0xfec0_0000;
const LOCAL_APIC: u64 = 0xfee0_0000;
