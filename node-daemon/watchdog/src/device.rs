//! The seam to the device.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use rustix::fs::OFlags;

/// What resets the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Something that counts on when the kernel does not.
    Hardware,
    /// The kernel's softdog.
    Soft,
    /// Nothing.
    None,
}

/// A watchdog that is armed from the moment when it was opened.
pub trait WatchdogDevice: Send {
    /// What it is.
    fn kind(&self) -> Kind;

    /// After how long without a pet it resets the node.
    fn timeout(&self) -> Duration;

    /// Start the timeout anew.
    ///
    /// # Errors
    /// The device's.
    fn pet(&mut self) -> io::Result<()>;

    /// Stop counting. Only while no writer is open on any volume.
    ///
    /// # Errors
    /// The device's. It then counts on.
    fn disarm(&mut self) -> io::Result<()>;
}

/// A node without a watchdog, on record.
#[derive(Clone, Copy, Debug)]
pub struct NoDevice;

impl WatchdogDevice for NoDevice {
    fn kind(&self) -> Kind {
        Kind::None
    }

    fn timeout(&self) -> Duration {
        Duration::ZERO
    }

    fn pet(&mut self) -> io::Result<()> {
        Ok(())
    }

    fn disarm(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A watchdog outside of this machine, petted by a byte through a named pipe. Whoever reads the
/// pipe resets the machine when nothing came for the timeout; like /dev/watchdog it takes `V` as
/// "disarm".
#[derive(Debug)]
pub struct PipeDevice {
    pipe: File,
    timeout: Duration,
}

impl PipeDevice {
    /// The pipe at `path`, whose reader must be there already.
    ///
    /// # Errors
    /// [`io::ErrorKind::InvalidInput`] when it is no named pipe; those of opening it.
    pub fn open(path: &Path, timeout: Duration) -> io::Result<Self> {
        if !std::fs::metadata(path)?.file_type().is_fifo() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a named pipe",
            ));
        }
        // Non-blocking: a reader that does not read must not hang the petting loop.
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or(0);
        let mut options = OpenOptions::new();
        let pipe = options.write(true).custom_flags(flags).open(path)?;
        let mut device = Self { pipe, timeout };
        device.pet()?;
        Ok(device)
    }
}

impl WatchdogDevice for PipeDevice {
    fn kind(&self) -> Kind {
        Kind::Hardware
    }

    fn timeout(&self) -> Duration {
        self.timeout
    }

    fn pet(&mut self) -> io::Result<()> {
        self.pipe.write_all(PET)
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.pipe.write_all(MAGIC_CLOSE)
    }
}

/// Any byte but [`MAGIC_CLOSE`].
pub(crate) const PET: &[u8] = b".";
/// Linux `Documentation/watchdog/watchdog-api.rst`: "magic close".
pub(crate) const MAGIC_CLOSE: &[u8] = b"V";
