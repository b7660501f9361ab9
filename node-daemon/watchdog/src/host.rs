//! What `bascule-watchdog` needs of its machine, as a trait: Linux in production, a simulated machine with
//! its own clock, scheduler, devices and processes in tests. Clock and waiting are
//! [`bascule_volume_gate::Clock`], the saved list is [`crate::EnlistmentStore`].

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Duration;

use bascule_types::BootTime;
use bascule_volume_gate::{Changes, Clock, LinuxClock};
use bascule_volume_protocol::Rules;
use rustix::fs::{FileType, fstat};

use crate::holder::{Holder, HolderError, HolderProcess};
use crate::linux_watchdog::{LinuxDevice, LinuxDriver};
use crate::watchdog_device::{NoDevice, PipeDevice, WatchdogDevice};

/// A device of whatever kind.
pub type BoxedDevice = Box<dyn WatchdogDevice>;

/// A holder, and the device that it has open.
pub type FoundHolder = (BoxedDevice, Box<dyn Holder>);

/// The machine that the process runs on.
pub trait Host: Clock {
    /// Opens the watchdog device, which arms it and may count as a keepalive.
    ///
    /// # Errors
    /// Those of the device.
    fn open_device(&self) -> io::Result<BoxedDevice>;

    /// The holder that an earlier process started, and the device that it has open; none if there is no
    /// such process. Sends no keepalive.
    ///
    /// # Errors
    /// [`HolderError`]: a holder runs, or may run, and cannot be used.
    fn find_holder(&self) -> Result<Option<FoundHolder>, HolderError>;

    /// Starts a process that holds `device` open too.
    ///
    /// # Errors
    /// [`HolderError`].
    fn start_holder(&self, device: BorrowedFd<'_>) -> Result<Box<dyn Holder>, HolderError>;
}

/// The Linux host of this process.
#[derive(Debug)]
pub struct LinuxHost {
    /// The directory of the holder's socket.
    pub run_dir: PathBuf,
    /// What to open.
    pub watchdog: Watchdog,
}

/// The watchdog of this host, as the command line names it.
#[derive(Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Watchdog {
    /// There is none.
    None,
    /// A device of the kernel.
    Device {
        path: PathBuf,
        /// The one to set.
        timeout: Duration,
        allow_softdog: bool,
    },
    /// A named pipe to a watchdog outside of this machine.
    Pipe {
        path: PathBuf,
        /// The one that the reader of the pipe has.
        timeout: Duration,
    },
}

impl LinuxHost {
    /// The open device whose descriptor came from a holder. It is served whatever the command line says: it
    /// is armed.
    fn adopt(&self, descriptor: OwnedFd) -> io::Result<BoxedDevice> {
        let mode = fstat(&descriptor)?.st_mode;
        if FileType::from_raw_mode(mode) != FileType::Fifo {
            let driver = LinuxDriver::from(fs::File::from(descriptor));
            return Ok(Box::new(LinuxDevice::adopt(driver, Rules::ENFORCED)?));
        }
        match &self.watchdog {
            Watchdog::Pipe { timeout, .. } => Ok(Box::new(PipeDevice::adopt(descriptor, *timeout))),
            Watchdog::None | Watchdog::Device { .. } => Err(io::Error::other(
                "a named pipe is held as the watchdog device: start with --pipe-timeout-ms",
            )),
        }
    }
}

impl Clock for LinuxHost {
    fn now(&self) -> BootTime {
        LinuxClock.now()
    }

    fn wait_for_change(&self, changes: &Changes, seen: u64, timeout: Duration) {
        LinuxClock.wait_for_change(changes, seen, timeout);
    }

    fn wake(&self, changes: &Changes) {
        LinuxClock.wake(changes);
    }
}

impl Host for LinuxHost {
    fn open_device(&self) -> io::Result<BoxedDevice> {
        match &self.watchdog {
            Watchdog::None => Ok(Box::new(NoDevice)),
            Watchdog::Device {
                path,
                timeout,
                allow_softdog,
            } => {
                let driver = LinuxDriver::open(path)?;
                Ok(Box::new(LinuxDevice::open(
                    driver,
                    *timeout,
                    *allow_softdog,
                )?))
            }
            Watchdog::Pipe { path, timeout } => Ok(Box::new(PipeDevice::open(path, *timeout)?)),
        }
    }

    fn find_holder(&self) -> Result<Option<FoundHolder>, HolderError> {
        let Some((holder, descriptor)) = HolderProcess::find(&self.run_dir)? else {
            return Ok(None);
        };
        let device = self.adopt(descriptor).map_err(HolderError::Adopt)?;
        Ok(Some((device, Box::new(holder))))
    }

    fn start_holder(&self, device: BorrowedFd<'_>) -> Result<Box<dyn Holder>, HolderError> {
        Ok(Box::new(HolderProcess::start(&self.run_dir, device)?))
    }
}
