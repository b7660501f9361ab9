//! `/dev/watchdog` through the watchdog API of the kernel (`Documentation/watchdog/watchdog-api.rst`).
#![expect(unsafe_code, reason = "three ioctls of the kernel's watchdog API")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

use crate::watchdog_device::{KEEPALIVE, Kind, MAGIC_CLOSE, WatchdogDevice};

/// A watchdog device of the kernel. Opening it arms it.
#[derive(Debug)]
pub struct LinuxDevice {
    device: File,
    kind: Kind,
    timeout: Duration,
}

impl LinuxDevice {
    /// Opens and so arms the device at `path`, and sets its timeout to `timeout`, in whole seconds,
    /// unless it has that timeout already. The device may round it: [`WatchdogDevice::timeout`] returns
    /// the actual one. Opening the device and setting its timeout may each count as a keepalive.
    ///
    /// # Errors
    /// Those of the device; [`io::ErrorKind::Unsupported`] for a softdog unless `allow_softdog`
    /// (the softdog is disarmed again).
    pub fn open(path: &Path, timeout: Duration, allow_softdog: bool) -> io::Result<Self> {
        let device = OpenOptions::new().write(true).open(path)?;
        let mut watchdog = Self {
            kind: identify(&device)?,
            timeout: Duration::ZERO,
            device,
        };
        if watchdog.kind == Kind::Soft && !allow_softdog {
            watchdog.disarm()?;
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this is the kernel's softdog, which hangs with its kernel: allow it explicitly, \
                 or run without a watchdog",
            ));
        }
        watchdog.timeout = ensure_timeout(&watchdog.device, timeout)?;
        Ok(watchdog)
    }

    /// The device that a holder kept open, with the timeout that it has. Sends no keepalive.
    ///
    /// # Errors
    /// Those of the device.
    pub fn adopt(descriptor: OwnedFd) -> io::Result<Self> {
        let device = File::from(descriptor);
        Ok(Self {
            kind: identify(&device)?,
            timeout: whole_seconds(timeout_of(&device)?)?,
            device,
        })
    }
}

impl WatchdogDevice for LinuxDevice {
    fn kind(&self) -> Kind {
        self.kind
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn keepalive(&mut self) -> io::Result<()> {
        self.device.write_all(KEEPALIVE)
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.device.write_all(MAGIC_CLOSE)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.device.as_fd())
    }
}

/// `struct watchdog_info` of `linux/watchdog.h`.
#[repr(C)]
struct WatchdogInfo {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
}

fn identify(device: &File) -> io::Result<Kind> {
    // SAFETY: WDIOC_GETSUPPORT fills a `struct watchdog_info`, which `WatchdogInfo` repeats field
    // by field; every bit pattern is a valid value of it.
    let request = unsafe { Getter::<GET_SUPPORT, WatchdogInfo>::new() };
    // SAFETY: the descriptor is open for the call, and the request's pointer is to its own output.
    let info = unsafe { ioctl(device, request) }?;
    Ok(kind_of(&info.identity))
}

/// The kind of a device, by its identity. The softdog has had this name since Linux 2.6.
fn kind_of(identity: &[u8; 32]) -> Kind {
    let name = identity.split(|byte| *byte == 0).next().unwrap_or_default();
    if name == b"Software Watchdog" {
        Kind::Soft
    } else {
        Kind::Hardware
    }
}

/// Gives the device this timeout, and returns the one that it has then. A device with a fixed timeout
/// only reports it.
fn ensure_timeout(device: &File, wanted: Duration) -> io::Result<Duration> {
    let wanted = i32::try_from(wanted.as_secs()).unwrap_or(i32::MAX).max(1);
    let present = timeout_of(device);
    if !must_set(present.as_ref().ok().copied(), wanted) {
        return whole_seconds(wanted);
    }
    match set_timeout(device, wanted) {
        Ok(seconds) => whole_seconds(seconds),
        Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOTTY) => whole_seconds(present?),
        Err(error) => Err(error.into()),
    }
}

/// Whether to set a timeout of `wanted` seconds on a device that reports `present`: setting the one
/// that it has would be a keepalive for nothing.
fn must_set(present: Option<i32>, wanted: i32) -> bool {
    present != Some(wanted)
}

fn timeout_of(device: &File) -> io::Result<i32> {
    // SAFETY: WDIOC_GETTIMEOUT fills one `int`.
    let request = unsafe { Getter::<GET_TIMEOUT, i32>::new() };
    // SAFETY: the descriptor is open for the call, and the output is the request's own.
    Ok(unsafe { ioctl(device, request) }?)
}

/// Returns the timeout that the device chose, in seconds.
fn set_timeout(device: &File, wanted: i32) -> Result<i32, rustix::io::Errno> {
    let mut seconds = wanted;
    // SAFETY: WDIOC_SETTIMEOUT reads and writes one `int`, which `seconds` is.
    let request = unsafe { Updater::<SET_TIMEOUT, i32>::new(&mut seconds) };
    // SAFETY: the descriptor is open for the call, and `seconds` outlives it.
    unsafe { ioctl(device, request) }?;
    Ok(seconds)
}

fn whole_seconds(seconds: i32) -> io::Result<Duration> {
    match u64::try_from(seconds) {
        Ok(seconds @ 1..) => Ok(Duration::from_secs(seconds)),
        _ => Err(io::Error::other(
            "the watchdog device reports a timeout of 0 s",
        )),
    }
}

/// `WDIOC_GETSUPPORT`.
const GET_SUPPORT: Opcode = opcode::read::<WatchdogInfo>(b'W', 0);
/// `WDIOC_SETTIMEOUT`.
const SET_TIMEOUT: Opcode = opcode::read_write::<i32>(b'W', 6);
/// `WDIOC_GETTIMEOUT`.
const GET_TIMEOUT: Opcode = opcode::read::<i32>(b'W', 7);

#[cfg(test)]
mod tests {
    use super::*;

    fn identity(name: &str) -> [u8; 32] {
        let mut identity = [0; 32];
        identity[..name.len()].copy_from_slice(name.as_bytes());
        identity
    }

    #[test]
    fn the_softdog_is_known_by_its_identity() {
        assert_eq!(kind_of(&identity("Software Watchdog")), Kind::Soft);
        assert_eq!(kind_of(&identity("i6300ESB timer")), Kind::Hardware);
        assert_eq!(kind_of(&identity("IPMI")), Kind::Hardware);
    }

    #[test]
    fn the_request_numbers_are_those_of_linux_watchdog_h() {
        assert_eq!(GET_SUPPORT, 0x8028_5700);
        assert_eq!(SET_TIMEOUT, 0xC004_5706);
        assert_eq!(GET_TIMEOUT, 0x8004_5707);
    }

    /// Regression: every start set the timeout again, which pets a device that is armed.
    #[test]
    fn i1_a_timeout_that_the_device_has_already_is_not_set_again() {
        assert!(!must_set(Some(8), 8));
        assert!(must_set(Some(60), 8) && must_set(None, 8));
        assert_eq!(whole_seconds(8).unwrap(), Duration::from_secs(8));
        assert!(whole_seconds(0).is_err() && whole_seconds(-1).is_err());
    }

    #[test]
    fn a_file_that_is_not_a_watchdog_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let refused = LinuxDevice::open(file.path(), Duration::from_secs(10), true);
        assert_eq!(
            refused.unwrap_err().raw_os_error(),
            Some(rustix::io::Errno::NOTTY.raw_os_error())
        );
        assert_eq!(std::fs::read(file.path()).unwrap(), b"", "nothing written");
    }
}
