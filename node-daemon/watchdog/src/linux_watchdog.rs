//! `/dev/watchdog` through the watchdog API of the kernel (`Documentation/watchdog/watchdog-api.rst`).
#![expect(unsafe_code, reason = "three ioctls of the kernel's watchdog API")]

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use bascule_volume_protocol::{Rules, broken};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Updater, ioctl, opcode};

use crate::watchdog_device::{KEEPALIVE, Kind, MAGIC_CLOSE, WatchdogDevice};

/// The kernel's watchdog API on an open device.
pub trait Driver: Send {
    /// The name of the device, NUL-terminated.
    ///
    /// # Errors
    /// Those of the device.
    fn identity(&self) -> io::Result<[u8; 32]>;

    /// The device's timeout in seconds.
    ///
    /// # Errors
    /// Those of the device.
    fn timeout(&self) -> Result<i32, Errno>;

    /// Sets the timeout in seconds, which is a keepalive too. Returns the one that the device chose.
    ///
    /// # Errors
    /// Those of the device; `OPNOTSUPP` or `NOTTY` where the timeout is fixed.
    fn set_timeout(&mut self, wanted: i32) -> Result<i32, Errno>;

    /// Writes to the device.
    ///
    /// # Errors
    /// Those of the device.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// The device.
    fn descriptor(&self) -> BorrowedFd<'_>;
}

/// A watchdog device of the kernel. It is armed.
#[derive(Debug)]
pub struct LinuxDevice<D = LinuxDriver> {
    driver: D,
    kind: Kind,
    timeout: Duration,
    /// The timeout that it does not have yet, in seconds.
    unset: Option<i32>,
}

impl<D: Driver> LinuxDevice<D> {
    /// A device that was just opened, which armed it and may have counted as a keepalive. `timeout`, in
    /// whole seconds, is set with the first keepalive, unless the device has that timeout already: it is
    /// another keepalive. The device may round it: [`WatchdogDevice::timeout`] returns the actual one.
    ///
    /// # Errors
    /// Those of the device; [`io::ErrorKind::Unsupported`] for a softdog unless `allow_softdog`
    /// (the softdog is disarmed again).
    pub fn open(driver: D, timeout: Duration, allow_softdog: bool) -> io::Result<Self> {
        let wanted = i32::try_from(timeout.as_secs()).unwrap_or(i32::MAX).max(1);
        let present = driver.timeout();
        let mut watchdog = Self {
            kind: kind_of(&driver.identity()?),
            timeout: whole_seconds(wanted)?,
            unset: must_set(present.ok(), wanted).then_some(wanted),
            driver,
        };
        if watchdog.kind == Kind::Soft && !allow_softdog {
            watchdog.disarm()?;
            return Err(io::Error::new(
                io::ErrorKind::Unsupported,
                "this is the kernel's softdog, which hangs with its kernel: allow it explicitly, \
                 or run without a watchdog",
            ));
        }
        Ok(watchdog)
    }

    /// The device that a holder kept open, with the timeout that it has. Sends no keepalive.
    ///
    /// # Errors
    /// Those of the device.
    pub fn adopt(mut driver: D, rules: Rules) -> io::Result<Self> {
        let present = driver.timeout()?;
        if broken!(rules, TimeoutSetAgain) {
            driver.set_timeout(present)?;
        }
        Ok(Self {
            kind: kind_of(&driver.identity()?),
            timeout: whole_seconds(present)?,
            unset: None,
            driver,
        })
    }

    /// A device with a fixed timeout only reports it.
    fn set_timeout(&mut self, wanted: i32) -> io::Result<()> {
        let (seconds, is_sent) = match self.driver.set_timeout(wanted) {
            Ok(seconds) => (seconds, true),
            Err(Errno::OPNOTSUPP | Errno::NOTTY) => (self.driver.timeout()?, false),
            Err(error) => return Err(error.into()),
        };
        self.timeout = whole_seconds(seconds)?;
        self.unset = None;
        if is_sent {
            return Ok(());
        }
        self.driver.write(KEEPALIVE)
    }
}

impl<D: Driver> WatchdogDevice for LinuxDevice<D> {
    fn kind(&self) -> Kind {
        match self.unset {
            None => self.kind,
            Some(_) => Kind::None,
        }
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn keepalive(&mut self) -> io::Result<()> {
        match self.unset {
            None => self.driver.write(KEEPALIVE),
            Some(wanted) => self.set_timeout(wanted),
        }
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.driver.write(MAGIC_CLOSE)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.driver.descriptor())
    }
}

/// An open device file.
#[derive(Debug)]
pub struct LinuxDriver(File);

impl LinuxDriver {
    /// Opens and so arms the device at `path`.
    ///
    /// # Errors
    /// Those of the device.
    pub fn open(path: &Path) -> io::Result<Self> {
        Ok(Self(OpenOptions::new().write(true).open(path)?))
    }
}

impl From<File> for LinuxDriver {
    fn from(device: File) -> Self {
        Self(device)
    }
}

impl Driver for LinuxDriver {
    fn identity(&self) -> io::Result<[u8; 32]> {
        // SAFETY: WDIOC_GETSUPPORT fills a `struct watchdog_info`, which `WatchdogInfo` repeats field
        // by field; every bit pattern is a valid value of it.
        let request = unsafe { Getter::<GET_SUPPORT, WatchdogInfo>::new() };
        // SAFETY: the descriptor is open for the call, and the request's pointer is to its own output.
        let info = unsafe { ioctl(&self.0, request) }?;
        Ok(info.identity)
    }

    fn timeout(&self) -> Result<i32, Errno> {
        // SAFETY: WDIOC_GETTIMEOUT fills one `int`.
        let request = unsafe { Getter::<GET_TIMEOUT, i32>::new() };
        // SAFETY: the descriptor is open for the call, and the output is the request's own.
        unsafe { ioctl(&self.0, request) }
    }

    fn set_timeout(&mut self, wanted: i32) -> Result<i32, Errno> {
        let mut seconds = wanted;
        // SAFETY: WDIOC_SETTIMEOUT reads and writes one `int`, which `seconds` is.
        let request = unsafe { Updater::<SET_TIMEOUT, i32>::new(&mut seconds) };
        // SAFETY: the descriptor is open for the call, and `seconds` outlives it.
        unsafe { ioctl(&self.0, request) }?;
        Ok(seconds)
    }

    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all(bytes)
    }

    fn descriptor(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// `struct watchdog_info` of `linux/watchdog.h`.
#[repr(C)]
struct WatchdogInfo {
    options: u32,
    firmware_version: u32,
    identity: [u8; 32],
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

/// Whether to set a timeout of `wanted` seconds on a device that reports `present`: setting the one
/// that it has would be a keepalive for nothing.
fn must_set(present: Option<i32>, wanted: i32) -> bool {
    present != Some(wanted)
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

    /// A device that counts its keepalives.
    struct Counted {
        seconds: i32,
        keepalives: u32,
        null: File,
    }

    impl Driver for Counted {
        fn identity(&self) -> io::Result<[u8; 32]> {
            Ok(identity("i6300ESB timer"))
        }

        fn timeout(&self) -> Result<i32, Errno> {
            Ok(self.seconds)
        }

        fn set_timeout(&mut self, wanted: i32) -> Result<i32, Errno> {
            self.keepalives += 1;
            self.seconds = wanted;
            Ok(wanted)
        }

        fn write(&mut self, _: &[u8]) -> io::Result<()> {
            self.keepalives += 1;
            Ok(())
        }

        fn descriptor(&self) -> BorrowedFd<'_> {
            self.null.as_fd()
        }
    }

    fn counted(seconds: i32) -> Counted {
        Counted {
            seconds,
            keepalives: 0,
            null: File::open("/dev/null").unwrap(),
        }
    }

    /// Regression: opening a device and setting its timeout are two keepalives, and a process that froze
    /// in between sent both from one decision.
    #[test]
    fn i1_a_device_that_was_opened_gets_its_timeout_with_the_next_keepalive() {
        let eight = Duration::from_secs(8);
        let mut device = LinuxDevice::open(counted(60), eight, false).unwrap();
        assert_eq!(device.driver.keepalives, 0);
        assert_eq!(device.kind(), Kind::None, "it may reset after 60 s");
        device.keepalive().unwrap();
        assert_eq!((device.driver.keepalives, device.driver.seconds), (1, 8));
        assert_eq!((device.kind(), device.timeout()), (Kind::Hardware, eight));
        device.keepalive().unwrap();
        assert_eq!(device.driver.keepalives, 2);

        let adopted = LinuxDevice::adopt(counted(60), Rules::ENFORCED).unwrap();
        assert_eq!(adopted.driver.keepalives, 0);
        assert_eq!(adopted.timeout(), Duration::from_secs(60));
    }

    #[test]
    fn a_file_that_is_not_a_watchdog_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let driver = LinuxDriver::open(file.path()).unwrap();
        let refused = LinuxDevice::open(driver, Duration::from_secs(10), true);
        assert_eq!(
            refused.unwrap_err().raw_os_error(),
            Some(Errno::NOTTY.raw_os_error())
        );
        assert_eq!(std::fs::read(file.path()).unwrap(), b"", "nothing written");
    }
}
