//! What the threads of a process need of their machine, as a trait: Linux in production, a simulated
//! machine with its own clock, scheduler and network in tests. The volume itself is
//! [`crate::block_device::SharedDevice`].

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use bascule_ipc::watchdog::{Request, Response};
use bascule_ipc::{Connection, IpcError};
use bascule_types::BootTime;
use bascule_volume_gate::{Changes, Clock, LinuxClock};
use rand::RngExt as _;

use crate::peer_rpc::{PeerError, PeerRequest, PeerResponse, Tls};
use crate::sleep_inhibitor::SleepInhibitor;
use crate::writer_lock;

/// The machine that a process runs on. Threads wait here and nowhere else.
pub trait Host: Clock {
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
