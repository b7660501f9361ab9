//! The keepalive loop, the only user of the watchdog device.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::VolumeId;
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::watchdog_policy::Decision;

use crate::enlisted_volumes::EnlistedVolumes;
use crate::watchdog_device::{Kind, WatchdogDevice};

/// The state that the keepalive loop and the server share.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The locked part of [`Shared`].
#[derive(Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct State {
    pub volumes: EnlistedVolumes,
    /// What resets the node. [`Kind::None`] once a keepalive has failed, and while the device is not
    /// open.
    pub kind: Kind,
    /// How long after the last keepalive the device resets the node.
    pub timeout: Duration,
    /// Disarming was granted: no further volume may be enlisted.
    pub disarming: bool,
    /// The client has received the answer to its disarm request: the loop disarms the device and
    /// this process exits.
    pub ending: bool,
    /// The host shuts down: as if the device were to be disarmed as soon as no volume is enlisted.
    pub terminating: bool,
    /// A keepalive has failed.
    broken: bool,
    /// The volume whose expired lease last stopped the keepalives.
    withheld: Option<VolumeId>,
}

impl Shared {
    /// The state before the loop starts; without a device if it is not open yet.
    #[must_use]
    pub fn new(device: Option<&dyn WatchdogDevice>, volumes: EnlistedVolumes) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                volumes,
                kind: device.map_or(Kind::None, WatchdogDevice::kind),
                timeout: device.map_or(Duration::ZERO, WatchdogDevice::timeout),
                broken: false,
                disarming: false,
                ending: false,
                terminating: false,
                withheld: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// The locked state. Hold it briefly: the keepalive loop waits for the lock.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in a handler thread must not stop the keepalives of a healthy node. The list of
        // volumes is replaced in single assignments, so it is consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the loop after the list of volumes changed.
    pub fn wake(&self) {
        self.changed.notify_all();
    }

    /// Makes the loop disarm the device and return as soon as no volume is enlisted.
    pub fn terminate(&self) {
        self.lock().terminating = true;
        self.wake();
    }

    /// Makes the loop disarm the device and return.
    pub fn end(&self) {
        self.lock().ending = true;
        self.wake();
    }
}

/// The device of the loop.
#[derive(Debug)]
pub enum Slot<D, F> {
    /// Open.
    Open(D),
    /// Opened by this function, once every enlisted lease is valid: opening it is a keepalive.
    Waiting(F),
}

/// Sends keepalives to the device as [`EnlistedVolumes::decide`] says, until a client disarms it.
///
/// # Ordering
/// The clock is read before the gate pages, and the keepalive follows at once. If this process
/// freezes in between, the keepalive is late by at most one timeout: see
/// [`bascule_volume_protocol::watchdog_policy::timeout_fits`].
///
/// # Errors
/// Those of opening the device.
pub fn run<D, F>(mut slot: Slot<D, F>, shared: &Shared) -> io::Result<()>
where
    D: WatchdogDevice,
    F: FnOnce() -> io::Result<D>,
{
    let mut state = shared.lock();
    loop {
        if state.terminating && state.volumes.ids().is_empty() {
            state.disarming = true;
            state.ending = true;
        }
        if state.ending {
            if let Slot::Open(device) = &mut slot
                && let Err(error) = device.disarm()
            {
                tracing::error!(error = %error, "cannot disarm the watchdog: it stays armed");
            }
            return Ok(());
        }
        slot = step(slot, &mut state)?;
        let interval = interval(state.timeout);
        state = match shared.changed.wait_timeout(state, interval) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}

fn step<D, F>(slot: Slot<D, F>, state: &mut State) -> io::Result<Slot<D, F>>
where
    D: WatchdogDevice,
    F: FnOnce() -> io::Result<D>,
{
    let now = boot_time_now();
    match state.volumes.decide(now) {
        Decision::Pet => {
            if let Some(volume) = state.withheld.take() {
                tracing::info!(%volume, "lease valid again, or volume withdrawn: sending keepalives");
            }
            let mut device = match slot {
                Slot::Open(device) => device,
                Slot::Waiting(open) => open()?,
            };
            if let Err(error) = device.keepalive()
                && !state.broken
            {
                tracing::error!(error = %error, "cannot send a keepalive to the watchdog");
                state.broken = true;
            }
            state.kind = if state.broken {
                Kind::None
            } else {
                device.kind()
            };
            state.timeout = device.timeout();
            Ok(Slot::Open(device))
        }
        Decision::Withhold(volume) => {
            if state.withheld.replace(volume) != Some(volume) {
                let timeout = state.timeout;
                tracing::error!(
                    %volume,
                    ?timeout,
                    "a volume with open writers has no valid lease: no keepalives, an armed watchdog \
                     resets this node after its timeout"
                );
            }
            Ok(slot)
        }
    }
}

/// Eight keepalives per timeout, so that a few late ones do not reset the node; between 10 ms and
/// 1 s. Without a device (timeout 0) the loop only logs expired leases.
fn interval(timeout: Duration) -> Duration {
    (timeout / 8).clamp(INTERVAL_MIN, INTERVAL_MAX)
}

const INTERVAL_MIN: Duration = Duration::from_millis(10);
const INTERVAL_MAX: Duration = Duration::from_secs(1);
