//! The last serial output of this node's VMs: of a running guest, of one that has ended, and of one whose process has
//! been removed.
//!
//! ```text
//!   console.log of the run directory ──the process is removed──► console-logs/UID
//!          │                                                         │
//!          └────────────── the last 256 KiB of both ◄────────────────┘
//! ```
//! A guest that came by a migration has brought its output along, which its process has written to its `console.log`:
//! what this node had kept of it is then forgotten.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result};
use bascule_ipc::vm::{CONSOLE_HISTORY_BYTES, StartMode};
use bascule_node_api::command::{Outcome, RejectReason};
use bascule_types::VmUid;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::supervisor::{Rejection, Supervisor};
use crate::files;

/// The end of a log, and when it was last written.
#[derive(Debug, Default, PartialEq, Eq)]
struct Tail {
    bytes: Vec<u8>,
    written: Option<SystemTime>,
}

impl Supervisor {
    /// The last output of a VM.
    pub(crate) fn read_console_log(&self, vm: VmUid) -> Result<Outcome, Rejection> {
        let tail = self.console_tail(vm)?;
        let Some(written) = tail.written else {
            let message = "no serial output of this VM is kept on this node";
            return Err(Rejection::new(RejectReason::VmNotHere, message));
        };
        let age = SystemTime::now().duration_since(written);
        let age = age.unwrap_or(Duration::ZERO).as_millis();
        Ok(Outcome::ConsoleLog {
            output: STANDARD.encode(tail.bytes),
            age_ms: u64::try_from(age).unwrap_or(u64::MAX),
        })
    }

    /// Keeps the last output of a process whose run directory is about to be removed.
    pub(super) fn keep_console_log(&self, vm: VmUid) -> Result<()> {
        if let Some(StartMode::Incoming { .. }) = self.start_mode(vm)
            && tail_of(&self.paths.vm(vm).join(LOG_FILE))?.bytes.is_empty()
        {
            // A destination that its guest has never reached says nothing about it.
            return Ok(());
        }
        let tail = self.console_tail(vm)?;
        if tail.bytes.is_empty() {
            return Ok(());
        }
        files::replace(&self.paths.console_log(vm), &tail.bytes, 0o600)?;
        remove_oldest(&self.paths.console_logs(), KEPT_MAX)
    }

    /// Forgets what is kept of a guest that came here with its output.
    pub(super) fn forget_console_log(&self, vm: VmUid) {
        match fs::remove_file(self.paths.console_log(vm)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(%vm, %error, "remove the kept console log");
            }
            _ => {}
        }
    }

    fn console_tail(&self, vm: VmUid) -> Result<Tail> {
        let present = tail_of(&self.paths.vm(vm).join(LOG_FILE))?;
        let whole = present.bytes.len() >= CONSOLE_HISTORY_BYTES;
        if whole || matches!(self.start_mode(vm), Some(mode) if mode != StartMode::Boot) {
            return Ok(present);
        }
        let kept = tail_of(&self.paths.console_log(vm))?;
        let mut bytes = [kept.bytes, present.bytes].concat();
        let excess = bytes.len().saturating_sub(CONSOLE_HISTORY_BYTES);
        drop(bytes.drain(..excess));
        Ok(Tail {
            bytes,
            written: present.written.max(kept.written),
        })
    }
}

/// The last 256 KiB of a file; nothing of one that does not exist.
fn tail_of(path: &Path) -> Result<Tail> {
    let read = || -> io::Result<Tail> {
        let file = File::open(path)?;
        for _ in 0..READS_MAX {
            let metadata = file.metadata()?;
            let length = metadata.size();
            let wanted = length.min(CONSOLE_HISTORY_BYTES as u64);
            let mut bytes = vec![0; usize::try_from(wanted).unwrap_or(0)];
            match file.read_exact_at(&mut bytes, length - wanted) {
                // Its writer has shortened it meanwhile.
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {}
                done => {
                    let written = Some(metadata.modified()?);
                    return done.map(|()| Tail { bytes, written });
                }
            }
        }
        Err(io::Error::other("it is shortened all the time"))
    };
    match read() {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Tail::default()),
        done => done.with_context(|| format!("read {}", path.display())),
    }
}

/// Removes the files that were written first, all but `kept` of them.
fn remove_oldest(folder: &Path, kept: usize) -> Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))?;
    let mut files: Vec<_> = entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    files.sort();
    for (_, path) in files.iter().take(files.len().saturating_sub(kept)) {
        fs::remove_file(path).with_context(|| format!("remove {}", path.display()))?;
    }
    Ok(())
}

/// The serial output, in a VM's run directory.
const LOG_FILE: &str = "console.log";
/// Kept logs: at most 16 MiB of the node's memory, in which the run directory lies.
const KEPT_MAX: usize = 64;
/// A log is shortened once in a MiB.
const READS_MAX: u32 = 4;

#[cfg(test)]
mod tests {
    use super::*;

    fn output(node: &Supervisor, vm: VmUid) -> String {
        match node.read_console_log(vm) {
            Ok(Outcome::ConsoleLog { output, .. }) => {
                String::from_utf8(STANDARD.decode(output).unwrap()).unwrap()
            }
            other => panic!("{other:?}"),
        }
    }

    /// The run directory of a process that has printed `text`.
    fn printed(node: &Supervisor, vm: VmUid, text: &str) {
        let run_dir = node.paths.vm(vm);
        fs::create_dir_all(&run_dir).unwrap();
        fs::write(run_dir.join(LOG_FILE), text).unwrap();
    }

    #[test]
    fn the_output_of_a_crashed_guest_is_kept_when_it_is_started_again() {
        let folder = tempfile::tempdir().unwrap();
        let node = Supervisor::test(folder.path());
        let vm = VmUid::random();
        let nothing = node.read_console_log(vm).unwrap_err();
        assert_eq!(nothing.reason, RejectReason::VmNotHere);
        printed(&node, vm, "Kernel panic\n");
        assert_eq!(output(&node, vm), "Kernel panic\n");
        node.collect_vm(vm, 0).unwrap();
        assert!(!node.paths.vm(vm).exists());
        assert_eq!(output(&node, vm), "Kernel panic\n");
        printed(&node, vm, "login: ");
        assert_eq!(output(&node, vm), "Kernel panic\nlogin: ");
        printed(&node, vm, &"x".repeat(CONSOLE_HISTORY_BYTES - 3));
        let all = output(&node, vm);
        assert_eq!(all.len(), CONSOLE_HISTORY_BYTES);
        assert!(all.starts_with("ic\nxx"));
    }

    #[test]
    fn the_oldest_kept_logs_make_room() {
        let folder = tempfile::tempdir().unwrap();
        for (age, name) in [(3, "c"), (1, "a"), (2, "b")] {
            let file = File::create(folder.path().join(name)).unwrap();
            let written = SystemTime::now() - Duration::from_secs(age);
            file.set_modified(written).unwrap();
        }
        remove_oldest(folder.path(), 2).unwrap();
        let mut left = Vec::new();
        for entry in fs::read_dir(folder.path()).unwrap() {
            left.push(entry.unwrap().file_name());
        }
        left.sort();
        assert_eq!(left, ["a", "b"]);
    }
}
