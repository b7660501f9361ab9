//! One virtqueue of a device (virtio 1.2, 2.7), and chains that are legal but odd, or illegal.

use super::access;
use super::playground::Playground;
use super::random::Random;

/// A queue as this guest has configured it.
#[derive(Debug)]
pub(super) struct Ring {
    /// Descriptors, available ring, used ring, indirect tables.
    places: [u64; 4],
    size: u16,
    /// The next index of the available ring.
    next: u16,
}

/// A buffer of a chain: address, length in bytes, and whether the device may write to it.
pub(super) type Part = (u64, u64, bool);

impl Ring {
    /// An empty queue of `size` descriptors, a power of two up to 256.
    pub(super) fn new(places: [u64; 4], size: u16) -> Self {
        // What an earlier queue has left: flags and index of the available and of the used ring.
        access::write(places[1], 4, 0);
        access::write(places[2], 4, 0);
        Self {
            places,
            size,
            next: 0,
        }
    }

    /// How many more chains may be offered, so that none lies over one that the device has yet to read.
    pub(super) fn room(&self) -> u16 {
        let used = access::read(self.places[2] + 2, 2) as u16;
        let (places, _) = self.chains();
        places.saturating_sub(self.next.wrapping_sub(used))
    }

    /// How many chains have room side by side, and how many descriptors each has in the queue's own table.
    fn chains(&self) -> (u16, u16) {
        if self.size < TABLES * TABLE_LENGTH {
            (self.size.min(TABLES), 1)
        } else {
            (TABLES, TABLE_LENGTH)
        }
    }

    /// Makes a chain of `parts` available, by an indirect table if it is longer than its room, or at will.
    pub(super) fn offer(&mut self, parts: &[Part], random: &mut Random) {
        let (places, room) = self.chains();
        let place = self.next % places;
        let head = place * room;
        if parts.len() > usize::from(room) || random.chance(4) {
            let table = self.places[3] + u64::from(place * TABLE_LENGTH) * DESCRIPTOR_BYTES;
            for (index, part) in (0..).zip(parts) {
                let last = usize::from(index) + 1 == parts.len();
                write_descriptor(table, index, *part, last, index + 1);
            }
            let bytes = parts.len() as u64 * DESCRIPTOR_BYTES;
            write_raw(self.places[0], head, [table, bytes, INDIRECT, 0]);
        } else {
            for (index, part) in (0..).zip(parts) {
                let last = usize::from(index) + 1 == parts.len();
                write_descriptor(self.places[0], head + index, *part, last, head + index + 1);
            }
        }
        // A change of mind while the device looks.
        if random.chance(16) {
            access::write(self.places[1], 2, random.below(2));
        }
        self.push(head);
    }

    /// Makes something available that no driver may.
    pub(super) fn offer_wrong(&mut self, random: &mut Random, memory: Playground) {
        let (table, size) = (self.places[0], u64::from(self.size));
        let head = random.below(size) as u16;
        let (address, length) = memory.buffer(random, true);
        let other = random.below(size);
        let indirect = self.places[3];
        match random.below(12) {
            // Loops.
            0 => write_raw(table, head, [address, length, NEXT, u64::from(head)]),
            1 => {
                write_raw(table, head, [address, 0, NEXT | WRITE, other]);
                write_raw(
                    table,
                    other as u16,
                    [address, 0, NEXT | WRITE, u64::from(head)],
                );
            }
            // Beyond the table, also of an indirect one.
            2 => write_raw(table, head, [address, length, NEXT, size + random.below(9)]),
            3 => {
                write_raw(
                    indirect,
                    0,
                    [address, length, NEXT, 1 + random.below(65535)],
                );
                write_raw(table, head, [indirect, 16, INDIRECT, 0]);
            }
            // Not memory.
            4 => write_raw(table, head, [memory.wrong_address(random), 64, WRITE, 0]),
            5 => write_raw(
                table,
                head,
                [address, u64::from(u32::MAX), random.below(8), 0],
            ),
            6 => write_raw(table, head, [memory.wrong_address(random), 32, INDIRECT, 0]),
            // Indirect in many ways.
            7 => write_raw(table, head, [indirect, random.below(70), INDIRECT, 0]),
            8 => {
                write_raw(indirect, 0, [indirect, 16, INDIRECT, 0]);
                write_raw(
                    table,
                    head,
                    [indirect, 16, INDIRECT | random.below(4), other],
                );
            }
            // Writable before readable.
            9 => {
                write_raw(table, head, [address, 16, WRITE | NEXT, other]);
                write_raw(table, other as u16, [address, 16, 0, 0]);
            }
            // The index leaps.
            10 => self.next = self.next.wrapping_add(random.value() as u16),
            _ => write_raw(
                table,
                head,
                [
                    random.value(),
                    random.value(),
                    random.value(),
                    random.value(),
                ],
            ),
        }
        self.push(if random.chance(8) {
            random.value() as u16
        } else {
            head
        });
    }

    fn push(&mut self, head: u16) {
        let slot = u64::from(self.next % self.size);
        access::write(self.places[1] + 4 + 2 * slot, 2, u64::from(head));
        self.next = self.next.wrapping_add(1);
        access::write(self.places[1] + 2, 2, u64::from(self.next));
    }
}

fn write_descriptor(table: u64, index: u16, part: Part, last: bool, next: u16) {
    let (address, length, writable) = part;
    let flags = if writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
    write_raw(table, index, [address, length, flags, u64::from(next)]);
}

/// Writes a descriptor: address, length, flags and next.
fn write_raw(table: u64, index: u16, [address, length, flags, next]: [u64; 4]) {
    let at = table + u64::from(index) * DESCRIPTOR_BYTES;
    access::write(at, 8, address);
    access::write(at + 8, 4, length);
    access::write(at + 12, 2, flags);
    access::write(at + 14, 2, next);
}

const DESCRIPTOR_BYTES: u64 = 16;
/// Indirect tables in their page, and the descriptors that each has room for.
const TABLES: u16 = 16;
const TABLE_LENGTH: u16 = 16;
const NEXT: u64 = 1;
const WRITE: u64 = 2;
const INDIRECT: u64 = 4;
