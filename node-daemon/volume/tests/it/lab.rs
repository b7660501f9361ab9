//! A lab on one machine: a volume in a file, and one `bascule-volume` process per node.

use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use bascule_ipc::volume::{PathState, Request, Response, Rows, VolumeStatus, WatchdogKind};
use bascule_ipc::{Connection, watchdog};
use bascule_pki::Authority;
use bascule_types::{
    Answer, Change, ClusterId, DiskRole, DiskRow, Epoch, Lba, NodeUid, Owner, RowName, VmRow, VmUid,
};
use bascule_volume_format::{RegionKind, Superblock};
use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};

/// The address of the last superblock in the lab's file of 64 MiB.
pub(crate) const LAST_COPY: Lba = Lba(63 * 256);

/// Timeout of every wait; generous, for a busy machine.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(60);

pub(crate) struct Lab {
    dir: tempfile::TempDir,
    authority: Authority,
    pub(crate) cluster: ClusterId,
}

impl Lab {
    /// A volume with a safe time of 8 s, in a file of 64 MiB, with fencing mode Watchdog and a fake
    /// hardware watchdog; node 1 is registered.
    pub(crate) fn new() -> Self {
        Self::with_fencing("watchdog")
    }

    pub(crate) fn with_fencing(fencing: &str) -> Self {
        let lab = Self::without_watchdog(fencing);
        lab.start_watchdog();
        lab
    }

    pub(crate) fn without_watchdog(fencing: &str) -> Self {
        let (authority, _) = Authority::create("test").unwrap();
        let lab = Self {
            dir: tempfile::tempdir().unwrap(),
            authority,
            cluster: ClusterId::random(),
        };
        let output = lab.format(&["--create", "64", "--fencing", fencing]);
        assert!(output.status.success(), "{output:?}");
        lab
    }

    pub(crate) fn format(&self, more: &[&str]) -> Output {
        let timing = [
            ["--lease-ms", "2000"],
            ["--watch-ms", "6000"],
            ["--poll-ms", "200"],
            ["--renewal-ms", "300"],
            ["--watchdog-ms", "1500"],
            ["--settle-ms", "500"],
        ];
        binary()
            .arg("format")
            .arg(self.device())
            .args(["--slots", "4", "--cluster", &self.cluster.to_string()])
            .args(["--first-node", &node(1).to_string()])
            .args(timing.iter().flatten())
            .args(more)
            .output()
            .unwrap()
    }

    pub(crate) fn device(&self) -> PathBuf {
        self.dir.path().join("volume.img")
    }

    pub(crate) fn check(&self) -> Output {
        binary().arg("check").arg(self.device()).output().unwrap()
    }

    /// Starts node `n` and returns when its gate is open.
    pub(crate) fn start(&self, n: u8) -> Node {
        let mut node = self.launch(n, &[]);
        node.wait_open();
        node
    }

    pub(crate) fn launch(&self, n: u8, more: &[&str]) -> Node {
        let tls = self.dir.path().join(format!("tls-{n}"));
        if !tls.exists() {
            std::fs::create_dir(&tls).unwrap();
            let identity = self.authority.issue_node(node(n)).unwrap();
            std::fs::write(tls.join("node.crt"), identity.certificate_pem).unwrap();
            std::fs::write(tls.join("node.key"), identity.key_pem).unwrap();
            std::fs::write(tls.join("ca.crt"), self.authority.certificate_pem()).unwrap();
        }
        let run_dir = self.dir.path().join(format!("run-{n}"));
        // SIGXFSZ is ignored, so that a write beyond a limit is an error: see
        // `limit_writes_to_heartbeats`.
        let child = Command::new("sh")
            .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
            .arg(env!("CARGO_BIN_EXE_bascule-volume"))
            .arg("serve")
            .arg("--device")
            .arg(self.device())
            .args(["--node-uid", &node(n).to_string()])
            .arg("--run-dir")
            .arg(&run_dir)
            .arg("--tls-dir")
            .arg(&tls)
            .args(["--listen", "127.0.0.1:0"])
            .arg("--watchdog-sock")
            .arg(self.watchdog_sock())
            .args(more)
            .env("RUST_LOG", "debug")
            .stderr(log_file(&self.dir.path().join(format!("log-{n}"))))
            .spawn()
            .unwrap();
        Node {
            n,
            child,
            run_dir,
            log: self.dir.path().join(format!("log-{n}")),
        }
    }

    /// The byte offset of a region.
    fn region(&self, kind: RegionKind) -> u64 {
        let file = std::fs::File::open(self.device()).unwrap();
        let mut block = [0; 4096];
        file.read_exact_at(&mut block, 0).unwrap();
        let superblock = Superblock::parse_copy(&block, Lba(0)).unwrap();
        superblock.region(kind).start.lba_to_bytes().unwrap().0
    }

    pub(crate) fn watchdog_sock(&self) -> PathBuf {
        self.dir.path().join("watchdog.sock")
    }

    /// A fake `bascule-watchdog` that grants every request.
    fn start_watchdog(&self) {
        let listener = UnixListener::bind(self.watchdog_sock()).unwrap();
        let serve = move || {
            for stream in listener.incoming().flatten() {
                let Ok(mut connection) = Connection::open(stream, TIMEOUT) else {
                    continue;
                };
                while connection.recv::<watchdog::Request>().is_ok() {
                    let status = watchdog::Response::Status {
                        kind: WatchdogKind::Hardware,
                        timeout_ms: 1500,
                        enlisted: Vec::new(),
                    };
                    if connection.send(&status, &[]).is_err() {
                        break;
                    }
                }
            }
        };
        // The thread ends with the test process.
        std::thread::Builder::new()
            .name("watchdog".into())
            .spawn(serve)
            .unwrap();
    }
}

pub(crate) fn node(n: u8) -> NodeUid {
    NodeUid::from_bytes([n; 16])
}

pub(crate) fn vm(n: u8) -> VmUid {
    VmUid::from_bytes([0xA0 + n; 16])
}

pub(crate) fn name(text: &str) -> RowName {
    RowName::new(text).unwrap()
}

fn open_request(row: &VmRow) -> Request {
    Request::OpenVm {
        vm: row.vm,
        owner: row.owner.unwrap(),
        epoch: row.epoch,
        pid: std::process::id(),
    }
}

pub(crate) fn binary() -> Command {
    Command::new(env!("CARGO_BIN_EXE_bascule-volume"))
}

fn log_file(path: &Path) -> Stdio {
    let file = std::fs::OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .unwrap();
    file.into()
}

/// One `bascule-volume` process; killed when dropped.
pub(crate) struct Node {
    pub(crate) n: u8,
    child: Child,
    pub(crate) run_dir: PathBuf,
    log: PathBuf,
}

impl Node {
    pub(crate) fn connect(&self) -> Option<Connection> {
        Connection::connect(&self.run_dir.join("volume.sock"), TIMEOUT).ok()
    }

    pub(crate) fn call(&self, request: &Request) -> Option<(Response, Vec<OwnedFd>)> {
        self.connect()?.call(request).ok()
    }

    pub(crate) fn status(&self) -> Option<VolumeStatus> {
        match self.call(&Request::Status)?.0 {
            Response::Status(status) => Some(status),
            _ => None,
        }
    }

    /// Waits until `done` is true for the result of `look`; panics after [`TIMEOUT`].
    pub(crate) fn wait<T>(
        &self,
        what: &str,
        look: impl Fn(&Self) -> Option<T>,
        done: impl Fn(&T) -> bool,
    ) -> T {
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let seen = look(self);
            match seen {
                Some(seen) if done(&seen) => return seen,
                _ if Instant::now() >= deadline => self.give_up(what),
                _ => std::thread::park_timeout(Duration::from_millis(50)),
            }
        }
    }

    pub(crate) fn give_up(&self, what: &str) -> ! {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        let tail = lines[lines.len().saturating_sub(60)..].join("\n");
        panic!(
            "node {}: timed out waiting for {what}; the end of its log:\n{tail}",
            self.n
        );
    }

    /// Waits until the process has logged `text`.
    pub(crate) fn wait_log(&self, text: &str) {
        let log = |node: &Self| std::fs::read_to_string(&node.log).ok();
        self.wait(text, log, |log| log.contains(text));
    }

    pub(crate) fn wait_status(
        &self,
        what: &str,
        done: impl Fn(&VolumeStatus) -> bool,
    ) -> VolumeStatus {
        self.wait(what, Self::status, done)
    }

    pub(crate) fn wait_open(&mut self) -> VolumeStatus {
        self.wait_status("an open gate", |status| {
            status.path == PathState::Direct && status.owner.is_some()
        })
    }

    /// This node's slot and generation.
    pub(crate) fn owner(&self) -> Owner {
        let status = self.wait_status("an owner", |status| status.owner.is_some());
        status.owner.unwrap()
    }

    /// Requests a change, and retries while the outcome is unknown.
    pub(crate) fn ask(&self, change: &Change) -> Response {
        let request = Request::Change(change.clone());
        let look = |node: &Self| node.call(&request).map(|(response, _)| response);
        self.wait("an answer", look, |response| {
            !matches!(response, Response::Unknown | Response::Unavailable { .. })
        })
    }

    pub(crate) fn grant(&self, change: &Change) -> Answer {
        match self.ask(change) {
            Response::Granted(answer) => answer,
            other => panic!("node {}: {change:?}: {other:?}", self.n),
        }
    }

    pub(crate) fn rows(&self) -> Rows {
        let look = |node: &Self| match node.call(&Request::Rows)?.0 {
            Response::Rows(rows) => Some(rows),
            _ => None,
        };
        self.wait("rows", look, |_| true)
    }

    pub(crate) fn row(&self, n: u8) -> VmRow {
        let rows = self.rows();
        rows.vms.into_iter().find(|row| row.vm == vm(n)).unwrap()
    }

    /// Creates VM `n` and acquires it for this node.
    pub(crate) fn create_and_own(&self, n: u8) -> VmRow {
        self.grant(&Change::CreateVm {
            vm: vm(n),
            name: name(&format!("shop/web-{n}")),
            spec_digest: [n; 32],
        });
        self.acquire(n, 0)
    }

    pub(crate) fn acquire(&self, n: u8, expected: u64) -> VmRow {
        let change = Change::Acquire {
            vm: vm(n),
            expected_epoch: Epoch(expected),
            to: self.owner(),
        };
        // The coordinator may not have seen this node's latest heartbeat.
        let look = |node: &Self| match node.ask(&change) {
            Response::Granted(Answer::Row(row)) => Some(row),
            _ => None,
        };
        self.wait("ownership", look, |_| true)
    }

    pub(crate) fn create_disk(&self, n: u8, disk: &str, mib: u32) -> DiskRow {
        let change = Change::CreateDisk {
            vm: vm(n),
            name: name(disk),
            size: bascule_types::Bytes::mib(mib),
            role: DiskRole::Data,
            importing: false,
        };
        match self.grant(&change) {
            Answer::Disk(row) => row,
            other => panic!("{other:?}"),
        }
    }

    pub(crate) fn open_vm(&self, row: &VmRow) -> (Response, Vec<OwnedFd>) {
        self.call(&open_request(row)).unwrap()
    }

    /// The request to open a VM, as JSON, for another process.
    pub(crate) fn open_request(&self, row: &VmRow) -> String {
        serde_json::to_string(&open_request(row)).unwrap()
    }

    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).unwrap();
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(i32::try_from(self.child.id()).unwrap()).unwrap()
    }

    /// Makes every write after the heartbeat, Paxos and leader blocks fail.
    pub(crate) fn limit_writes_to_heartbeats(&self, lab: &Lab) {
        self.limit_writes(Some(lab.region(RegionKind::Areas)));
    }

    /// Makes every write of a heartbeat and after the heartbeats fail; or, with `fail` false, none.
    pub(crate) fn fail_heartbeats(&self, lab: &Lab, fail: bool) {
        self.limit_writes(fail.then(|| lab.region(RegionKind::Heartbeats)));
    }

    fn limit_writes(&self, current: Option<u64>) {
        let maximum = None;
        let limit = Rlimit { current, maximum };
        prlimit(Some(self.pid()), Resource::Fsize, limit).unwrap();
    }

    /// Sends SIGKILL and waits for the process to exit.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Sends SIGTERM; returns whether the process exited with status 0.
    pub(crate) fn terminate(&mut self) -> bool {
        self.signal(Signal::TERM);
        self.ends_cleanly()
    }

    /// Waits for the process to exit; returns whether it did with status 0.
    pub(crate) fn ends_cleanly(&mut self) -> bool {
        self.child.wait().unwrap().success()
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // The process may have ended already.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
