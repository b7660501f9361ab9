//! The processes of this node that may have writes under way, kept in the run directory so that a
//! new `bascule-volume` knows them too.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bascule_types::{BootTime, VmUid};
use bascule_volume_protocol::{Rules, WriterEvent, Writers};

/// Every writer and its processes: a `bascule-vm`, or importers of several disks at once.
#[derive(Debug)]
pub struct WriterTable {
    writers: Writers,
    /// By VM and process id; since when it is gone without having closed.
    processes: BTreeMap<(VmUid, u32), Option<BootTime>>,
    directory: PathBuf,
}

impl WriterTable {
    /// The writers that an earlier process noted in `run_dir`.
    ///
    /// # Errors
    /// The system's.
    pub fn load(run_dir: &Path) -> io::Result<Self> {
        let directory = run_dir.join("writers");
        fs::create_dir_all(&directory)?;
        let mut table = Self {
            writers: Writers::new(Rules::ENFORCED),
            processes: BTreeMap::new(),
            directory,
        };
        for entry in fs::read_dir(&table.directory)? {
            let name = entry?.file_name();
            let parts = name.to_str().and_then(|name| name.split_once('.'));
            if let Some((vm, pid)) = parts
                && let (Ok(vm), Ok(pid)) = (vm.parse(), pid.parse())
            {
                table.insert(vm, pid);
            }
        }
        Ok(table)
    }

    /// A process is about to get the device for this VM. Whether it had not got it before.
    ///
    /// # Errors
    /// The system's; the process must not get it then.
    pub fn open(&mut self, vm: VmUid, pid: u32) -> io::Result<bool> {
        let fresh = !self.processes.contains_key(&(vm, pid));
        fs::write(self.file(vm, pid), "")?;
        self.insert(vm, pid);
        Ok(fresh)
    }

    /// The process closed its gate, and every write that it submitted has completed.
    ///
    /// # Errors
    /// The system's; the writer then counts as open.
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

    /// Notices processes that are gone without having closed, and settles those of which nothing
    /// can be in flight any more: gone for `settle`, and since then `quiet` (the kernel has no
    /// write in flight on the device).
    pub fn reap(&mut self, now: BootTime, settle: Duration, quiet: bool) {
        let keys: Vec<(VmUid, u32)> = self.processes.keys().copied().collect();
        for (vm, pid) in keys {
            match self.processes.get(&(vm, pid)) {
                Some(None) if !is_alive(pid) => {
                    tracing::warn!(%vm, pid, "a writer is gone without having closed");
                    self.processes.insert((vm, pid), Some(now));
                    if self.of(vm).all(|gone| gone.is_some()) {
                        let drained = false;
                        self.step(WriterEvent::Closed { vm, drained });
                    }
                }
                Some(Some(gone)) if quiet && now.since(*gone) >= settle => {
                    self.settle(vm, pid);
                }
                _ => {}
            }
        }
    }

    fn settle(&mut self, vm: VmUid, pid: u32) {
        if self.forget(vm, pid).is_ok() && self.of(vm).next().is_none() {
            tracing::info!(%vm, pid, "its writes have settled");
            self.step(WriterEvent::Settled(vm));
        }
    }

    /// Whether anything of this node may be written.
    #[must_use]
    pub fn must_be_watched(&self) -> bool {
        self.writers.must_be_watched()
    }

    /// Whether nothing of this VM's writer is under way.
    #[must_use]
    pub fn is_drained(&self, vm: VmUid) -> bool {
        self.writers.is_drained(vm)
    }

    /// Whether a process of this VM lives that has not closed.
    #[must_use]
    pub fn is_held(&self, vm: VmUid) -> bool {
        self.of(vm).any(Option::is_none)
    }

    fn of(&self, vm: VmUid) -> impl Iterator<Item = &Option<BootTime>> {
        let processes = self.processes.iter();
        processes
            .filter(move |(key, _)| key.0 == vm)
            .map(|(_, gone)| gone)
    }

    fn file(&self, vm: VmUid, pid: u32) -> PathBuf {
        self.directory.join(format!("{vm}.{pid}"))
    }

    fn insert(&mut self, vm: VmUid, pid: u32) {
        self.processes.insert((vm, pid), None);
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

/// A process that is a zombie has ended: its descriptors are closed.
fn is_alive(pid: u32) -> bool {
    let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
        return false;
    };
    let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
    !state.is_some_and(|rest| rest.starts_with(['Z', 'X']))
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
    fn a_new_process_knows_the_writers_of_the_one_before() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        table.open(VM, std::process::id()).unwrap();
        let mut next = WriterTable::load(run_dir.path()).unwrap();
        assert!(next.must_be_watched() && !next.is_drained(VM));
        next.close(VM, std::process::id()).unwrap();
        assert!(!WriterTable::load(run_dir.path()).unwrap().must_be_watched());
    }

    #[test]
    fn a_writer_that_died_counts_until_its_writes_have_settled() {
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
    fn a_living_writer_is_left_alone() {
        let run_dir = tempfile::tempdir().unwrap();
        let mut table = WriterTable::load(run_dir.path()).unwrap();
        table.open(VM, std::process::id()).unwrap();
        table.reap(at(10), SETTLE, true);
        table.reap(at(99), SETTLE, true);
        assert!(table.must_be_watched());
    }
}
