//! The loop that pets the device.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::VolumeId;
use bascule_volume_gate::boot_time_now;
use bascule_volume_protocol::watchdog_policy::Decision;

use crate::device::{Kind, WatchdogDevice};
use crate::registry::Registry;

/// What the loop and the server share.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// What is behind the lock.
#[derive(Debug)]
pub struct State {
    /// The enlisted volumes.
    pub registry: Registry,
    /// What resets the node. [`Kind::None`] once the device failed to be petted.
    pub kind: Kind,
    /// The device's timeout.
    pub timeout: Duration,
    /// Disarming was granted: no volume is enlisted any more.
    pub leaving: bool,
    /// It was also answered: the device is disarmed now, and this process ends.
    pub ending: bool,
    withheld: Option<VolumeId>,
}

impl Shared {
    /// For this device and these volumes.
    #[must_use]
    pub fn new(device: &dyn WatchdogDevice, registry: Registry) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                registry,
                kind: device.kind(),
                timeout: device.timeout(),
                leaving: false,
                ending: false,
                withheld: None,
            }),
            changed: Condvar::new(),
        })
    }

    /// The state, locked. Hold it briefly: the petting loop waits for it.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in a handler thread must not end the pets of a healthy node; the registry is
        // replaced in single assignments, so it is whole.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wake the loop: something is enlisted or withdrawn.
    pub fn wake(&self) {
        self.changed.notify_all();
    }

    /// Let the loop disarm the device and end.
    pub fn end(&self) {
        self.lock().ending = true;
        self.wake();
    }
}

/// Pet `device` by the rule until somebody disarms it. Does nothing but count with no device.
///
/// # Ordering
/// The moment is taken before the gate pages are read, and the pet follows at once. If this process
/// is frozen in between, the pet is late by at most one timeout: see
/// [`bascule_volume_protocol::watchdog_policy::timeout_fits`].
pub fn run(mut device: impl WatchdogDevice, shared: &Shared) {
    let interval = interval(device.timeout());
    let mut state = shared.lock();
    loop {
        if state.ending {
            if let Err(error) = device.disarm() {
                tracing::error!(error = %error, "cannot disarm the watchdog: it counts on");
            }
            return;
        }
        step(&mut device, &mut state);
        state = match shared.changed.wait_timeout(state, interval) {
            Ok((state, _)) => state,
            Err(poisoned) => poisoned.into_inner().0,
        };
    }
}

fn step(device: &mut impl WatchdogDevice, state: &mut State) {
    let now = boot_time_now();
    match state.registry.decide(now) {
        Decision::Pet => {
            if let Some(volume) = state.withheld.take() {
                tracing::info!(%volume, "its lease is valid again or it was withdrawn: petting");
            }
            if let Err(error) = device.pet()
                && state.kind != Kind::None
            {
                tracing::error!(error = %error, "cannot pet the watchdog");
                state.kind = Kind::None;
            }
        }
        Decision::Withhold(volume) => {
            if state.withheld.replace(volume) != Some(volume) {
                let timeout = device.timeout();
                tracing::error!(
                    %volume,
                    ?timeout,
                    "a volume with open writers has no valid lease: not petting"
                );
            }
        }
    }
}

/// Eight pets per timeout, so that a few late ones do no harm; and often enough to notice a lapsed
/// lease when there is no device.
fn interval(timeout: Duration) -> Duration {
    (timeout / 8).clamp(INTERVAL_MIN, INTERVAL_MAX)
}

const INTERVAL_MIN: Duration = Duration::from_millis(10);
const INTERVAL_MAX: Duration = Duration::from_secs(1);
