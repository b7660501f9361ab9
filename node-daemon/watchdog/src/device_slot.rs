//! What a process that starts does about the device, before it serves: adopts it, opens it or waits.

use std::io;
use std::sync::Arc;

use bascule_volume_protocol::watchdog_policy::Start;
use bascule_volume_protocol::{Rules, broken};

use crate::enlisted_volumes::EnlistedVolumes;
use crate::held_device::HeldDevice;
use crate::holder::HolderError;
use crate::host::{BoxedDevice, Host};
use crate::keepalive::Slot;
use crate::watchdog_device::WatchdogDevice as _;

/// Opens the device later.
pub type Opener = Box<dyn FnOnce() -> io::Result<BoxedDevice> + Send>;

/// Why there is no device to serve.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// A holder runs, or may run, and cannot be used.
    #[error(transparent)]
    Holder(#[from] HolderError),
    /// The device cannot be opened.
    #[error(transparent)]
    Open(io::Error),
}

/// Adopts the device that a holder has open, opens it, or leaves it closed until every enlisted lease is
/// valid ([`Start`]).
///
/// # Errors
/// [`SlotError`]; the process must end, and is started again.
pub fn device_slot(
    host: &Arc<dyn Host>,
    volumes: &EnlistedVolumes,
    rules: Rules,
) -> Result<Slot<BoxedDevice, Opener>, SlotError> {
    let held = host.find_holder()?;
    let start = Start::decide(rules, held.is_some(), volumes.decide(host.now()));
    if let Some((device, holder)) = held {
        tracing::info!("taking the open watchdog device over");
        let mut device = HeldDevice::adopt(device, host, holder, rules);
        if broken!(rules, KeepaliveOnAdoption) {
            device.keepalive().map_err(SlotError::Open)?;
        }
        return Ok(Slot::Open(Box::new(device)));
    }
    let opened = Arc::clone(host);
    let open = move || -> io::Result<BoxedDevice> {
        let device = opened.open_device()?;
        Ok(Box::new(HeldDevice::open(device, &opened, rules)))
    };
    match start {
        Start::Wait(volume) => {
            tracing::error!(
                %volume,
                "a volume with open writers has no valid lease: the watchdog is not opened before it has"
            );
            Ok(Slot::Waiting(Box::new(open)))
        }
        Start::Adopt | Start::Open => Ok(Slot::Open(open().map_err(SlotError::Open)?)),
    }
}
