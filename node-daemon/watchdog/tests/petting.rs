//! The watchdog's owner with a device of the test's own.
#![expect(clippy::unwrap_used, clippy::panic, reason = "fixtures of tests")]

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::volume::WatchdogKind;
use bascule_ipc::watchdog::{Request, Response};
use bascule_types::{BootTime, Generation, Owner, SlotId, VolumeId};
use bascule_volume_gate::{GateWriter, boot_time_now};
use bascule_watchdog::petting::{self, Shared};
use bascule_watchdog::{Kind, Registry, Store, WatchdogDevice, server};

const GOLD: VolumeId = VolumeId::from_bytes([1; 16]);
const TIMEOUT: Duration = Duration::from_millis(400);
/// Several pets are due within this time.
const QUIET: Duration = Duration::from_millis(250);
/// For a condition that must come true.
const DEADLINE: Duration = Duration::from_secs(10);

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Pet(BootTime),
    Disarmed,
}

struct Probe {
    tx: Sender<Seen>,
}

impl WatchdogDevice for Probe {
    fn kind(&self) -> Kind {
        Kind::Hardware
    }

    fn timeout(&self) -> Duration {
        TIMEOUT
    }

    fn pet(&mut self) -> io::Result<()> {
        let seen = Seen::Pet(boot_time_now());
        self.tx.send(seen).map_err(io::Error::other)
    }

    fn disarm(&mut self) -> io::Result<()> {
        self.tx.send(Seen::Disarmed).map_err(io::Error::other)
    }
}

/// A run directory with one volume's gate page, held for 60 s.
struct Host {
    dir: tempfile::TempDir,
    gate: GateWriter,
}

impl Host {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (gate, _) = GateWriter::open(dir.path().join("gate"), GOLD).unwrap();
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

    fn registry(&self) -> Registry {
        let store = Store::new(self.dir.path().join("watchdog.json")).unwrap();
        Registry::load(store).unwrap()
    }

    fn gate_page(&self) -> PathBuf {
        self.dir.path().join("gate")
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("watchdog.sock")
    }

    fn start(&self) -> Running {
        let (tx, rx) = channel();
        let device = Probe { tx };
        let shared = Shared::new(&device, self.registry());
        let listener = server::listen(&self.socket()).unwrap();
        let served = Arc::clone(&shared);
        let spawn = |name: &str| std::thread::Builder::new().name(name.to_owned());
        spawn("server")
            .spawn(move || server::serve(&listener, &served))
            .unwrap();
        let petting = spawn("petting")
            .spawn(move || petting::run(device, &shared))
            .unwrap();
        Running { rx, petting }
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
        }
    }
}

struct Running {
    rx: Receiver<Seen>,
    petting: JoinHandle<()>,
}

impl Running {
    /// The moment of a pet that comes after this call.
    fn pet(&self) -> BootTime {
        let from = boot_time_now();
        loop {
            match self.rx.recv_timeout(DEADLINE).unwrap() {
                Seen::Pet(at) if at >= from => return at,
                Seen::Pet(_) => {}
                Seen::Disarmed => panic!("the device was disarmed"),
            }
        }
    }

    /// The last pet before the pets end; they must end soon.
    fn last_pet(&self) -> Option<BootTime> {
        let until = boot_time_now().after(DEADLINE);
        let mut last = None;
        loop {
            match self.rx.recv_timeout(QUIET) {
                Ok(Seen::Pet(at)) => last = Some(at),
                Ok(Seen::Disarmed) => panic!("the device was disarmed"),
                Err(RecvTimeoutError::Timeout) => return last,
                Err(RecvTimeoutError::Disconnected) => panic!("the petting loop ended"),
            }
            assert!(boot_time_now() < until, "the pets do not end");
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
fn i1_the_pets_end_with_the_lease_of_an_enlisted_volume_and_resume_with_it() {
    let host = Host::new();
    let running = host.start();
    running.pet();
    assert_eq!(
        host.ask(&host.enlist()),
        Response::Status {
            kind: WatchdogKind::Hardware,
            timeout_ms: 400,
            enlisted: vec![GOLD],
        }
    );
    running.pet();
    let expiry = host.renew(Duration::from_millis(300));
    let last = running.last_pet().unwrap();
    assert!(last < expiry.after(TIMEOUT), "{last:?} {expiry:?}");
    host.renew(Duration::from_secs(60));
    running.pet();
}

#[test]
fn a_volume_that_is_not_enlisted_may_lapse() {
    let host = Host::new();
    let running = host.start();
    host.gate.close();
    running.pet();
}

#[test]
fn i1_a_client_that_vanishes_leaves_its_volume_enlisted() {
    let host = Host::new();
    let running = host.start();
    let mut client = host.client();
    client.call::<_, Response>(&host.enlist()).unwrap();
    drop(client);
    running.pet();
    host.gate.close();
    running.last_pet();
    let Response::Status { enlisted, .. } = host.ask(&Request::Status) else {
        panic!("no status");
    };
    assert_eq!(enlisted, [GOLD]);
}

#[test]
fn a_withdrawn_volume_may_lapse() {
    let host = Host::new();
    let running = host.start();
    host.ask(&host.enlist());
    host.ask(&Request::Withdraw { volume: GOLD });
    host.gate.close();
    running.pet();
}

#[test]
fn i1_a_restarted_owner_knows_which_volumes_it_watches() {
    let host = Host::new();
    let mut registry = host.registry();
    registry.enlist(GOLD, &host.gate_page()).unwrap();
    drop(registry);
    let running = host.start();
    running.pet();
    host.gate.close();
    running.last_pet();
    host.renew(Duration::from_secs(60));
    running.pet();
}

#[test]
fn i1_an_enlisted_volume_whose_page_is_gone_at_a_restart_counts_as_lapsed() {
    let host = Host::new();
    host.registry().enlist(GOLD, &host.gate_page()).unwrap();
    std::fs::remove_file(host.gate_page()).unwrap();
    let running = host.start();
    assert_eq!(running.last_pet(), None);
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
    let reason = refusal(host.ask(&Request::Enlist { volume, gate_page }));
    assert!(reason.contains("cannot open the gate page"), "{reason}");

    let (volume, gate_page) = (VolumeId::from_bytes([2; 16]), host.gate_page());
    let reason = refusal(host.ask(&Request::Enlist { volume, gate_page }));
    assert!(reason.contains(&GOLD.to_string()), "{reason}");
    running.pet();
}

#[test]
fn the_device_is_disarmed_on_request_but_never_while_a_volume_is_enlisted() {
    let host = Host::new();
    let running = host.start();
    host.ask(&host.enlist());
    let reason = refusal(host.ask(&Request::Disarm));
    assert_eq!(reason, "a volume with open writers is enlisted");
    running.pet();

    host.ask(&Request::Withdraw { volume: GOLD });
    host.ask(&Request::Disarm);
    running.petting.join().unwrap();
    let last = running.rx.try_iter().last();
    assert_eq!(last, Some(Seen::Disarmed));
}
