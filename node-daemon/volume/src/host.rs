//! What the threads of a process need of their machine, as a trait: Linux in production, a simulated
//! machine with its own clock, scheduler and network in tests. The volume itself is
//! [`crate::block_device::SharedDevice`].

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bascule_ipc::watchdog::{Request, Response};
use bascule_ipc::{Connection, IpcError};
use bascule_types::BootTime;
use bascule_volume_gate::boot_time_now;
use rand::RngExt as _;

use crate::peer_rpc::{PeerError, PeerRequest, PeerResponse, Tls};
use crate::sleep_inhibitor::SleepInhibitor;
use crate::writer_lock;

/// The machine that a process runs on. Threads wait here and nowhere else.
pub trait Host: fmt::Debug + Send + Sync {
    /// `CLOCK_BOOTTIME`.
    fn now(&self) -> BootTime;

    /// Waits until [`Changes::count`] differs from `seen`, or `timeout` has passed.
    fn wait_for_change(&self, changes: &Changes, seen: u64, timeout: Duration);

    /// Wakes the threads that wait for a change of `changes`, after [`Changes::add`].
    fn wake(&self, changes: &Changes);

    /// A random delay of less than `most`.
    fn random_delay(&self, most: Duration) -> Duration;

    /// [`writer_lock::start_time`].
    fn start_time(&self, pid: u32) -> Option<u64>;

    /// Sends a request to the coordinator at `address`; `timeout` is for each read and write.
    ///
    /// # Errors
    /// [`PeerError`].
    fn request_peer(
        &self,
        address: SocketAddr,
        request: &PeerRequest,
        timeout: Duration,
    ) -> Result<PeerResponse, PeerError>;

    /// Sends a request to the node's `bascule-watchdog`.
    ///
    /// # Errors
    /// [`IpcError`].
    fn call_watchdog(&self, request: &Request) -> Result<Response, IpcError>;

    /// Keeps the node from going to sleep, or no longer ([`SleepInhibitor`]).
    fn keep_awake(&self, wanted: bool);
}

/// Counts changes of something that threads wait for.
#[derive(Debug, Default)]
pub struct Changes {
    count: Mutex<u64>,
    changed: Condvar,
}

impl Changes {
    /// How many changes there have been.
    #[must_use]
    pub fn count(&self) -> u64 {
        *self.lock()
    }

    /// Counts one more.
    pub fn add(&self) {
        let mut count = self.lock();
        *count = count.wrapping_add(1);
    }

    fn lock(&self) -> MutexGuard<'_, u64> {
        self.count.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The Linux host of this process.
#[derive(Debug)]
pub struct LinuxHost {
    tls: Tls,
    watchdog_sock: PathBuf,
    inhibitor: Mutex<SleepInhibitor>,
}

impl LinuxHost {
    /// With the TLS identity for connections to other nodes, and the socket of `bascule-watchdog`.
    #[must_use]
    pub fn new(tls: Tls, watchdog_sock: PathBuf) -> Self {
        Self {
            tls,
            watchdog_sock,
            inhibitor: Mutex::new(SleepInhibitor::new()),
        }
    }
}

impl Host for LinuxHost {
    fn now(&self) -> BootTime {
        boot_time_now()
    }

    fn wait_for_change(&self, changes: &Changes, seen: u64, timeout: Duration) {
        let waited = changes
            .changed
            .wait_timeout_while(changes.lock(), timeout, |count| *count == seen);
        drop(waited);
    }

    fn wake(&self, changes: &Changes) {
        changes.changed.notify_all();
    }

    fn random_delay(&self, most: Duration) -> Duration {
        rand::rng().random_range(Duration::ZERO..most)
    }

    fn start_time(&self, pid: u32) -> Option<u64> {
        writer_lock::start_time(pid)
    }

    fn request_peer(
        &self,
        address: SocketAddr,
        request: &PeerRequest,
        timeout: Duration,
    ) -> Result<PeerResponse, PeerError> {
        self.tls.request(address, request, timeout)
    }

    fn call_watchdog(&self, request: &Request) -> Result<Response, IpcError> {
        let mut connection = Connection::connect(&self.watchdog_sock, CALL_TIMEOUT)?;
        let (response, _) = connection.call(request)?;
        Ok(response)
    }

    fn keep_awake(&self, wanted: bool) {
        let inhibitor = self.inhibitor.lock();
        inhibitor
            .unwrap_or_else(PoisonError::into_inner)
            .set(wanted);
    }
}

/// For each step of one call of `bascule-watchdog`, which is on this host.
const CALL_TIMEOUT: Duration = Duration::from_secs(1);
