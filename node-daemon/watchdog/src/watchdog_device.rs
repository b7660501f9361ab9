//! The watchdog device behind a trait, so that tests can use one of their own.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;

/// What resets the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A device that keeps counting when the kernel hangs.
    Hardware,
    /// The softdog of the kernel, which hangs with its kernel.
    Soft,
    /// The node has no watchdog.
    None,
}

/// A watchdog device. It is armed from the moment when it is opened.
pub trait WatchdogDevice: Send {
    /// Published in the heartbeats of this node. [`Kind::None`] as long as the device does not have the timeout
    /// that it is to have.
    fn kind(&self) -> Kind;

    /// How long after the last keepalive the device resets the node.
    fn timeout(&self) -> Duration;

    /// Restarts the timeout ("ping" or "pet" in other implementations). Once per call: whoever decided it
    /// decides again before the next one.
    ///
    /// # Errors
    /// Those of the device.
    fn keepalive(&mut self) -> io::Result<()>;

    /// Stops the timeout. Only while no writer is open on any volume.
    ///
    /// # Errors
    /// Those of the device, which then stays armed.
    fn disarm(&mut self) -> io::Result<()>;

    /// Makes sure that a second process has the device open, where that can be. Sends no keepalive.
    fn keep_held(&mut self) {}

    /// The open device, for a second process to hold; none where there is nothing to hold.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

impl WatchdogDevice for Box<dyn WatchdogDevice> {
    fn kind(&self) -> Kind {
        self.as_ref().kind()
    }

    fn timeout(&self) -> Duration {
        self.as_ref().timeout()
    }

    fn keepalive(&mut self) -> io::Result<()> {
        self.as_mut().keepalive()
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.as_mut().disarm()
    }

    fn keep_held(&mut self) {
        self.as_mut().keep_held();
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.as_ref().descriptor()
    }
}

/// The device of a node that has no watchdog.
#[derive(Clone, Copy, Debug)]
pub struct NoDevice;

impl WatchdogDevice for NoDevice {
    fn kind(&self) -> Kind {
        Kind::None
    }

    fn timeout(&self) -> Duration {
        Duration::ZERO
    }

    fn keepalive(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn disarm(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A watchdog outside of this machine; each byte written to a named pipe is a keepalive. The reader
/// of the pipe resets the machine when no byte arrives for the timeout. Like `/dev/watchdog`, it
/// takes `V` as "disarm".
#[derive(Debug)]
pub struct PipeDevice {
    pipe: File,
    timeout: Duration,
}

impl PipeDevice {
    /// Opens the pipe at `path`, which a reader must have open already.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when `path` is not a named pipe; those of opening it.
    pub fn open(path: &Path, timeout: Duration) -> io::Result<Self> {
        if !std::fs::metadata(path)?.file_type().is_fifo() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a named pipe",
            ));
        }
        // Non-blocking: a reader that does not read must not block the keepalive loop.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let mut options = OpenOptions::new();
        let pipe = options.write(true).custom_flags(flags).open(path)?;
        let mut device = Self { pipe, timeout };
        device.keepalive()?;
        Ok(device)
    }

    /// The pipe that a holder kept open. Sends no keepalive.
    #[must_use]
    pub fn adopt(descriptor: OwnedFd, timeout: Duration) -> Self {
        let pipe = File::from(descriptor);
        Self { pipe, timeout }
    }
}

impl WatchdogDevice for PipeDevice {
    fn kind(&self) -> Kind {
        Kind::Hardware
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn keepalive(&mut self) -> io::Result<()> {
        self.pipe.write_all(KEEPALIVE)
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.pipe.write_all(MAGIC_CLOSE)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.pipe.as_fd())
    }
}

/// Any byte but [`MAGIC_CLOSE`].
pub(crate) const KEEPALIVE: &[u8] = b".";
/// Linux `Documentation/watchdog/watchdog-api.rst`: "magic close".
pub(crate) const MAGIC_CLOSE: &[u8] = b"V";
