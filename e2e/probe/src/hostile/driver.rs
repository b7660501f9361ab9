//! A driver of any virtio device that is nearly right: it sets queues up and offers requests.

use super::access;
use super::function::{
    BLOCK, CONSOLE, DRIVER_OK, Function, NETWORK, QUEUES_MAX, STATUS, config_write,
};
use super::playground::Playground;
use super::queue::{Part, Ring};
use super::random::Random;
use super::talk;

/// Sets a device up as a driver does, with some of it left out or wrong.
pub(super) fn configure(function: &mut Function, random: &mut Random, memory: Playground) {
    function.rings = [const { None }; QUEUES_MAX];
    function.repair();
    let common = function.common;
    access::write(common + STATUS, 1, 0);
    access::write(common + STATUS, 1, 3);
    let features = features(common, random);
    for (select, word) in [features, features >> 32].into_iter().enumerate() {
        access::write(common + DRIVER_FEATURE_SELECT, 4, select as u64);
        access::write(common + DRIVER_FEATURES, 4, word & u64::from(u32::MAX));
    }
    access::write(common + STATUS, 1, 0xb);
    enable_vectors(function, random);
    let queues = access::read(common + QUEUE_COUNT, 2).min(QUEUES_MAX as u64) as u16;
    for index in 0..queues {
        if !random.chance(8) {
            function.rings[usize::from(index)] = set_queue(function, index, random, memory);
        }
    }
    if !random.chance(16) {
        access::write(common + STATUS, 1, 0xb | DRIVER_OK);
    }
}

/// What the driver accepts: mostly a part of what is offered.
fn features(common: u64, random: &mut Random) -> u64 {
    let offered = (0..2).fold(0, |offered, select| {
        access::write(common, 4, select);
        offered | access::read(common + DEVICE_FEATURE, 4) << (32 * select)
    });
    match random.below(16) {
        0 => random.value(),
        1..4 => offered & (random.next() | F_VERSION_1),
        4 => F_VERSION_1,
        _ => offered,
    }
}

fn set_queue(
    function: &Function,
    index: u16,
    random: &mut Random,
    memory: Playground,
) -> Option<Ring> {
    let common = function.common;
    access::write(common + QUEUE_SELECT, 2, u64::from(index));
    let size_max = access::read(common + QUEUE_SIZE, 2).clamp(1, 256);
    // A power of two, which all these are.
    let mut size = size_max >> if random.chance(3) { random.below(9) } else { 0 };
    size = size.max(1);
    access::write(common + QUEUE_SIZE, 2, size);
    let slot = u64::from(function.device) * QUEUES_MAX as u64 + u64::from(index);
    let places = Playground::rings(slot);
    // Ends the machine as soon as the device looks.
    let wrong = random.chance(WRONG_QUEUES);
    let wrong_one = random.below(3);
    for (which, place) in (0..3).zip(places) {
        let place = if wrong && which == wrong_one {
            memory.wrong_address(random)
        } else {
            place
        };
        access::write(common + QUEUE_RINGS + 8 * which, 8, place);
    }
    let vector = if random.chance(4) {
        random.value()
    } else {
        random.below(4)
    };
    access::write(common + QUEUE_VECTOR, 2, vector);
    let ring = Ring::new(places, size as u16);
    access::write(common + QUEUE_ENABLE, 2, 1);
    (!wrong).then_some(ring)
}

/// Enables MSI-X, mostly, with messages to the processor, or anywhere.
fn enable_vectors(function: &Function, random: &mut Random) {
    if function.msix == 0 || random.chance(3) {
        return;
    }
    config_write(function.device, function.msix, 0x8000_0000);
    for vector in 0..4 {
        let entry = function.bar + function.table + 16 * vector;
        let address = match random.below(64) {
            0 => random.value(),
            1 => LOCAL_APIC | random.below(1 << 20),
            _ => LOCAL_APIC,
        };
        let data = if random.chance(64) {
            random.value()
        } else {
            32 + random.below(200)
        };
        access::write(entry, 8, address);
        access::write(entry + 8, 4, data);
        access::write(entry + 12, 4, random.below(2));
    }
}

/// Offers requests in one queue and notifies it.
pub(super) fn offer(function: &mut Function, random: &mut Random, memory: Playground) {
    let queue = random.below(QUEUES_MAX as u64) as u16;
    let (kind, config) = (function.kind, function.config);
    let Some(ring) = &mut function.rings[usize::from(queue)] else {
        return;
    };
    if random.chance(WRONG_CHAINS) {
        ring.offer_wrong(random, memory);
    } else {
        for _ in 0..=random.below(4) {
            if ring.room() > 0 {
                let mut parts = Parts::default();
                request(&mut parts, (kind, queue, config), random, memory);
                ring.offer(parts.as_slice(), random);
            }
        }
    }
    let address = function.notify_address(queue);
    let width = if random.chance(8) {
        random.pick(&access::WIDTHS)
    } else {
        2
    };
    access::write(address, width, u64::from(queue));
}

/// The parts of one chain.
#[derive(Default)]
pub(super) struct Parts {
    parts: [Part; PARTS_MAX],
    length: usize,
}

impl Parts {
    pub(super) fn push(&mut self, part: Part) {
        if let Some(place) = self.parts.get_mut(self.length) {
            *place = part;
            self.length += 1;
        }
    }

    pub(super) fn as_slice(&self) -> &[Part] {
        &self.parts[..self.length]
    }
}

/// A request that a device must take, or answer with an error.
fn request(
    parts: &mut Parts,
    (kind, queue, config): (u16, u16, u64),
    random: &mut Random,
    memory: Playground,
) {
    let content = Playground::content(random);
    let length = match kind {
        BLOCK => block_header(content, config, random),
        NETWORK => frame(content, config, random),
        CONSOLE => talk::write_message(content, queue, random),
        _ => 16,
    };
    // In one piece, or in two.
    let cut = if random.chance(4) {
        random.below(length + 1)
    } else {
        length
    };
    parts.push((content, cut, false));
    if cut < length {
        parts.push((content + cut, length - cut, false));
    }
    let data = if kind == BLOCK { random.below(4) } else { 0 };
    let writes = random.chance(2);
    if !writes {
        for _ in 0..data {
            let (address, length) = memory.buffer(random, false);
            parts.push((address, length, false));
        }
    }
    if kind == CONSOLE && queue == talk::TO_GUEST {
        parts.push((Playground::inbox(random.below(4)), 512, true));
        return;
    }
    if writes || kind != BLOCK {
        for _ in 0..data.max(1) {
            let (address, length) = memory.buffer(random, true);
            parts.push((address, length, true));
        }
    }
    // A status, or the least that an answer fits into.
    let last = Playground::content(random);
    parts.push((last, if kind == BLOCK { 1 } else { 8 }, true));
}

/// The header of a block request (virtio 1.2, 5.2.6): type, reserved, sector.
fn block_header(content: u64, config: u64, random: &mut Random) -> u64 {
    let kind = match random.below(16) {
        0 => random.value(),
        1 => 4,
        2 => 8,
        3 => random.pick(&[11, 13, 5, 2]),
        4..10 => 0,
        _ => 1,
    };
    let sectors = access::read(config, 8);
    let sector = match random.below(16) {
        0 => random.value(),
        1 => sectors.wrapping_sub(random.below(4)),
        2 => random.below(sectors.max(1)),
        _ => 8 * random.below((sectors / 8).max(1)),
    };
    access::write(content, 8, kind & u64::from(u32::MAX));
    access::write(content + 8, 8, sector);
    16
}

/// A frame behind its virtio-net header (virtio 1.2, 5.1.6). Its source is mostly the interface's own address.
fn frame(content: u64, config: u64, random: &mut Random) -> u64 {
    let length = match random.below(8) {
        0 => random.below(40),
        1 => 1514 + random.below(2000),
        _ => 26 + random.below(200),
    };
    for offset in 0..length.div_ceil(8) {
        access::write(content + 8 * offset, 8, random.next());
    }
    // Flags, segmentation, sizes and offsets are in the first ten bytes.
    if !random.chance(4) {
        access::write(content, 8, 0);
        access::write(content + 8, 4, 0);
    }
    let to = match random.below(4) {
        0 => random.next(),
        1 => 0xffff_ffff_ffff,
        // 52:54:00:77:NN:05, as the tests' guests have.
        _ => 0x0500_7700_5452 | random.below(4) << 32,
    };
    access::write(content + 12, 4, to);
    access::write(content + 16, 2, to >> 32);
    if !random.chance(8) {
        access::copy(content + 18, config, 6);
    }
    let kind = random.pick(&[0x0008, 0x0608, 0xdd86, 0x0081, 0x3580, 0xcc88]);
    access::write(content + 24, 2, kind);
    length
}

/// So many queues for each that ends the machine.
const WRONG_QUEUES: u64 = 4000;
/// So many batches of requests for each that ends the machine.
const WRONG_CHAINS: u64 = 400;
/// Fewer than a chain has room for.
const PARTS_MAX: usize = 12;
const F_VERSION_1: u64 = 1 << 32;
const LOCAL_APIC: u64 = 0xfee0_0000;
/// Registers of the common configuration (virtio 1.2, 4.1.4.3).
const DEVICE_FEATURE: u64 = 0x04;
const DRIVER_FEATURE_SELECT: u64 = 0x08;
const DRIVER_FEATURES: u64 = 0x0c;
const QUEUE_COUNT: u64 = 0x12;
const QUEUE_SELECT: u64 = 0x16;
const QUEUE_SIZE: u64 = 0x18;
const QUEUE_VECTOR: u64 = 0x1a;
const QUEUE_ENABLE: u64 = 0x1c;
const QUEUE_RINGS: u64 = 0x20;
