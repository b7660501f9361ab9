//! Child processes that do not outlive the test, and what they cost.

use std::fs;
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::wait_for;

/// A child process; killed when dropped.
#[derive(Debug)]
pub struct Child {
    name: String,
    inner: std::process::Child,
}

/// Processor time used so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CpuTime {
    /// By threads that run guest code.
    pub guest: Duration,
    /// By all others, threads that have ended included.
    pub host: Duration,
}

impl Child {
    /// Starts `command` with its standard streams in `log`.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn spawn(name: &str, command: &mut Command, log: &Path) -> Result<Self> {
        let output = fs::File::create(log).with_context(|| format!("create {}", log.display()))?;
        let errors = output.try_clone().context("share the log")?;
        let inner = command
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self {
            name: name.to_owned(),
            inner,
        })
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.inner.id()
    }

    /// How it ended, if it has.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.inner
            .try_wait()
            .with_context(|| format!("ask whether {} has ended", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// When it is still there after `limit`.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let what = format!("the end of {}", self.name);
        wait_for(&what, limit, || self.ended())
    }

    /// Kills it (SIGKILL) and reaps it.
    ///
    /// # Errors
    /// When the kernel does not.
    pub fn kill(&mut self) -> Result<()> {
        self.inner
            .kill()
            .with_context(|| format!("kill {}", self.name))?;
        self.inner
            .wait()
            .with_context(|| format!("reap {}", self.name))?;
        Ok(())
    }

    /// What it has used.
    ///
    /// # Errors
    /// When `/proc` does not say.
    pub fn cpu_time(&self) -> Result<CpuTime> {
        let root = format!("/proc/{}", self.pid());
        let (_, total) = thread_time(Path::new(&root))?;
        let mut guest = Duration::ZERO;
        let tasks = fs::read_dir(format!("{root}/task")).context("list threads")?;
        for task in tasks {
            let (name, time) = thread_time(&task.context("list threads")?.path())?;
            // QEMU: `CPU 0/KVM`; ours: `vcpu0`.
            if name.starts_with("CPU ") || name.starts_with("vcpu") {
                guest += time;
            }
        }
        Ok(CpuTime {
            guest,
            host: total.saturating_sub(guest),
        })
    }

    /// Resident memory in KiB, the mappings of guest RAM (a memfd) left out.
    ///
    /// # Errors
    /// When `/proc` does not say.
    pub fn resident_kib_beyond_guest(&self) -> Result<u64> {
        let maps = fs::read_to_string(format!("/proc/{}/smaps", self.pid())).context("smaps")?;
        let mut counted = true;
        let mut sum = 0;
        for line in maps.lines() {
            if let Some(value) = line.strip_prefix("Rss:") {
                let kib = value
                    .trim()
                    .trim_end_matches(" kB")
                    .parse::<u64>()
                    .context("Rss")?;
                sum += if counted { kib } else { 0 };
            } else if line.split_once('-').is_some_and(|(start, _)| is_hex(start)) {
                counted = !line.contains("/memfd:");
            }
        }
        Ok(sum)
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if let Ok(None) = self.ended()
            && let Err(error) = self.kill()
        {
            eprintln!("{error:#}");
        }
    }
}

fn is_hex(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// Name and processor time of a process or thread (proc(5), `stat`: fields 2, 14 and 15).
fn thread_time(directory: &Path) -> Result<(String, Duration)> {
    let stat = fs::read_to_string(directory.join("stat"))
        .with_context(|| format!("read {}", directory.display()))?;
    let (head, tail) = stat.rsplit_once(')').context("stat without a name")?;
    let name = head.split_once('(').map_or("", |(_, name)| name).to_owned();
    let fields: Vec<&str> = tail.split_ascii_whitespace().collect();
    let ticks = [11, 12].iter().try_fold(0, |sum, &index: &usize| {
        let field = fields.get(index).context("stat is short")?;
        Ok::<u64, anyhow::Error>(sum + field.parse::<u64>().context("stat")?)
    })?;
    Ok((
        name,
        Duration::from_millis(ticks * 1000 / rustix::param::clock_ticks_per_second()),
    ))
}
