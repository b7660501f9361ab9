//! The processes of this node that may have writes in flight. The table is kept in the run
//! directory, so that a new `bascule-volume` process knows them too.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_types::{BootTime, VmUid};
use bascule_volume_protocol::{Rules, WriterEvent, Writers};

/// The writers of every VM: its `bascule-vm`, or one importer per disk.
#[derive(Debug)]
pub struct WriterTable {
    writers: Writers,
    processes: BTreeMap<(VmUid, u32), Process>,
    directory: PathBuf,
}

#[derive(Clone, Copy, Debug)]
struct Process {
    /// Start time, in clock ticks after boot: distinguishes it from a later process with the same
    /// id.
    started: u64,
    /// When this process found it dead without having closed.
    gone: Option<BootTime>,
}

impl WriterTable {
    /// Removes the writers of an earlier boot.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn remove_all(run_dir: &Path) -> io::Result<()> {
        match fs::remove_dir_all(run_dir.join("writers")) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Loads the writers that an earlier process recorded in `run_dir`.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn load(run_dir: &Path) -> io::Result<Self> {
        let directory = run_dir.join("writers");
        fs::create_dir_all(&directory)?;
        let mut table = Self {
            writers: Writers::new(Rules::ENFORCED),
            processes: BTreeMap::new(),
            directory,
        };
        for entry in fs::read_dir(&table.directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let parts = name.to_str().and_then(|name| name.split_once('.'));
            if let Some((vm, pid)) = parts
                && let (Ok(vm), Ok(pid)) = (vm.parse(), pid.parse())
            {
                let started = fs::read_to_string(entry.path())?.trim().parse();
                table.insert(vm, pid, started.unwrap_or(0));
            }
        }
        Ok(table)
    }

    /// Records a process that is about to get the device for this VM. Returns whether it is new.
    ///
    /// # Errors
    /// Those of the file system; the process must then not get the device.
    pub fn open(&mut self, vm: VmUid, pid: u32) -> io::Result<bool> {
        let fresh = !self.processes.contains_key(&(vm, pid));
        let started = start_time(pid).unwrap_or(0);
        fs::write(self.file(vm, pid), started.to_string())?;
        self.insert(vm, pid, started);
        Ok(fresh)
    }

    /// The process closed its gate, and every write that it submitted has completed.
    ///
    /// # Errors
    /// Those of the file system; the writer then still counts as open.
    pub fn close(&mut self, vm: VmUid, pid: u32) -> io::Result<()> {
        if !self.processes.contains_key(&(vm, pid)) {
            return Ok(());
        }
        self.forget(vm, pid)?;
        if self.of(vm).all(|gone| gone.is_some()) {
            let drained = self.of(vm).next().is_none();
            self.step(WriterEvent::Closed { vm, drained });
        }
        Ok(())
    }

    /// Detects processes that died without closing, and settles those that have been dead for
    /// `settle` while `idle`: the kernel has no write in flight on the device.
    pub fn reap(&mut self, now: BootTime, settle: Duration, idle: bool) {
        let keys: Vec<(VmUid, u32)> = self.processes.keys().copied().collect();
        for (vm, pid) in keys {
            let Some(process) = self.processes.get_mut(&(vm, pid)) else {
                continue;
            };
            match process.gone {
                None if start_time(pid) != Some(process.started) => {
                    tracing::warn!(%vm, pid, "a writer died without closing: its writes may still land");
                    process.gone = Some(now);
                    if self.of(vm).all(|gone| gone.is_some()) {
                        let drained = false;
                        self.step(WriterEvent::Closed { vm, drained });
                    }
                }
                Some(gone) if idle && now.since(gone) >= settle => {
                    self.settle(vm, pid);
                }
                _ => {}
            }
        }
    }

    fn settle(&mut self, vm: VmUid, pid: u32) {
        if self.forget(vm, pid).is_ok() && self.of(vm).next().is_none() {
            tracing::info!(%vm, pid, "the writes of a dead writer have settled");
            self.step(WriterEvent::Settled(vm));
        }
    }

    /// Whether a write of this node may be submitted or in flight.
    #[must_use]
    pub fn must_be_watched(&self) -> bool {
        self.writers.must_be_watched()
    }

    /// Whether every write of this VM has completed.
    #[must_use]
    pub fn is_drained(&self, vm: VmUid) -> bool {
        self.writers.is_drained(vm)
    }

    /// Whether a process died without closing and has not settled.
    #[must_use]
    pub fn has_gone(&self) -> bool {
        self.processes
            .values()
            .any(|process| process.gone.is_some())
    }

    /// Whether a live process of this VM has not closed.
    #[must_use]
    pub fn is_held(&self, vm: VmUid) -> bool {
        self.of(vm).any(|gone| gone.is_none())
    }

    /// For each process of this VM: when it was found dead, or `None` while it lives.
    fn of(&self, vm: VmUid) -> impl Iterator<Item = Option<BootTime>> {
        let of_vm = self.processes.iter().filter(move |(key, _)| key.0 == vm);
        of_vm.map(|(_, process)| process.gone)
    }

    fn file(&self, vm: VmUid, pid: u32) -> PathBuf {
        self.directory.join(format!("{vm}.{pid}"))
    }

    fn insert(&mut self, vm: VmUid, pid: u32, started: u64) {
        let gone = None;
        self.processes.insert((vm, pid), Process { started, gone });
        self.step(WriterEvent::Opened(vm));
    }

    fn forget(&mut self, vm: VmUid, pid: u32) -> io::Result<()> {
        match fs::remove_file(self.file(vm, pid)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        self.processes.remove(&(vm, pid));
        Ok(())
    }

    fn step(&mut self, event: WriterEvent) {
        self.writers = self.writers.clone().next(event);
    }
}

/// When a process started, in clock ticks after boot; `None` if there is no such process. A zombie
/// counts as ended: its descriptors are closed.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // proc_pid_stat(5): the name, field 2, may hold anything; state is field 3, start time 22.
    let (_, rest) = stat.rsplit_once(") ")?;
    let mut fields = rest.split(' ');
    let state = fields.next()?;
    let started = fields.nth(18)?.parse().ok()?;
    (!state.starts_with(['Z', 'X'])).then_some(started)
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmUid = VmUid::from_bytes([1; 16]);
    const SETTLE: Duration = Duration::from_secs(4);

    fn at(seconds: u64) -> BootTime {
        BootTime(0).after(Duration::from_secs(seconds))
    }

    #[test]
    fn a_new_process_knows_the_writers_of_the_previous_process() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        table.open(VM, std::process::id()).unwrap();
        let mut next = WriterTable::load(run_dir.path()).unwrap();
        assert!(next.must_be_watched() && !next.is_drained(VM));
        next.close(VM, std::process::id()).unwrap();
        assert!(!WriterTable::load(run_dir.path()).unwrap().must_be_watched());
    }

    #[test]
    fn a_dead_writer_counts_as_open_until_its_writes_have_settled() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        table.open(VM, pid).unwrap();
        table.reap(at(10), SETTLE, true);
        table.reap(at(13), SETTLE, true);
        assert!(!table.is_drained(VM), "settle has not passed");
        table.reap(at(15), SETTLE, false);
        assert!(!table.is_drained(VM), "the device has a write in flight");
        table.reap(at(16), SETTLE, true);
        assert!(table.is_drained(VM));
    }

    #[test]
    fn a_later_process_with_the_same_id_is_another_writer() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        let pid = std::process::id();
        table.open(VM, pid).unwrap();
        fs::write(table.file(VM, pid), "1").unwrap();
        let mut next = WriterTable::load(run_dir.path()).unwrap();
        next.reap(at(10), SETTLE, true);
        assert!(!next.is_held(VM) && !next.is_drained(VM));
        next.reap(at(14), SETTLE, true);
        assert!(next.is_drained(VM));
    }

    #[test]
    fn two_importers_of_one_vm_are_two_writers() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        table.open(VM, 1).unwrap();
        table.open(VM, std::process::id()).unwrap();
        table.close(VM, 1).unwrap();
        assert!(!table.is_drained(VM));
        table.close(VM, std::process::id()).unwrap();
        assert!(table.is_drained(VM));
    }

    #[test]
    fn a_live_writer_is_never_settled() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        table.open(VM, std::process::id()).unwrap();
        table.reap(at(10), SETTLE, true);
        table.reap(at(99), SETTLE, true);
        assert!(table.must_be_watched());
    }
}
