//! A watchdog device that a second process holds open too.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_types::BootTime;
use bascule_volume_gate::boot_time_now;

use crate::holder::Holder;
use crate::watchdog_device::{Kind, WatchdogDevice};

/// A device with its holder. It counts as a watchdog only while a holder has it open: without one, the
/// end of this process would pet it after its lease has expired.
#[derive(Debug)]
pub struct HeldDevice<D> {
    device: D,
    run_dir: PathBuf,
    holder: Option<Holder>,
    /// When the next attempt to start a holder is due.
    retry_at: BootTime,
}

impl<D: WatchdogDevice> HeldDevice<D> {
    /// A device that was just opened: starts its holder.
    #[must_use]
    pub fn open(device: D, run_dir: &Path) -> Self {
        let mut held = Self {
            device,
            run_dir: run_dir.to_owned(),
            holder: None,
            retry_at: BootTime(0),
        };
        held.keep_held();
        held
    }

    /// A device whose descriptor came from `holder`.
    #[must_use]
    pub fn adopt(device: D, run_dir: &Path, holder: Holder) -> Self {
        Self {
            device,
            run_dir: run_dir.to_owned(),
            holder: Some(holder),
            retry_at: BootTime(0),
        }
    }

    /// Starts a holder if there is none.
    fn keep_held(&mut self) {
        if self.holder.as_ref().is_some_and(Holder::is_alive) {
            return;
        }
        self.holder = None;
        let Some(descriptor) = self.device.descriptor() else {
            return;
        };
        let now = boot_time_now();
        if now < self.retry_at {
            return;
        }
        self.retry_at = now.after(RETRY);
        match Holder::start(&self.run_dir, descriptor) {
            Ok(holder) => self.holder = Some(holder),
            Err(error) => tracing::error!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "only this process holds the watchdog device: it does not count as a watchdog"
            ),
        }
    }
}

impl<D: WatchdogDevice> WatchdogDevice for HeldDevice<D> {
    fn kind(&self) -> Kind {
        if self.holder.is_some() {
            self.device.kind()
        } else {
            Kind::None
        }
    }

    fn timeout(&self) -> Duration {
        self.device.timeout()
    }

    fn keepalive(&mut self) -> io::Result<()> {
        let sent = self.device.keepalive();
        // After the keepalive, which must not wait for it.
        self.keep_held();
        sent
    }

    fn disarm(&mut self) -> io::Result<()> {
        // The kernel disarms the device when the last descriptor is closed.
        if let Some(mut holder) = self.holder.take() {
            holder.end().map_err(io::Error::other)?;
        }
        self.device.disarm()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.device.descriptor()
    }
}

/// Between two attempts to start a holder.
const RETRY: Duration = Duration::from_secs(1);
