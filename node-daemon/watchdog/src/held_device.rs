//! A watchdog device that a second process holds open too.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::time::Duration;

use bascule_types::BootTime;
use bascule_volume_protocol::{Rules, broken};

use crate::holder::Holder;
use crate::host::Host;
use crate::watchdog_device::{Kind, WatchdogDevice};

/// A device with its holder. It counts as a watchdog only while a holder has it open: without one, the
/// end of this process would pet it after its lease has expired.
#[derive(Debug)]
pub struct HeldDevice<D> {
    device: D,
    host: Arc<dyn Host>,
    rules: Rules,
    holder: Option<Box<dyn Holder>>,
    /// When the next attempt to start a holder is due.
    retry_at: BootTime,
}

impl<D: WatchdogDevice> HeldDevice<D> {
    /// A device that was just opened: starts its holder.
    #[must_use]
    pub fn open(device: D, host: &Arc<dyn Host>, rules: Rules) -> Self {
        let mut held = Self {
            device,
            host: Arc::clone(host),
            rules,
            holder: None,
            retry_at: BootTime(0),
        };
        held.keep_held();
        held
    }

    /// A device whose descriptor came from `holder`.
    #[must_use]
    pub fn adopt(device: D, host: &Arc<dyn Host>, holder: Box<dyn Holder>, rules: Rules) -> Self {
        Self {
            device,
            host: Arc::clone(host),
            rules,
            holder: Some(holder),
            retry_at: BootTime(0),
        }
    }
}

impl<D: WatchdogDevice> WatchdogDevice for HeldDevice<D> {
    fn kind(&self) -> Kind {
        if self.holder.is_some() || broken!(self.rules, NoSecondHolder) {
            self.device.kind()
        } else {
            Kind::None
        }
    }

    fn timeout(&self) -> Duration {
        self.device.timeout()
    }

    fn keepalive(&mut self) -> io::Result<()> {
        self.device.keepalive()
    }

    /// Starts a holder if there is none. Sends no keepalive.
    fn keep_held(&mut self) {
        if self.holder.as_ref().is_some_and(|holder| holder.is_alive()) {
            return;
        }
        self.holder = None;
        let Some(descriptor) = self.device.descriptor() else {
            return;
        };
        let now = self.host.now();
        if now < self.retry_at || broken!(self.rules, NoSecondHolder) {
            return;
        }
        self.retry_at = now.after(RETRY);
        match self.host.start_holder(descriptor) {
            Ok(holder) => self.holder = Some(holder),
            Err(error) => tracing::error!(
                error = format!("{:#}", anyhow::Error::from(error)),
                "only this process holds the watchdog device: it does not count as a watchdog"
            ),
        }
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
