//! The processes of this node that may have writes under way, kept in the run directory so that a
//! new `bascule-volume` knows them too.
//!
//! # A record
//! `writers/<vm>.<pid>.<start time>`: one line for each device that the process was handed
//! ([`Identity`]), and the line `unclean` once one of its writes failed. Releases before this one left
//! `<vm>.<pid>` with the start time in it, and had handed out a shared description of the device:
//! nothing proves that the writes of such a process are complete.
//!
//! `writer-pages/`, under the same names: each process's [`WriterPage`]. There is one for a process that
//! only reads, too: a migration's destination.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_types::{BootTime, VmUid, WriterState};
use bascule_volume_gate::{WriterPage, WriterView};
use bascule_volume_protocol::{Rules, WriterEvent, WriterId, WriterPhase, Writers};

use crate::block_device::Identity;
use crate::writer_lock::WriterLock;

/// Every writer: a `bascule-vm`, or importers of several disks at once.
#[derive(Debug)]
pub struct WriterTable {
    writers: Writers,
    processes: BTreeMap<WriterId, Process>,
    pages: BTreeMap<WriterId, WriterPage>,
    directory: PathBuf,
    page_directory: PathBuf,
}

#[derive(Clone, Debug, Default)]
struct Process {
    /// What it was handed; empty if that is not known.
    devices: Vec<Identity>,
    /// The record has the name that earlier releases gave it.
    is_old_record: bool,
    /// Since when the kernel has no request of it left.
    free_since: Option<BootTime>,
    /// The last answer about its lock, once it is dead.
    lock: Option<WriterLock>,
}

impl WriterTable {
    /// Forgets the writers of an earlier boot.
    ///
    /// # Errors
    /// The system's.
    pub fn remove_all(run_dir: &Path) -> io::Result<()> {
        for directory in ["writers", "writer-pages"] {
            match fs::remove_dir_all(run_dir.join(directory)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// The writers that an earlier process noted in `run_dir`.
    ///
    /// # Errors
    /// The system's.
    pub fn load(run_dir: &Path, rules: Rules) -> io::Result<Self> {
        let directory = run_dir.join("writers");
        let page_directory = run_dir.join("writer-pages");
        fs::create_dir_all(&directory)?;
        fs::create_dir_all(&page_directory)?;
        let mut table = Self {
            writers: Writers::new(rules),
            processes: BTreeMap::new(),
            pages: BTreeMap::new(),
            directory,
            page_directory,
        };
        for entry in fs::read_dir(&table.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let text = fs::read_to_string(entry.path())?;
            if let Some(writer) = name.to_str().and_then(|name| named(name, &text)) {
                table.writers = table.writers.next(writer, WriterEvent::Opened);
                if text.lines().any(|line| line == UNCLEAN) {
                    table.writers = table.writers.next(writer, WriterEvent::Failed);
                }
                let process = Process {
                    devices: text.lines().filter_map(Identity::parse).collect(),
                    is_old_record: name.to_str() == Some(&old_name(writer)),
                    ..Process::default()
                };
                table.processes.insert(writer, process);
            }
        }
        for entry in fs::read_dir(&table.page_directory)? {
            let name = entry?.file_name();
            if let Some(writer) = name.to_str().and_then(|name| named(name, "")) {
                table.page(writer)?;
            }
        }
        Ok(table)
    }

    /// A descriptor of the process's writer page, which is created if it is not there.
    ///
    /// # Errors
    /// The system's.
    pub fn page(&mut self, writer: WriterId) -> io::Result<OwnedFd> {
        let path = self.page_directory.join(name(writer));
        let (page, descriptor) = WriterPage::create(&path).map_err(io::Error::other)?;
        self.pages.insert(writer, page);
        Ok(descriptor)
    }

    /// Takes over what the writers' pages say of failed writes. Before every decision.
    pub fn read_pages(&mut self) {
        let pages = self.pages.iter();
        let failed = pages.filter(|(_, page)| page.view().state == WriterState::Unclean);
        let failed: Vec<WriterId> = failed.map(|(writer, _)| *writer).collect();
        for writer in failed {
            if let Err(error) = self.fail(writer) {
                tracing::error!(%error, "cannot record that a writer is unclean");
            }
        }
    }

    /// What the writer's page says, if it keeps one.
    fn view(&self, writer: WriterId) -> Option<WriterView> {
        let view = self.pages.get(&writer)?.view();
        view.attached.then_some(view)
    }

    /// Removes the pages of dead processes that are not writers.
    fn drop_pages(&mut self, lives: &dyn Fn(WriterId) -> bool) {
        let writers = &self.writers;
        let is_over = |writer: &WriterId| writers.phase(*writer).is_none() && !lives(*writer);
        let over: Vec<WriterId> = self.pages.keys().copied().filter(is_over).collect();
        for writer in over {
            let path = self.page_directory.join(name(writer));
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    tracing::warn!(%error, "cannot remove a writer page");
                }
                _ => drop(self.pages.remove(&writer)),
            }
        }
    }

    /// The writer is about to get `device`. Whether it is a new one.
    ///
    /// # Errors
    /// The system's; the process must not get it then.
    pub fn open(&mut self, writer: WriterId, device: Identity) -> io::Result<bool> {
        let is_new = !self.processes.contains_key(&writer);
        let mut process = self.processes.get(&writer).cloned().unwrap_or_default();
        if !process.devices.contains(&device) {
            process.devices.push(device);
            self.record(writer, &process)?;
        }
        self.processes.insert(writer, process);
        self.step(writer, WriterEvent::Opened);
        Ok(is_new)
    }

    /// The process closed its gate, and every write that it submitted has completed.
    ///
    /// # Errors
    /// The system's; the writer then counts as open. `PermissionDenied` for an unclean one.
    pub fn close(&mut self, writer: WriterId) -> io::Result<()> {
        self.read_pages();
        match self.writers.phase(writer) {
            None => Ok(()),
            Some(WriterPhase::Open) if self.view(writer).is_some_and(|view| view.active > 0) => {
                let what = format!("process {} has writes in flight", writer.pid);
                Err(io::Error::new(io::ErrorKind::ResourceBusy, what))
            }
            Some(WriterPhase::Open) => self.end(writer, WriterEvent::Closed),
            Some(phase) => {
                let reason = reason(writer, phase, None);
                Err(io::Error::new(io::ErrorKind::PermissionDenied, reason))
            }
        }
    }

    /// A write or flush of the writer failed, or its outcome is unknown.
    ///
    /// # Errors
    /// The system's: a restarted `bascule-volume` will not know it.
    pub fn fail(&mut self, writer: WriterId) -> io::Result<()> {
        let before = self.writers.phase(writer);
        self.step(writer, WriterEvent::Failed);
        if before.is_none() || before == Some(WriterPhase::Unclean) {
            return Ok(());
        }
        tracing::error!(vm = %writer.vm, pid = writer.pid, "a write failed: the writer is unclean");
        let process = self.processes.get(&writer).cloned().unwrap_or_default();
        self.record(writer, &process)
    }

    /// Notices processes that have ended without closing. Returns the writers of dead processes, for
    /// whose locks to ask, with what they were handed. `lives` says whether a process runs.
    pub fn note_dead(
        &mut self,
        lives: &dyn Fn(WriterId) -> bool,
    ) -> Vec<(WriterId, Vec<Identity>)> {
        self.read_pages();
        let open = self
            .writers
            .iter()
            .filter(|entry| entry.1 == WriterPhase::Open);
        let dead: Vec<WriterId> = open
            .map(|(writer, _)| writer)
            .filter(|writer| !lives(*writer))
            .collect();
        for writer in dead {
            tracing::warn!(vm = %writer.vm, pid = writer.pid, "a writer is gone without having closed");
            self.step(writer, WriterEvent::Died);
            if self.view(writer).is_some_and(WriterView::is_drained) {
                self.complete(writer);
            }
        }
        self.drop_pages(lives);
        let completing = self.writers.iter();
        let completing = completing.filter(|entry| entry.1 == WriterPhase::Completing);
        completing
            .map(|(writer, _)| {
                let process = self.processes.get(&writer);
                (
                    writer,
                    process
                        .map(|process| process.devices.clone())
                        .unwrap_or_default(),
                )
            })
            .collect()
    }

    /// What the kernel says at `now` about the lock of a dead writer. The writer is over when its lock
    /// has been free for `settle`: a request that the initiator gave up and answered with an error
    /// counts as completed for the kernel, and may land within that time.
    pub fn note_lock(
        &mut self,
        writer: WriterId,
        lock: WriterLock,
        now: BootTime,
        settle: Duration,
    ) {
        let Some(process) = self.processes.get_mut(&writer) else {
            return;
        };
        process.lock = Some(lock);
        match lock {
            WriterLock::Free => {
                let since = *process.free_since.get_or_insert(now);
                if now.since(since) < settle {
                    return;
                }
                self.complete(writer);
            }
            WriterLock::Held | WriterLock::NoProof => process.free_since = None,
        }
    }

    fn complete(&mut self, writer: WriterId) {
        match self.end(writer, WriterEvent::Completed) {
            Ok(()) => tracing::info!(vm = %writer.vm, pid = writer.pid, "its writes are complete"),
            Err(error) => tracing::warn!(%error, "cannot remove the record of a writer"),
        }
    }

    /// Whether no writer has a write in flight, and none has one that failed. True of a living writer only
    /// while its gate is closed for certain.
    pub fn are_all_drained(&mut self) -> bool {
        self.read_pages();
        self.writers.iter().all(|(writer, phase)| {
            let quiet =
                |view: WriterView| self.writers.is_quiet(phase, view.active == 0, view.state);
            self.view(writer).is_some_and(quiet)
        })
    }

    /// Whether this process is a writer already.
    #[must_use]
    pub fn is_known(&self, writer: WriterId) -> bool {
        self.writers.phase(writer).is_some()
    }

    /// Whether a writer is open, or one that was killed has writes in flight: an end is to be expected of
    /// either. A writer with a failed write stays until the node restarts.
    #[must_use]
    pub fn are_any_at_work(&self) -> bool {
        self.writers
            .iter()
            .any(|(_, phase)| phase != WriterPhase::Unclean)
    }

    /// Whether anything of this node may be written.
    #[must_use]
    pub fn must_be_watched(&self) -> bool {
        self.writers.must_be_watched()
    }

    /// Why a write of this VM's writers may land at any later time, in words for a person; none if
    /// none failed.
    #[must_use]
    pub fn why_unclean(&self, vm: VmUid) -> Option<String> {
        let mut unclean = self.writers.of(vm);
        let (writer, phase) = unclean.find(|entry| entry.1 == WriterPhase::Unclean)?;
        Some(reason(writer, phase, None))
    }

    /// Whether nothing of this VM's writer is under way.
    #[must_use]
    pub fn is_drained(&self, vm: VmUid) -> bool {
        self.writers.is_drained(vm)
    }

    /// Whether waiting may help: every writer of this VM is a dead process whose writes complete.
    #[must_use]
    pub fn is_completing(&self, vm: VmUid) -> bool {
        let mut phases = self.writers.of(vm).map(|(_, phase)| phase);
        phases.all(|phase| phase == WriterPhase::Completing)
    }

    /// Why this VM is not drained, in words for a person; none when it is.
    #[must_use]
    pub fn why_not_drained(&self, vm: VmUid) -> Option<String> {
        // The one that stays longest.
        let (writer, phase) = self.writers.of(vm).max_by_key(|(_, phase)| match phase {
            WriterPhase::Open => 0,
            WriterPhase::Completing => 1,
            WriterPhase::Unclean => 2,
        })?;
        Some(reason(writer, phase, self.lock(writer)))
    }

    /// Why `writer` may not open yet, and whether waiting may help; none when it may
    /// ([`Writers::before`]).
    #[must_use]
    pub fn why_not_opened(&self, writer: WriterId, shared: bool) -> Option<(String, bool)> {
        let (other, phase) = self.writers.before(writer, shared)?;
        let may_help = phase != WriterPhase::Unclean;
        Some((reason(other, phase, self.lock(other)), may_help))
    }

    fn lock(&self, writer: WriterId) -> Option<WriterLock> {
        self.processes.get(&writer)?.lock
    }

    /// Removes the record first: a writer that a later process still knows is the safe mistake.
    fn end(&mut self, writer: WriterId, event: WriterEvent) -> io::Result<()> {
        let mut names = vec![name(writer)];
        if self
            .processes
            .get(&writer)
            .is_some_and(|process| process.is_old_record)
        {
            names.push(old_name(writer));
        }
        for name in names {
            match fs::remove_file(self.directory.join(name)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        self.processes.remove(&writer);
        self.step(writer, event);
        Ok(())
    }

    fn record(&self, writer: WriterId, process: &Process) -> io::Result<()> {
        let mut text = String::new();
        for device in &process.devices {
            text.push_str(&format!("{device}\n"));
        }
        if self.writers.phase(writer) == Some(WriterPhase::Unclean) {
            text.push_str(UNCLEAN);
        }
        // Not half written: a record that is there is whole.
        let whole = self.directory.join(name(writer));
        let part = self.directory.with_extension("part");
        fs::write(&part, text)?;
        fs::rename(part, whole)
    }

    fn step(&mut self, writer: WriterId, event: WriterEvent) {
        self.writers = self.writers.clone().next(writer, event);
    }
}

fn reason(writer: WriterId, phase: WriterPhase, lock: Option<WriterLock>) -> String {
    let pid = writer.pid;
    match (phase, lock) {
        (WriterPhase::Open, _) => {
            format!("process {pid} of this VM has not closed its gate")
        }
        (WriterPhase::Unclean, _) => format!(
            "a write of process {pid} of this VM failed and may still land: restart this node, or \
             confirm that it is fenced"
        ),
        (WriterPhase::Completing, Some(WriterLock::NoProof)) => format!(
            "process {pid} of this VM ended, and nothing proves that its writes are complete: \
             restart this node, or confirm that it is fenced"
        ),
        (WriterPhase::Completing, _) => {
            format!("an earlier writer of this VM, process {pid}, has writes in flight")
        }
    }
}

fn name(WriterId { vm, pid, started }: WriterId) -> String {
    format!("{vm}.{pid}.{started}")
}

fn old_name(WriterId { vm, pid, .. }: WriterId) -> String {
    format!("{vm}.{pid}")
}

/// The writer whose record has this name and text.
fn named(name: &str, text: &str) -> Option<WriterId> {
    let (vm, rest) = name.split_once('.')?;
    let (pid, started) = match rest.split_once('.') {
        Some((pid, started)) => (pid, started.parse().ok()?),
        None => (rest, text.trim().parse().unwrap_or(0)),
    };
    Some(WriterId {
        vm: vm.parse().ok()?,
        pid: pid.parse().ok()?,
        started,
    })
}

/// The line of a record that says that a write failed.
const UNCLEAN: &str = "unclean";

#[cfg(test)]
mod tests;
