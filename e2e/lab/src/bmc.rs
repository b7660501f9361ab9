//! A minimal baseboard management controller (IPMI): the watchdog outside the machine.
//!
//! The watchdogs that QEMU emulates count inside the QEMU process and so cannot fire while that is stopped. This one
//! is a process of its own. QEMU's `ipmi-bmc-extern` device connects to it; the node's `ipmi_watchdog` driver arms it
//! and pets it with IPMI messages; when the pets stop, it resets the machine: kills QEMU and starts it again.
//!
//! # States
//! ```text
//!   Stopped ──Set──► Armed ──Reset──► Running(deadline) ──pets stop──► machine reset ──► Stopped
//!      ▲               │                   │  ▲│
//!      └── Set(none) ──┴───────────────────┘  └┘ Reset
//! ```
//!
//! Sources: IPMI 2.0 §5.2 (codes), §20.1, §22.1-§22.5, §27.5-§27.7 (watchdog timer); QEMU `hw/ipmi/ipmi_bmc_extern.c`
//! for the framing.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::emulated::bmc_log;
use crate::lab::Lab;
use crate::names::LabName;
use crate::node::Node;

/// What `lab bmc` does; it returns only with an error.
pub fn serve(name: &LabName, node: &str, socket: &Path) -> Result<()> {
    // A stale socket of an earlier process.
    drop(std::fs::remove_file(socket));
    let listener = UnixListener::bind(socket).context("listen for the machine")?;
    for stream in listener.incoming() {
        let stream = stream.context("accept the machine")?;
        if watch(stream)? == End::Expired {
            let lab = Lab::open_incomplete(name)?;
            let node = lab.node(node)?;
            node.cut().context("reset the machine")?;
            // QEMU is dead: no write of this machine can be submitted any more.
            println!("{EXPIRED}{}", unix_millis(SystemTime::now()));
            node.boot().context("reset the machine")?;
        }
    }
    Ok(())
}

impl Node<'_> {
    /// Times at which the management controller has reset the node because its watchdog expired, oldest first.
    pub fn watchdog_resets(&self) -> Result<Vec<SystemTime>> {
        let log = bmc_log(self.lab.logs(), self.index());
        let text =
            std::fs::read_to_string(&log).with_context(|| format!("read {}", log.display()))?;
        Ok(resets(&text))
    }
}

/// Log line of a watchdog reset, followed by the Unix time in milliseconds.
const EXPIRED: &str = "watchdog expired: machine reset at ";

/// Times of the watchdog resets in a log, oldest first.
pub(crate) fn resets(log: &str) -> Vec<SystemTime> {
    let times = log.lines().filter_map(|line| line.strip_prefix(EXPIRED));
    times
        .filter_map(|time| Some(UNIX_EPOCH + Duration::from_millis(time.parse().ok()?)))
        .collect()
}

fn unix_millis(time: SystemTime) -> u128 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or_default()
        .as_millis()
}

/// How a connection to a machine ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    /// The machine was turned off.
    HungUp,
    /// Its watchdog expired.
    Expired,
}

/// Serves one machine until it is powered off or its watchdog expires.
fn watch(mut stream: UnixStream) -> Result<End> {
    let mut frames = Framer::default();
    let mut watchdog = Watchdog::default();
    stream.write_all(&HELLO).context("greet the machine")?;
    loop {
        let now = Instant::now();
        if watchdog.expired(now) {
            return Ok(End::Expired);
        }
        let wait = watchdog
            .deadline
            .map(|deadline| deadline.saturating_duration_since(now));
        // A zero timeout is not allowed by `set_read_timeout`.
        let wait = wait.map(|wait| wait.max(Duration::from_millis(1)));
        stream.set_read_timeout(wait).context("set a deadline")?;
        let mut byte = [0];
        match stream.read(&mut byte) {
            Ok(0) => return Ok(End::HungUp),
            Ok(_) => {}
            Err(error) if is_timeout(&error) => continue,
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                return Ok(End::HungUp);
            }
            Err(error) => return Err(error).context("read from the machine"),
        }
        if let Some(message) = frames.push(byte[0]) {
            let answer = respond(&message, &mut watchdog, Instant::now());
            if stream.write_all(&encode(&answer)).is_err() {
                return Ok(End::HungUp);
            }
        }
    }
}

fn is_timeout(error: &std::io::Error) -> bool {
    use std::io::ErrorKind::{Interrupted, TimedOut, WouldBlock};
    matches!(error.kind(), Interrupted | TimedOut | WouldBlock)
}

/// The watchdog timer (IPMI 2.0 §27).
#[derive(Debug, Default)]
struct Watchdog {
    /// As last set: use, actions, pre-timeout, flags, countdown in units of 100 ms.
    settings: Option<[u8; 6]>,
    /// When it fires, while it runs.
    deadline: Option<Instant>,
}

impl Watchdog {
    fn set(&mut self, settings: [u8; 6]) {
        self.settings = Some(settings);
        // Bit 6 of the use: do not stop a running timer.
        if settings[0] & 0x40 == 0 {
            self.deadline = None;
        }
    }

    /// Starts or restarts the countdown; false if the watchdog was never set.
    fn reset(&mut self, now: Instant) -> bool {
        let Some(settings) = self.settings else {
            return false;
        };
        self.deadline = Some(now + countdown(&settings));
        true
    }

    fn expired(&mut self, now: Instant) -> bool {
        let due = self.deadline.is_some_and(|deadline| deadline <= now);
        if due {
            self.deadline = None;
        }
        // Actions: 0 none, 1 reset, 2 power down, 3 power cycle.
        due && self.settings.is_some_and(|settings| settings[1] & 7 != 0)
    }

    fn state(&self, now: Instant) -> [u8; 8] {
        let settings = self.settings.unwrap_or_default();
        let left = self
            .deadline
            .map_or(Duration::ZERO, |d| d.saturating_duration_since(now));
        let [low, high] = u16::try_from(left.as_millis() / 100)
            .unwrap_or(u16::MAX)
            .to_le_bytes();
        let running = if self.deadline.is_some() { 0x40 } else { 0 };
        let [usage, actions, pre, flags, low_set, high_set] = settings;
        [
            usage & 0x87 | running,
            actions,
            pre,
            flags,
            low_set,
            high_set,
            low,
            high,
        ]
    }
}

fn countdown(settings: &[u8; 6]) -> Duration {
    Duration::from_millis(100) * u32::from(u16::from_le_bytes([settings[4], settings[5]]))
}

/// Answers a request: message id, network function and LUN, command, data.
fn respond(message: &[u8], watchdog: &mut Watchdog, now: Instant) -> Vec<u8> {
    let [id, function, command, data @ ..] = message else {
        return Vec::new();
    };
    let mut answer = vec![*id, function | 0x04, *command];
    match (function >> 2, *command, data) {
        // Get Device ID: revision 1, IPMI 2.0, no sensors, no vendor.
        (APP, 0x01, _) => {
            answer.extend([OK, 0x20, 0x01, 0x01, 0x00, 0x02, 0x00, 0, 0, 0, 0, 0]);
        }
        (APP, 0x22, _) => answer.push(if watchdog.reset(now) {
            OK
        } else {
            NOT_INITIALIZED
        }),
        (APP, 0x24, &[usage, actions, pre, flags, low, high, ..]) => {
            watchdog.set([usage, actions, pre, flags, low, high]);
            answer.push(OK);
        }
        (APP, 0x25, _) => {
            answer.push(OK);
            answer.extend(watchdog.state(now));
        }
        // Set BMC Global Enables and Clear Message Flags have nothing to remember.
        (APP, 0x2e | 0x30, _) => answer.push(OK),
        // Get BMC Global Enables, Get Message Flags: nothing enabled, nothing waiting.
        (APP, 0x2f | 0x31, _) => answer.extend([OK, 0]),
        _ => answer.push(INVALID_COMMAND),
    }
    answer
}

/// Collects bytes into messages; what is a command to the BMC, or damaged, is skipped.
#[derive(Debug, Default)]
struct Framer {
    bytes: Vec<u8>,
    escaped: bool,
}

impl Framer {
    fn push(&mut self, byte: u8) -> Option<Vec<u8>> {
        match byte {
            END_OF_MESSAGE => {
                let mut message = std::mem::take(&mut self.bytes);
                let sum = message
                    .iter()
                    .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
                message.pop()?;
                (sum == 0).then_some(message)
            }
            END_OF_COMMAND => {
                self.bytes.clear();
                None
            }
            ESCAPE => {
                self.escaped = true;
                None
            }
            byte => {
                let byte = if std::mem::take(&mut self.escaped) {
                    byte & !0x10
                } else {
                    byte
                };
                if self.bytes.len() < MESSAGE_BYTES_MAX {
                    self.bytes.push(byte);
                }
                None
            }
        }
    }
}

fn encode(message: &[u8]) -> Vec<u8> {
    let sum = message
        .iter()
        .fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    let mut out = Vec::new();
    for &byte in message.iter().chain(&[0_u8.wrapping_sub(sum)]) {
        if matches!(byte, END_OF_MESSAGE | END_OF_COMMAND | ESCAPE) {
            out.extend([ESCAPE, byte | 0x10]);
        } else {
            out.push(byte);
        }
    }
    out.push(END_OF_MESSAGE);
    out
}

const END_OF_MESSAGE: u8 = 0xa0;
const END_OF_COMMAND: u8 = 0xa1;
const ESCAPE: u8 = 0xaa;
/// Protocol version 1.
const HELLO: [u8; 3] = [0xff, 1, END_OF_COMMAND];
/// Network function of all commands that are answered.
const APP: u8 = 0x06;
const OK: u8 = 0x00;
/// §27.5: attempt to start an uninitialized watchdog.
const NOT_INITIALIZED: u8 = 0x80;
const INVALID_COMMAND: u8 = 0xc1;
/// No message of IPMI's system interface is longer (§9.2).
const MESSAGE_BYTES_MAX: usize = 260;

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(watchdog: &mut Watchdog, now: Instant, command: u8, data: &[u8]) -> Vec<u8> {
        let request = [&[7, APP << 2, command], data].concat();
        let answer = respond(&request, watchdog, now);
        assert_eq!(answer[..3], [7, (APP << 2) | 4, command]);
        answer[3..].to_vec()
    }

    /// Three seconds, reset.
    const SETTINGS: [u8; 6] = [4, 1, 0, 0, 30, 0];

    #[test]
    fn it_fires_when_pets_stop_and_not_before() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        assert_eq!(ask(&mut watchdog, start, 0x24, &SETTINGS), [OK]);
        assert!(!watchdog.expired(at(100)), "armed is not running");
        assert_eq!(ask(&mut watchdog, start, 0x22, &[]), [OK]);
        assert!(!watchdog.expired(at(2)));
        assert_eq!(ask(&mut watchdog, at(2), 0x22, &[]), [OK]);
        assert!(!watchdog.expired(at(4)));
        assert!(watchdog.expired(at(5)));
        assert!(!watchdog.expired(at(6)), "once");
    }

    #[test]
    fn an_orderly_close_disarms_it() {
        let (mut watchdog, start) = (Watchdog::default(), Instant::now());
        ask(&mut watchdog, start, 0x24, &SETTINGS);
        ask(&mut watchdog, start, 0x22, &[]);
        ask(&mut watchdog, start, 0x24, &[4, 0, 0, 0, 30, 0]);
        assert!(!watchdog.expired(start + Duration::from_secs(100)));
    }

    #[test]
    fn one_that_was_never_set_cannot_be_started() {
        let mut watchdog = Watchdog::default();
        assert_eq!(
            ask(&mut watchdog, Instant::now(), 0x22, &[]),
            [NOT_INITIALIZED]
        );
    }

    #[test]
    fn unknown_commands_are_refused() {
        let mut watchdog = Watchdog::default();
        assert_eq!(
            ask(&mut watchdog, Instant::now(), 0x42, &[0]),
            [INVALID_COMMAND]
        );
        assert_eq!(
            ask(&mut watchdog, Instant::now(), 0x24, &[1, 2]),
            [INVALID_COMMAND]
        );
    }

    #[test]
    fn resets_are_read_back_with_their_times() {
        let at = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let log = format!("started\n{EXPIRED}{}\nother\n", unix_millis(at));
        assert_eq!(resets(&log), [at]);
    }

    #[test]
    fn frames_survive_escaping_and_damage() {
        let message = [1, 0x18, END_OF_MESSAGE, ESCAPE, END_OF_COMMAND];
        let mut framer = Framer::default();
        let mut got = Vec::new();
        let mut damaged = encode(&message);
        damaged[0] ^= 1;
        for byte in [&HELLO[..], &damaged, &encode(&message)].concat() {
            got.extend(framer.push(byte));
        }
        assert_eq!(got, [message.to_vec()]);
    }
}
