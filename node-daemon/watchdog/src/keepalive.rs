//! The keepalive loop, the only user of the watchdog device.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_types::VolumeId;
use bascule_volume_gate::{Changes, Clock};
use bascule_volume_protocol::watchdog_policy::Decision;

use crate::enlisted_volumes::EnlistedVolumes;
use crate::watchdog_device::{Kind, WatchdogDevice};

/// The state that the keepalive loop and the server share.
#[derive(Debug)]
pub struct Shared {
    state: Mutex<State>,
    changes: Changes,
    pub(crate) clock: Arc<dyn Clock>,
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
    /// Requests whose answers have not been sent yet.
    pub answering: usize,
}

impl Shared {
    /// The state before the loop starts; without a device if it is not open yet.
    #[must_use]
    pub fn new(
        device: Option<&dyn WatchdogDevice>,
        volumes: EnlistedVolumes,
        clock: Arc<dyn Clock>,
    ) -> Arc<Self> {
        Arc::new(Self {
            state: Mutex::new(State {
                volumes,
                kind: device.map_or(Kind::None, WatchdogDevice::kind),
                timeout: device.map_or(Duration::ZERO, WatchdogDevice::timeout),
                disarming: false,
                ending: false,
                terminating: false,
                answering: 0,
            }),
            changes: Changes::default(),
            clock,
        })
    }

    /// The locked state. Hold it briefly: the keepalive loop waits for the lock. The device is used outside it.
    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic in a handler thread must not stop the keepalives of a healthy node. The list of
        // volumes is replaced in single assignments, so it is consistent.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the loop after the list of volumes changed.
    pub fn wake(&self) {
        self.changes.add();
        self.clock.wake(&self.changes);
    }

    /// Counts a request until the guard is dropped, after its answer was sent: this process does not exit before.
    pub(crate) fn begin_answer(&self) -> Answering<'_> {
        self.lock().answering += 1;
        Answering(self)
    }

    /// Whether to send a keepalive; none when the loop is to end.
    pub(crate) fn decide(&self) -> Option<Decision> {
        let mut state = self.lock();
        if state.terminating && state.volumes.ids().is_empty() && state.answering == 0 {
            state.disarming = true;
            state.ending = true;
        }
        (!state.ending).then(|| state.volumes.decide(self.clock.now()))
    }

    /// Stores what clients are told about the device. Returns its timeout.
    fn note_device<D, F>(&self, keeper: &Keeper<D, F>) -> Duration
    where
        D: WatchdogDevice,
        F: FnOnce() -> io::Result<D>,
    {
        let mut state = self.lock();
        if let Some(device) = keeper.device() {
            state.timeout = device.timeout();
            state.kind = match keeper.broken {
                true => Kind::None,
                false => device.kind(),
            };
        }
        state.timeout
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

/// A request that is being answered.
#[derive(Debug)]
pub(crate) struct Answering<'a>(&'a Shared);

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.lock().answering -= 1;
        self.0.wake();
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
/// The clock is read before the gate pages, and the keepalive follows at once, outside the lock: one at
/// most from each decision. If this process freezes in between, the keepalive is late by at most one timeout:
/// see [`bascule_volume_protocol::watchdog_policy::timeout_fits`].
///
/// # Errors
/// Those of opening the device.
pub fn run<D, F>(slot: Slot<D, F>, shared: &Shared) -> io::Result<()>
where
    D: WatchdogDevice,
    F: FnOnce() -> io::Result<D>,
{
    let mut keeper = Keeper {
        slot,
        broken: false,
        withheld: None,
    };
    loop {
        let seen = shared.changes.count();
        let Some(decision) = shared.decide() else {
            keeper.disarm();
            return Ok(());
        };
        keeper = keeper.follow(decision)?;
        let interval = interval(shared.note_device(&keeper));
        (shared.clock).wait_for_change(&shared.changes, seen, interval);
    }
}

/// The device and what was logged about it.
struct Keeper<D, F> {
    slot: Slot<D, F>,
    /// A keepalive has failed.
    broken: bool,
    /// The volume whose expired lease last stopped the keepalives.
    withheld: Option<VolumeId>,
}

impl<D, F> Keeper<D, F>
where
    D: WatchdogDevice,
    F: FnOnce() -> io::Result<D>,
{
    fn follow(mut self, decision: Decision) -> io::Result<Self> {
        match decision {
            Decision::Pet => {
                if let Some(volume) = self.withheld.take() {
                    tracing::info!(%volume, "lease valid again, or volume withdrawn: sending keepalives");
                }
                self.slot = match self.slot {
                    Slot::Open(mut device) => {
                        if let Err(error) = device.keepalive()
                            && !self.broken
                        {
                            tracing::error!(error = %error, "cannot send a keepalive to the watchdog");
                            self.broken = true;
                        }
                        Slot::Open(device)
                    }
                    // That is the keepalive.
                    Slot::Waiting(open) => Slot::Open(open()?),
                };
            }
            Decision::Withhold(volume) => {
                if self.withheld.replace(volume) != Some(volume) {
                    let timeout = self.device().map(WatchdogDevice::timeout);
                    tracing::error!(
                        %volume,
                        ?timeout,
                        "a volume with open writers has no valid lease: no keepalives, an armed watchdog \
                         resets this node after its timeout"
                    );
                }
            }
        }
        // After the keepalive, which must not wait for it; and also while keepalives are withheld: the end
        // of this process would be one.
        if let Slot::Open(device) = &mut self.slot {
            device.keep_held();
        }
        Ok(self)
    }

    fn disarm(&mut self) {
        if let Slot::Open(device) = &mut self.slot
            && let Err(error) = device.disarm()
        {
            tracing::error!(error = %error, "cannot disarm the watchdog: it stays armed");
        }
    }

    fn device(&self) -> Option<&D> {
        match &self.slot {
            Slot::Open(device) => Some(device),
            Slot::Waiting(_) => None,
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
