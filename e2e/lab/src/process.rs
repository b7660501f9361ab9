//! Process identity: process id plus start time, because process ids are reused.

use std::fs::{self, File, OpenOptions};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use crate::cgroup::Cgroup;
use crate::command::named_thread;
use crate::tools::lab_binary;

/// A process, distinguished from a later one with the same number by its start time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pid: i32,
    /// Field 22 of /proc/PID/stat, clock ticks since boot.
    start: u64,
}

impl ProcessId {
    /// The identity of the process that has number `pid` now.
    pub fn of(pid: i32) -> Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))
            .with_context(|| format!("process {pid} is gone"))?;
        let (state, start) = parse_stat(&stat).context("read /proc/PID/stat")?;
        if state == 'Z' {
            return Err(anyhow!("process {pid} has ended"));
        }
        Ok(Self { pid, start })
    }

    /// Its number, in the PID namespace of the lab.
    pub fn pid(self) -> i32 {
        self.pid
    }

    /// Whether it still runs (or is stopped): zombies do not count.
    pub fn alive(self) -> bool {
        Self::of(self.pid).is_ok_and(|now| now == self)
    }

    /// Sends it a signal. Does nothing if it has ended.
    pub fn signal(self, signal: Signal) -> Result<()> {
        if !self.alive() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.pid).context("process id 0")?;
        match kill_process(pid, signal) {
            Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("signal process {}", self.pid)),
        }
    }
}

/// A long-running process of a lab, outliving the process that starts it.
#[derive(Debug)]
pub struct Daemon {
    cgroup: String,
    netns: Option<String>,
    log: PathBuf,
    argv: Vec<String>,
}

impl Daemon {
    /// `argv` in the cgroup `cgroup`, writing to the file `log`.
    pub fn new<S: Into<String>>(
        cgroup: impl Into<String>,
        log: &Path,
        argv: impl IntoIterator<Item = S>,
    ) -> Self {
        let argv = argv.into_iter().map(Into::into).collect();
        Self {
            cgroup: cgroup.into(),
            netns: None,
            log: log.to_owned(),
            argv,
        }
    }

    /// In this network namespace.
    pub fn in_netns(mut self, netns: String) -> Self {
        self.netns = Some(netns);
        self
    }

    /// Starts it in its own session, with standard output and error to the log.
    pub fn start(self) -> Result<ProcessId> {
        let log = OpenOptions::new().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        let mut command = Command::new(lab_binary()?);
        command.args(["launch", "--cgroup", &self.cgroup]);
        if let Some(netns) = &self.netns {
            command.args(["--netns", netns]);
        }
        command.arg("--").args(&self.argv).stdin(Stdio::null());
        command
            .stdout(log.try_clone().context("duplicate the log")?)
            .stderr(log);
        let name = self.argv.first().cloned().unwrap_or_default();
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        let id = i32::try_from(child.id()).context("process id")?;
        let id = ProcessId::of(id);
        // While this process lives, an ended child must not stay behind as a zombie.
        named_thread("reap", move || drop(child.wait()))?;
        id
    }
}

/// What `lab launch` does: becomes `argv` inside the lab.
pub fn launch(cgroup: &str, netns: Option<&str>, argv: &[String]) -> Result<()> {
    let (program, args) = argv.split_first().context("no program to launch")?;
    Cgroup::at(cgroup)?.join()?;
    rustix::process::setsid().context("start a session")?;
    if let Some(netns) = netns {
        enter_netns(netns)?;
    }
    let error = Command::new(program).args(args).exec();
    Err(error).with_context(|| format!("become {program}"))
}

/// Moves the calling thread into a named network namespace.
pub(crate) fn enter_netns(netns: &str) -> Result<()> {
    use rustix::fd::AsFd;
    use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

    let file = File::open(Path::new("/run/netns").join(netns))
        .with_context(|| format!("open the network namespace {netns}"))?;
    move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("enter the network namespace {netns}"))
}

/// State and start time. The name in field 2 may hold anything, so the fields count from its last parenthesis.
fn parse_stat(stat: &str) -> Option<(char, u64)> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut fields = fields.split_whitespace();
    let state = fields.next()?.chars().next()?;
    // Field 3 was the state; 22 is 18 further on.
    let start = fields.nth(18)?.parse().ok()?;
    Some((state, start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn start_time_is_found_behind_any_name() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 4711 1000 10";
        assert_eq!(parse_stat(stat), Some(('S', 4711)));
    }

    #[test]
    fn a_process_is_not_taken_for_a_later_one() {
        let this = i32::try_from(std::process::id()).unwrap();
        let now = ProcessId::of(this).unwrap();
        assert!(now.alive());
        let earlier = ProcessId {
            start: now.start - 1,
            ..now
        };
        assert!(!earlier.alive());
        // A signal to the earlier one must not reach this process.
        earlier.signal(Signal::KILL).unwrap();
    }
}
