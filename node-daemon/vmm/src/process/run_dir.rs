//! The files of a VM's run directory: socket, log, console log, ownership and last state.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use bascule_ipc::vm::{LastState, StopReason, VmState};
use bascule_types::{Ownership, VmUid};
use serde::Serialize;

use super::bounded_log::BoundedLog;

/// A VM's run directory: the directory of its configuration file.
#[derive(Clone, Debug)]
pub(crate) struct RunDir(PathBuf);

impl RunDir {
    /// The run directory of the configuration file `config`.
    pub(crate) fn of(config: &Path) -> Self {
        let parent = config.parent().filter(|path| !path.as_os_str().is_empty());
        Self(parent.unwrap_or_else(|| Path::new(".")).to_owned())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.0.join("vm.sock")
    }

    /// The guest's serial output, for this user only: it may hold secrets.
    pub(crate) fn console_log(&self) -> io::Result<File> {
        let mut options = OpenOptions::new();
        let options = options.create(true).truncate(false).write(true).mode(0o600);
        options.open(self.0.join("console.log"))
    }

    /// This process's log.
    pub(super) fn log(&self) -> io::Result<File> {
        append_to(&self.log_path())
    }

    pub(super) fn log_path(&self) -> PathBuf {
        self.0.join("vm.log")
    }

    /// Sends this process's log to `vm.log`, at `info` unless `BASCULE_LOG` says otherwise.
    pub(crate) fn start_log(&self) -> io::Result<()> {
        let log = BoundedLog::new(append_to(&self.log_path())?)?;
        let filter = tracing_subscriber::EnvFilter::try_from_env("BASCULE_LOG")
            .unwrap_or_else(|_| "info".into());
        let logger = tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_ansi(false)
            .with_writer(Mutex::new(log))
            .try_init();
        logger.map_err(io::Error::other)
    }

    /// Replaces `state.json`, which `bascule-node` reads when the process has ended.
    pub(crate) fn write_state(&self, last: &LastState) {
        self.replace("state.json", last);
    }

    /// Replaces `ownership.json`, which `bascule-node` reads when the process was killed or does not
    /// respond.
    pub(crate) fn write_ownership(&self, ownership: &Ownership) {
        self.replace("ownership.json", ownership);
    }

    /// A failure is only logged: no decision about ownership depends on these files.
    fn replace(&self, name: &str, content: &impl Serialize) {
        let (next, path) = (self.0.join(format!("{name}.new")), self.0.join(name));
        let written = serde_json::to_vec(content)
            .map_err(io::Error::from)
            .and_then(|text| std::fs::write(&next, text))
            .and_then(|()| std::fs::rename(&next, &path));
        if let Err(error) = written {
            tracing::warn!(%error, "cannot write {name}");
        }
    }

    /// From now on a panic of any thread writes its message to `state.json` and aborts the process: a
    /// guest must not run on after a broken invariant.
    pub(crate) fn report_panics(&self, uid: VmUid) {
        let run_dir = self.clone();
        std::panic::set_hook(Box::new(move |panic| {
            let what = panic.to_string();
            tracing::error!(what, "panic");
            let state = VmState::Stopped(StopReason::Failed { what });
            run_dir.write_state(&LastState { uid, state });
            std::process::abort();
        }));
    }
}

/// Writes `message` to standard error, for failures before there is a log.
pub(super) fn print_error(message: &str) {
    if let Err(error) = writeln!(io::stderr(), "{message}") {
        tracing::debug!(%error, "standard error is closed");
    }
}

fn append_to(path: &Path) -> io::Result<File> {
    let mut options = OpenOptions::new();
    options.create(true).read(true).append(true).open(path)
}
