//! The hostile guest (`e2e/probe/src/hostile.rs`) on a shared volume, led step by step: it is started again after each
//! end that a guest may bring about, and anything else is an error.

use std::fs;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bascule_ipc::vm::{Request, Response, StopReason, VmState};
use bascule_types::{Change, VmRow};

use crate::{TestCluster, TestNode, TestVm, VmOnVolume, wait_for};

/// The guest with the process in which it is, if it is in one.
#[derive(Debug)]
pub struct HostileGuest<'a> {
    cluster: &'a TestCluster,
    node: &'a TestNode,
    vm: VmOnVolume,
    running: Option<Running>,
    tally: Tally,
}

/// What has come of the guest so far.
#[derive(Clone, Debug, Default)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Tally {
    pub starts: u32,
    pub resets: u32,
    /// How often it was reset because it had stopped to say anything.
    pub hangs: u32,
    pub pauses: u32,
    /// For each process of it that has ended, why.
    pub ends: Vec<StopReason>,
    /// The most memory beyond the guest's own that one of its processes had, in KiB.
    pub memory_kib_max: u64,
    /// The longest log of one of its processes, in bytes.
    pub log_bytes_max: u64,
}

#[derive(Debug)]
struct Running {
    vm: TestVm,
    console: UnixStream,
    said_rx: Receiver<Said>,
    /// The resets of this process that the tally has.
    resets: u32,
    heard: Instant,
}

/// What the guest says on its console.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Said {
    /// It asks for its work.
    Boot,
    /// It has begun this step; with a word that follows, the step ends the machine.
    At(u64, bool),
    /// It waits for more.
    Done,
}

impl<'a> HostileGuest<'a> {
    /// The guest of `vm`, which is off.
    #[must_use]
    pub fn new(cluster: &'a TestCluster, node: &'a TestNode, vm: VmOnVolume) -> Self {
        Self {
            cluster,
            node,
            vm,
            running: None,
            tally: Tally::default(),
        }
    }

    /// Its VM's row on the volume.
    ///
    /// # Errors
    /// When there is no coordinator, or no row.
    pub fn row(&self) -> Result<VmRow> {
        let rows = self.node.rows()?.vms;
        let row = rows.into_iter().find(|row| row.vm == self.vm.uid);
        row.context("the volume has no such VM")
    }

    /// What has come of it so far.
    #[must_use]
    pub const fn tally(&self) -> &Tally {
        &self.tally
    }

    /// Has the guest take the steps from `first` to `end`, and looks about once a second at what it may use, and at
    /// whatever `others` looks at.
    ///
    /// # Errors
    /// When its process ends otherwise than by a guest's doing, uses more than it may, or `others` finds fault.
    pub fn attack(
        &mut self,
        first: u64,
        end: u64,
        mut others: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        let mut next = first;
        let mut looked = Instant::now();
        loop {
            if self.running.is_none() {
                self.start()?;
            }
            match self.listen()? {
                Some(Said::Boot) => {
                    self.order(next, end)?;
                    // Not the same steps again, if it says nothing before its end.
                    next = (next / LINE_STEPS + 1) * LINE_STEPS;
                }
                Some(Said::At(step, is_last)) => {
                    next = if is_last { step + 1 } else { step + LINE_STEPS };
                }
                Some(Said::Done) => return self.look(),
                None => {}
            }
            if looked.elapsed() > LOOK_PERIOD {
                looked = Instant::now();
                self.look()?;
                self.pause_and_resume()?;
                others()?;
            }
            if next >= end && self.running.is_none() {
                return Ok(());
            }
        }
    }

    /// Has the guest go on from step `first` without an end.
    ///
    /// # Errors
    /// When its process does not start.
    pub fn let_loose(&mut self, first: u64) -> Result<()> {
        if self.running.is_some() {
            return self.order(first, u64::MAX);
        }
        self.start()?;
        let running = self.running.as_mut().context("it has just been started")?;
        running.wait_boot()?;
        self.order(first, u64::MAX)
    }

    /// Stops the guest in the middle of whatever it does, and checks that its disk is released.
    ///
    /// # Errors
    /// When it does not stop, for this reason or one of its own.
    pub fn stop(&mut self) -> Result<()> {
        let mut running = self.running.take().context("it does not run")?;
        match running.vm.ask(&Request::Stop)? {
            Response::Accepted | Response::Refused { .. } => {}
            other => bail!("Stop was answered by {other:?}"),
        }
        let reason = running.vm.wait_stopped(SOON)?;
        if reason != StopReason::Requested {
            ensure_by_guest(&reason)?;
        }
        self.ended(running, reason)
    }

    /// Kills the process of the guest in the middle of whatever it does, and has its disk released.
    ///
    /// # Errors
    /// When it cannot be released.
    pub fn kill(&mut self) -> Result<()> {
        let mut running = self.running.take().context("it does not run")?;
        running.vm.process().kill()?;
        let row = self.row()?;
        // None, when the guest has ended right before.
        let Some(from) = row.owner else {
            return Ok(());
        };
        let (vm, epoch) = (row.vm, row.epoch);
        let release = Change::Release { vm, from, epoch };
        wait_for("the release of a killed guest's disk", SOON, || {
            Ok(self.node.change(release.clone()).ok().map(drop))
        })?;
        let owner = self.row()?.owner;
        ensure!(owner.is_none(), "it is still owned by {owner:?}");
        Ok(())
    }

    fn start(&mut self) -> Result<()> {
        let epoch = self.row()?.epoch;
        let mut vm = self.cluster.boot(self.node, &self.vm, epoch)?;
        let console = vm.console()?;
        let (said_tx, said_rx) = sync_channel(SAID_MAX);
        let reading = console.try_clone().context("share the console")?;
        std::thread::Builder::new()
            .name("hostile-console".into())
            .spawn(move || read_console(reading, &said_tx))
            .context("start a thread")?;
        self.running = Some(Running {
            vm,
            console,
            said_rx,
            resets: 0,
            heard: Instant::now(),
        });
        self.tally.starts += 1;
        Ok(())
    }

    fn order(&mut self, first: u64, end: u64) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let line = format!("from {first} to {end}\n");
        match running.console.write_all(line.as_bytes()) {
            // It has ended meanwhile, which `listen` finds.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(()),
            typed => typed.context("type on the console"),
        }
    }

    /// Waits for a moment for what the guest says. When it has ended, its process is brought to an end too.
    fn listen(&mut self) -> Result<Option<Said>> {
        let Some(running) = &mut self.running else {
            return Ok(None);
        };
        match running.said_rx.recv_timeout(LISTEN_TIME) {
            Ok(said) => {
                running.heard = Instant::now();
                return Ok(Some(said));
            }
            Err(RecvTimeoutError::Timeout) => {}
            // Its console has ended: it is about to.
            Err(RecvTimeoutError::Disconnected) => std::thread::sleep(LISTEN_TIME),
        }
        running.ensure_alive()?;
        let status = running.vm.status()?;
        self.tally.resets += status.resets.count - running.resets;
        running.resets = status.resets.count;
        let is_paused = status.state == VmState::Paused;
        if let VmState::Stopped(reason) = status.state {
            ensure_by_guest(&reason).with_context(|| running.log_end())?;
            if let Some(running) = self.running.take() {
                self.ended(running, reason)?;
            }
            return Ok(None);
        }
        // A pause that was granted late.
        if is_paused {
            running.vm.ask(&Request::Resume)?;
        }
        let hangs = running.heard.elapsed() > HANG_TIME;
        if hangs || status.resets.waits.is_some() {
            self.tally.hangs += u32::from(hangs);
            running.heard = Instant::now();
            // It is refused while the guest ends or resets itself.
            running.vm.ask(&Request::Reset)?;
        }
        Ok(None)
    }

    fn ended(&mut self, mut running: Running, reason: StopReason) -> Result<()> {
        self.tally.note(&mut running)?;
        self.tally.ends.push(reason);
        let status = running.vm.exit(SOON)?;
        ensure!(status.success(), "{status}: {}", running.log_end());
        let owner = self.row()?.owner;
        ensure!(owner.is_none(), "it has ended, and is owned by {owner:?}");
        Ok(())
    }

    /// Looks at what the process uses.
    fn look(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        running.ensure_alive()?;
        self.tally.note(running)
    }

    /// Pauses the guest in the middle of whatever it does, and lets it go on.
    fn pause_and_resume(&mut self) -> Result<()> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        // It is refused while the guest ends or resets itself.
        if running.vm.ask(&Request::Pause)? != Response::Accepted {
            return Ok(());
        }
        wait_for("a pause", SOON, || {
            let status = running.vm.status()?;
            // A reset of its own has the pause given up.
            let resets = status.resets;
            let is_reset = resets.count > running.resets || resets.waits.is_some();
            let over = status.state != VmState::Running || is_reset;
            Ok(over.then_some(()))
        })
        .with_context(|| running.log_end())?;
        if running.vm.ask(&Request::Resume)? == Response::Accepted {
            self.tally.pauses += 1;
        }
        Ok(())
    }
}

impl Running {
    fn wait_boot(&mut self) -> Result<()> {
        wait_for("the guest's question for its work", SOON, || {
            self.ensure_alive()?;
            Ok(self
                .said_rx
                .try_recv()
                .ok()
                .filter(|said| *said == Said::Boot))
        })?;
        Ok(())
    }

    fn ensure_alive(&mut self) -> Result<()> {
        match self.vm.process().ended()? {
            Some(status) => bail!("bascule-vm ended with {status}: {}", self.log_end()),
            None => Ok(()),
        }
    }

    /// The end of the process's log.
    fn log_end(&self) -> String {
        let log = self.vm.log();
        let lines: Vec<&str> = log.lines().collect();
        let shown = lines.len().saturating_sub(LOG_LINES_SHOWN);
        lines.get(shown..).unwrap_or_default().join("\n")
    }
}

impl Tally {
    /// Notes what the process uses.
    ///
    /// # Errors
    /// When that is more than it may.
    fn note(&mut self, running: &mut Running) -> Result<()> {
        let length = |name: &str| {
            let path = running.vm.directory().join(name);
            fs::metadata(&path).map_or(0, |data| data.len())
        };
        let log = length("vm.log") + length("test.log");
        self.log_bytes_max = self.log_bytes_max.max(log);
        ensure!(
            log <= LOG_BYTES_MAX,
            "{log} bytes of log: {}",
            running.log_end()
        );
        let console = length("console.log");
        ensure!(console <= CONSOLE_BYTES_MAX, "{console} bytes of console");
        let memory = running.vm.process().resident_kib_beyond_guest()?;
        self.memory_kib_max = self.memory_kib_max.max(memory);
        ensure!(memory <= MEMORY_KIB_MAX, "{memory} KiB beyond the guest's");
        Ok(())
    }
}

/// That a guest may end its process for this reason.
fn ensure_by_guest(reason: &StopReason) -> Result<()> {
    match reason {
        StopReason::GuestShutdown | StopReason::GuestFault { .. } => Ok(()),
        _ => bail!("the guest has brought its process to {reason:?}"),
    }
}

/// Passes on what the guest says until the console ends. The rest of its output is garbage.
fn read_console(console: UnixStream, said_tx: &SyncSender<Said>) {
    let mut reader = BufReader::new(console);
    loop {
        let mut line = Vec::new();
        let read = reader
            .by_ref()
            .take(LINE_BYTES_MAX)
            .read_until(b'\n', &mut line);
        if !read.is_ok_and(|length| length > 0) {
            return;
        }
        let text = String::from_utf8_lossy(&line);
        if let Some(said) = Said::parse(text.trim_end())
            && said_tx.send(said).is_err()
        {
            return;
        }
    }
}

impl Said {
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.strip_prefix("hostile ")?.split(' ');
        match (words.next()?, words.next()?.parse().ok()?) {
            ("boot", _) => Some(Self::Boot),
            ("at", step) => Some(Self::At(step, words.next().is_some())),
            ("done", _) => Some(Self::Done),
            _ => None,
        }
    }
}

/// Longer than anything takes on a busy machine.
const SOON: Duration = Duration::from_secs(60);
const LISTEN_TIME: Duration = Duration::from_millis(100);
const LOOK_PERIOD: Duration = Duration::from_secs(1);
/// Steps between two lines of the guest, which take milliseconds.
const LINE_STEPS: u64 = 64;
/// A guest that has said nothing for this long has shot itself in the foot.
const HANG_TIME: Duration = Duration::from_secs(5);
const SAID_MAX: usize = 4096;
const LINE_BYTES_MAX: u64 = 256;
const LOG_LINES_SHOWN: usize = 60;
/// Bounce buffers are bounded by 32 MiB and one request, and that by 32 MiB. The rest is a process without them.
const MEMORY_KIB_MAX: u64 = 96 << 10;
/// Some lines for each reset, many times over: less than what the log is cut to.
const LOG_BYTES_MAX: u64 = 64 << 10;
/// The console's log is shortened at 1 MiB.
const CONSOLE_BYTES_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_guest_says_is_told_from_garbage() {
        assert_eq!(Said::parse("hostile boot 7"), Some(Said::Boot));
        assert_eq!(Said::parse("hostile at 64"), Some(Said::At(64, false)));
        assert_eq!(Said::parse("hostile at 65 reset"), Some(Said::At(65, true)));
        assert_eq!(Said::parse("hostile done 9"), Some(Said::Done));
        for garbage in [
            "",
            "hostile",
            "hostile at",
            "hostile at x",
            "xhostile at 1",
            "hostile to 1",
        ] {
            assert_eq!(Said::parse(garbage), None, "{garbage}");
        }
    }
}
