//! What the guest says on the console device: control messages, and to whoever asks its agent (virtio 1.2, 5.3;
//! the QEMU guest agent's protocol).

use core::fmt::Write as _;

use super::access;
use super::playground::Playground;
use super::random::Random;
use crate::serial::Text;

/// Writes a message for `queue` to `content` and returns its length in bytes.
pub(super) fn write_message(content: u64, queue: u16, random: &mut Random) -> u64 {
    if queue != CONTROL_FROM_GUEST {
        return write_words(content, random);
    }
    let port = if random.chance(8) { random.value() } else { 1 };
    let event = match random.below(8) {
        0 => random.value(),
        1 => 0,
        2 => 3,
        _ => 6,
    };
    let value = if random.chance(8) {
        random.value()
    } else {
        random.below(4).min(1)
    };
    access::write(content, 4, port);
    access::write(content + 4, 2, event);
    access::write(content + 6, 2, value);
    if random.chance(16) {
        random.below(16)
    } else {
        8
    }
}

/// Pieces of answers in any order, or an answer to the last request that the guest got.
fn write_words(content: u64, random: &mut Random) -> u64 {
    let mut length = 0;
    let mut say = |bytes: &[u8]| {
        if length + bytes.len() as u64 <= WORDS_BYTES_MAX {
            access::write_bytes(content + length, bytes);
            length += bytes.len() as u64;
        }
    };
    if random.chance(3)
        && let Some(number) = last_number()
    {
        let mut answer = Text::<64>::new();
        if writeln!(answer, "{{\"return\": {number}}}").is_ok() {
            say(b"\xff");
            say(answer.as_bytes());
        }
    }
    for _ in 0..1 + random.below(24) {
        match random.below(8) {
            0 => say(&random.next().to_le_bytes()),
            _ => say(random.pick(&WORDS).as_bytes()),
        }
    }
    if random.chance(2) {
        say(b"\n");
    }
    length.max(1)
}

/// The number of the last synchronization in the input buffers.
fn last_number() -> Option<u64> {
    (0..4).find_map(|index| {
        let inbox = Playground::inbox(index);
        let mut bytes = [0; 160];
        access::copy(bytes.as_mut_ptr() as u64, inbox, bytes.len() as u64);
        let at = bytes.windows(KEY.len()).rposition(|part| part == KEY)?;
        let digits = bytes[at + KEY.len()..]
            .iter()
            .take_while(|byte| byte.is_ascii_digit());
        digits.clone().next()?;
        Some(
            digits
                .take(10)
                .fold(0, |sum, digit| sum * 10 + u64::from(digit - b'0')),
        )
    })
}

const KEY: &[u8] = b"\"id\":";
const CONTROL_FROM_GUEST: u16 = 3;
/// The queue of the agent's input.
pub(super) const TO_GUEST: u16 = 4;
const WORDS_BYTES_MAX: u64 = 2048;
const WORDS: [&str; 24] = [
    "{\"return\": ",
    "{\"error\": ",
    "{}",
    "[",
    "]",
    "{",
    "}",
    "\"",
    "\\",
    "\\u0000",
    "\\ud800",
    ":",
    ",",
    "null",
    "-1e999",
    "18446744073709551616",
    "\"version\": \"",
    "\"host-name\": \"",
    "\"id\": \"",
    "\"ip-addresses\": [",
    "\"hardware-address\": \"52:54:00:77:00:05\"",
    "\u{1b}[2J",
    "[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[",
    "\n",
];
