//! The keepalive loop and the server of `bascule-watchdog` with a watchdog device of the test.
#![expect(clippy::unwrap_used, clippy::panic, reason = "fixtures of tests")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::volume::WatchdogKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_types::{BootTime, Generation, Owner, SlotId, VolumeId};
use bascule_volume_gate::{Changes, Clock, GateWriter, LinuxClock, boot_time_now};
use bascule_volume_protocol::Rules;
use bascule_watchdog::keepalive::{self, Shared, Slot};
use bascule_watchdog::{
    BoxedDevice, EnlistedVolumes, EnlistmentFile, FoundHolder, HeldDevice, Holder, HolderError,
    Kind, WatchdogDevice, server,
};

const GOLD: VolumeId = VolumeId::from_bytes([1; 16]);
const WITHDRAW: Request = Request::Withdraw {
    volume: GOLD,
    decided_at: None,
};
const TIMEOUT: Duration = Duration::from_millis(400);
/// Several keepalives are due within this time.
const QUIET: Duration = Duration::from_millis(250);
/// For a condition that must come true.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Opened(BootTime),
    Keepalive(BootTime),
    HolderStarted,
    Disarmed,
}

struct Probe {
    tx: Sender<Seen>,
    null: File,
}

impl Probe {
    fn new(tx: Sender<Seen>) -> Self {
        let null = File::open("/dev/null").unwrap();
        Self { tx, null }
    }
}

type Opener<D> = Box<dyn FnOnce() -> io::Result<D> + Send>;

fn opener(tx: Sender<Seen>) -> Opener<Probe> {
    Box::new(move || {
        let opened = Seen::Opened(boot_time_now());
        tx.send(opened).map_err(io::Error::other)?;
        Ok(Probe::new(tx))
    })
}

impl WatchdogDevice for Probe {
    fn kind(&self) -> Kind {
        Kind::Hardware
    }

    fn timeout(&self) -> Duration {
        TIMEOUT
    }

    fn keepalive(&mut self) -> io::Result<()> {
        let seen = Seen::Keepalive(boot_time_now());
        self.tx.send(seen).map_err(io::Error::other)
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.tx.send(Seen::Disarmed).map_err(io::Error::other)
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.null.as_fd())
    }
}

/// A machine whose holders are flags: whether the last one that was started lives.
#[derive(Debug)]
struct Machine {
    tx: Sender<Seen>,
    lives: Arc<AtomicBool>,
}

#[derive(Debug)]
struct Flag(Arc<AtomicBool>);

impl Holder for Flag {
    fn is_alive(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    fn end(&mut self) -> Result<(), HolderError> {
        self.0.store(false, Ordering::SeqCst);
        Ok(())
    }
}

impl Clock for Machine {
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

impl bascule_watchdog::Host for Machine {
    fn open_device(&self) -> io::Result<BoxedDevice> {
        Err(io::Error::other("open already"))
    }

    fn find_holder(&self) -> Result<Option<FoundHolder>, HolderError> {
        Ok(None)
    }

    fn start_holder(&self, _: BorrowedFd<'_>) -> Result<Box<dyn Holder>, HolderError> {
        self.lives.store(true, Ordering::SeqCst);
        let sent = self.tx.send(Seen::HolderStarted);
        sent.map_err(|_| HolderError::NoDescriptor)?;
        Ok(Box::new(Flag(Arc::clone(&self.lives))))
    }
}

/// A run directory with one volume's gate page, held for 60 s.
struct Host {
    dir: tempfile::TempDir,
    gate: Arc<GateWriter>,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (gate, _) = GateWriter::open(dir.path().join("gate"), GOLD).unwrap();
        let gate = Arc::new(gate);
        let host = Self { dir, gate };
        host.renew(Duration::from_secs(60));
        host
    }

    fn renew(&self, lease: Duration) -> BootTime {
        let owner = Owner {
            slot: SlotId(0),
            generation: Generation(1),
        };
        let expiry = boot_time_now().after(lease);
        self.gate.publish(owner, expiry).unwrap();
        expiry
    }

    fn volumes(&self) -> EnlistedVolumes {
        let store = EnlistmentFile::new(self.dir.path().join("watchdog.json")).unwrap();
        EnlistedVolumes::load(Box::new(store), Rules::ENFORCED).unwrap()
    }

    fn gate_page(&self) -> PathBuf {
        self.dir.path().join("gate")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("watchdog.sock")
    }

    fn start(&self) -> Running {
        let (tx, rx) = channel();
        self.start_at::<_, Opener<Probe>>(Slot::Open(Probe::new(tx)), rx)
    }

    /// With a second process that has the device open. The flag says whether it lives.
    fn start_held(&self) -> (Running, Arc<AtomicBool>) {
        let (tx, rx) = channel();
        let lives = Arc::new(AtomicBool::new(false));
        let machine: Arc<dyn bascule_watchdog::Host> = Arc::new(Machine {
            tx: tx.clone(),
            lives: Arc::clone(&lives),
        });
        let device = HeldDevice::open(Probe::new(tx), &machine, Rules::ENFORCED);
        assert_eq!(rx.recv().unwrap(), Seen::HolderStarted);
        let running = self.start_at::<_, Opener<HeldDevice<Probe>>>(Slot::Open(device), rx);
        (running, lives)
    }

    /// As a process that found no holder, and must not open the device yet.
    fn start_waiting(&self) -> Running {
        let (tx, rx) = channel();
        self.start_at(Slot::Waiting(opener(tx)), rx)
    }

    fn start_at<D, F>(&self, slot: Slot<D, F>, rx: Receiver<Seen>) -> Running
    where
        D: WatchdogDevice + 'static,
        F: FnOnce() -> io::Result<D> + Send + 'static,
    {
        let device: Option<&dyn WatchdogDevice> = match &slot {
            Slot::Open(device) => Some(device),
            Slot::Waiting(_) => None,
        };
        let shared = Shared::new(device, self.volumes(), Arc::new(LinuxClock));
        let listener = server::listen(&self.socket()).unwrap();
        let served = Arc::clone(&shared);
        let spawn = |name: &str| std::thread::Builder::new().name(name.to_owned());
        spawn("server")
            .spawn(move || server::serve(&listener, &served))
            .unwrap();
        let keepalive = spawn("keepalive")
            .spawn(move || keepalive::run(slot, &shared).unwrap())
            .unwrap();
        Running { rx, keepalive }
    }

    fn client(&self) -> Connection {
        Connection::connect(&self.socket(), DEADLINE).unwrap()
    }

    fn ask(&self, request: &Request) -> Response {
        self.client().call(request).unwrap().0
    }

    fn enlist(&self) -> Request {
        Request::Enlist {
            volume: GOLD,
            gate_page: self.gate_page(),
            lease_until: None,
            decided_at: None,
        }
    }
}

struct Running {
    rx: Receiver<Seen>,
    keepalive: JoinHandle<()>,
}

impl Running {
    /// The time of a keepalive that is sent after this call.
    fn next_keepalive(&self) -> BootTime {
        let from = boot_time_now();
        loop {
            match self.rx.recv_timeout(DEADLINE).unwrap() {
                Seen::Keepalive(at) if at >= from => return at,
                Seen::Keepalive(_) | Seen::Opened(_) | Seen::HolderStarted => {}
                Seen::Disarmed => panic!("the device was disarmed"),
            }
        }
    }

    /// The last keepalive before they stop; they must stop within [`DEADLINE`].
    fn last_keepalive(&self) -> Option<BootTime> {
        let until = boot_time_now().after(DEADLINE);
        let mut last = None;
        loop {
            match self.rx.recv_timeout(QUIET) {
                Ok(Seen::Keepalive(at) | Seen::Opened(at)) => last = Some(at),
                Ok(Seen::HolderStarted) => {}
                Ok(Seen::Disarmed) => panic!("the device was disarmed"),
                Err(RecvTimeoutError::Timeout) => return last,
                Err(RecvTimeoutError::Disconnected) => panic!("the keepalive loop ended"),
            }
            assert!(boot_time_now() < until, "the keepalives do not stop");
        }
    }
}

fn refusal(response: Response) -> String {
    match response {
        Response::Refused { reason } => reason,
        other @ Response::Status { .. } => panic!("granted: {other:?}"),
    }
}

#[test]
fn i1_keepalives_stop_when_the_lease_of_an_enlisted_volume_expires_and_resume_with_it() {
    let host = Host::new();
    let running = host.start();
    running.next_keepalive();
    assert_eq!(
        host.ask(&host.enlist()),
        Response::Status {
            kind: WatchdogKind::Hardware,
            timeout_ms: 400,
            enlisted: vec![GOLD],
        }
    );
    running.next_keepalive();
    let expiry = host.renew(Duration::from_millis(300));
    let last = running.last_keepalive().unwrap();
    assert!(last < expiry.after(TIMEOUT), "{last:?} {expiry:?}");
    host.renew(Duration::from_secs(60));
    running.next_keepalive();
}

#[test]
fn the_lease_of_a_volume_that_is_not_enlisted_may_expire() {
    let host = Host::new();
    let running = host.start();
    host.gate.close();
    running.next_keepalive();
}

#[test]
fn i1_a_volume_stays_enlisted_after_its_client_has_disconnected() {
    let host = Host::new();
    let running = host.start();
    let mut client = host.client();
    client.call::<_, Response>(&host.enlist()).unwrap();
    drop(client);
    running.next_keepalive();
    host.gate.close();
    running.last_keepalive();
    let Response::Status { enlisted, .. } = host.ask(&Request::Status) else {
        panic!("no status");
    };
    assert_eq!(enlisted, [GOLD]);
}

#[test]
fn the_lease_of_a_withdrawn_volume_may_expire() {
    let host = Host::new();
    let running = host.start();
    host.ask(&host.enlist());
    host.ask(&WITHDRAW);
    host.gate.close();
    running.next_keepalive();
}

/// A withdrawal that its client had given up was carried out after the next enlistment: with open gates, the node
/// was not watched for up to a second.
#[test]
fn i1_a_withdrawal_that_comes_after_a_later_enlistment_is_refused() {
    let host = Host::new();
    host.start();
    let (first, second) = (BootTime(10), BootTime(20));
    let enlist = |decided_at| Request::Enlist {
        volume: GOLD,
        gate_page: host.gate_page(),
        lease_until: None,
        decided_at: Some(decided_at),
    };
    let withdraw = |decided_at| Request::Withdraw {
        volume: GOLD,
        decided_at: Some(decided_at),
    };
    host.ask(&enlist(second));
    assert!(refusal(host.ask(&withdraw(first))).contains("a later request"));
    let enlisted = |response| match response {
        Response::Status { enlisted, .. } => enlisted,
        Response::Refused { reason } => panic!("{reason}"),
    };
    assert_eq!(enlisted(host.ask(&Request::Status)), [GOLD]);
    // The same the other way round, and with requests that do not say when they were decided.
    assert_eq!(enlisted(host.ask(&withdraw(BootTime(30)))), []);
    assert!(refusal(host.ask(&enlist(second))).contains("a later request"));
    assert_eq!(enlisted(host.ask(&enlist(BootTime(31)))), [GOLD]);
    assert_eq!(enlisted(host.ask(&WITHDRAW)), []);
}

#[test]
fn i1_a_restarted_process_still_has_its_enlisted_volumes() {
    let host = Host::new();
    let mut volumes = host.volumes();
    let now = boot_time_now();
    volumes.enlist(GOLD, &host.gate_page(), now, None).unwrap();
    drop(volumes);
    let running = host.start();
    running.next_keepalive();
    host.gate.close();
    running.last_keepalive();
    host.renew(Duration::from_secs(60));
    running.next_keepalive();
}

#[test]
fn i1_an_enlisted_volume_without_a_gate_page_at_a_restart_counts_as_expired() {
    let host = Host::new();
    host.volumes()
        .enlist(GOLD, &host.gate_page(), boot_time_now(), None)
        .unwrap();
    std::fs::remove_file(host.gate_page()).unwrap();
    let running = host.start();
    assert_eq!(running.last_keepalive(), None);
}

/// Regression: a restart opened the device, which pets it, whatever the lease said.
#[test]
fn i1_a_process_that_starts_after_the_expiry_opens_the_device_only_with_a_new_lease() {
    let host = Host::new();
    host.volumes()
        .enlist(GOLD, &host.gate_page(), boot_time_now(), None)
        .unwrap();
    host.gate.close();
    let running = host.start_waiting();
    assert_eq!(running.last_keepalive(), None);
    let Response::Status { kind, enlisted, .. } = host.ask(&Request::Status) else {
        panic!("no status");
    };
    assert_eq!((kind, enlisted), (WatchdogKind::None, vec![GOLD]));
    host.renew(Duration::from_secs(60));
    running.next_keepalive();
    let Response::Status { kind, .. } = host.ask(&Request::Status) else {
        panic!("no status");
    };
    assert_eq!(kind, WatchdogKind::Hardware);
}

/// Regression: opening a device is a keepalive, and a second one followed from the same decision. A process that
/// froze before each of them delayed the reset by two timeouts.
#[test]
fn i1_a_device_that_is_opened_gets_no_further_keepalive_from_the_same_decision() {
    let host = Host::new();
    let mut volumes = host.volumes();
    let now = boot_time_now();
    volumes.enlist(GOLD, &host.gate_page(), now, None).unwrap();
    drop(volumes);
    let (tx, rx) = channel();
    let (gate, open) = (Arc::clone(&host.gate), opener(tx));
    // The lease ends while the device is being opened.
    let late = move || {
        gate.close();
        open()
    };
    let running = host.start_at(Slot::Waiting(late), rx);
    let opened = running.rx.recv_timeout(DEADLINE).unwrap();
    assert!(matches!(opened, Seen::Opened(_)), "{opened:?}");
    assert_eq!(running.last_keepalive(), None);
}

/// Regression: the holder was looked after with each keepalive only. If it ended after the lease had, the end of
/// `bascule-watchdog` closed the device, which is a keepalive.
#[test]
fn i1_a_holder_that_ends_while_keepalives_are_withheld_is_replaced_without_a_keepalive() {
    let host = Host::new();
    let (running, lives) = host.start_held();
    host.ask(&host.enlist());
    host.gate.close();
    running.last_keepalive();
    lives.store(false, Ordering::SeqCst);
    let replaced = running.rx.recv_timeout(DEADLINE).unwrap();
    assert_eq!(replaced, Seen::HolderStarted);
    assert_eq!(running.last_keepalive(), None);
    let Response::Status { kind, .. } = host.ask(&Request::Status) else {
        panic!("no status");
    };
    assert_eq!(kind, WatchdogKind::Hardware);
}

/// A volume that was withdrawn while its lease was lost is enlisted again before its gate opens.
#[test]
fn i1_a_volume_whose_new_lease_is_not_published_yet_is_enlisted_and_withholds_until_it_is() {
    let host = Host::new();
    host.gate.close();
    let running = host.start();
    let enlist = |lease_until| Request::Enlist {
        volume: GOLD,
        gate_page: host.gate_page(),
        lease_until: Some(lease_until),
        decided_at: None,
    };
    let expired = boot_time_now();
    assert_eq!(
        refusal(host.ask(&enlist(expired))),
        "the volume's lease is not valid"
    );
    let renewed = boot_time_now().after(Duration::from_secs(60));
    let Response::Status { enlisted, .. } = host.ask(&enlist(renewed)) else {
        panic!("refused");
    };
    assert_eq!(enlisted, [GOLD]);
    running.last_keepalive();
    host.renew(Duration::from_secs(60));
    running.next_keepalive();
}

#[test]
fn a_volume_without_a_valid_lease_or_page_is_not_enlisted_and_says_why() {
    let host = Host::new();
    let running = host.start();
    host.gate.close();
    let reason = refusal(host.ask(&host.enlist()));
    assert_eq!(reason, "the volume's lease is not valid");

    let gate_page = host.dir.path().join("missing");
    let volume = GOLD;
    let lease_until = None;
    let reason = refusal(host.ask(&Request::Enlist {
        volume,
        gate_page,
        lease_until,
        decided_at: None,
    }));
    assert!(reason.contains("cannot open the gate page"), "{reason}");

    let (volume, gate_page) = (VolumeId::from_bytes([2; 16]), host.gate_page());
    let reason = refusal(host.ask(&Request::Enlist {
        volume,
        gate_page,
        lease_until,
        decided_at: None,
    }));
    assert!(reason.contains(&GOLD.to_string()), "{reason}");
    running.next_keepalive();
}

#[test]
fn the_device_is_disarmed_on_request_but_never_while_a_volume_is_enlisted() {
    let host = Host::new();
    let running = host.start();
    host.ask(&host.enlist());
    let reason = refusal(host.ask(&Request::Disarm));
    assert_eq!(reason, "a volume with open writers is enlisted");
    running.next_keepalive();

    host.ask(&WITHDRAW);
    host.ask(&Request::Disarm);
    running.keepalive.join().unwrap();
    let last = running.rx.try_iter().last();
    assert_eq!(last, Some(Seen::Disarmed));
}
