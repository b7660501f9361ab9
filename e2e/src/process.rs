//! Child processes that do not outlive the test, and their CPU time and memory.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::wait_for;

/// A child process; killed when dropped.
#[derive(Debug)]
pub struct Child {
    name: String,
    inner: std::process::Child,
}

/// Measures the CPU time of processes outside guest code, from its creation until it is read.
///
/// A thread that runs guest code may end in between, and takes what it used to the process's total
/// with it. So a sampler keeps the last value seen of each of them.
#[derive(Debug)]
pub struct CpuMeter {
    pids: Vec<u32>,
    total: Duration,
    guest: Duration,
    running: Arc<AtomicBool>,
    sampler: Option<JoinHandle<HashMap<PathBuf, Duration>>>,
}

impl CpuMeter {
    /// Starts measuring.
    ///
    /// # Errors
    /// When `/proc` does not say or no thread can be started.
    pub fn start(processes: &[&Child]) -> Result<Self> {
        let pids: Vec<u32> = processes.iter().map(|child| child.pid()).collect();
        let mut first = HashMap::new();
        sample_guest_threads(&pids, &mut first);
        let running = Arc::new(AtomicBool::new(true));
        let (sampled, sampling) = (pids.clone(), Arc::clone(&running));
        let guest = first.values().sum();
        let sample = move || {
            let mut seen = first;
            while sampling.load(Ordering::Relaxed) {
                sample_guest_threads(&sampled, &mut seen);
                std::thread::sleep(SAMPLE_PERIOD);
            }
            seen
        };
        let builder = std::thread::Builder::new().name("cpu-meter".into());
        let sampler = Some(builder.spawn(sample).context("start a thread")?);
        Ok(Self {
            total: total_time(&pids)?,
            pids,
            guest,
            running,
            sampler,
        })
    }

    /// CPU time used since the start, without guest code.
    ///
    /// # Errors
    /// When a process is gone.
    pub fn finish(mut self) -> Result<Duration> {
        let total = total_time(&self.pids)?.saturating_sub(self.total);
        self.running.store(false, Ordering::Relaxed);
        let seen = match self.sampler.take() {
            Some(sampler) => sampler
                .join()
                .map_err(|_| anyhow!("the sampler panicked"))?,
            None => HashMap::new(),
        };
        let guest = seen.values().sum::<Duration>().saturating_sub(self.guest);
        Ok(total.saturating_sub(guest))
    }
}

impl Drop for CpuMeter {
    fn drop(&mut self) {
        self.running.store(false, Ordering::Relaxed);
    }
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

    /// The process id, for signals and `/proc`.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.inner.id()
    }

    /// Exit status, if it has ended.
    ///
    /// # Errors
    /// When the kernel call fails.
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
    /// When the kernel call fails.
    pub fn kill(&mut self) -> Result<()> {
        self.inner
            .kill()
            .with_context(|| format!("kill {}", self.name))?;
        self.inner
            .wait()
            .with_context(|| format!("reap {}", self.name))?;
        Ok(())
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

fn total_time(pids: &[u32]) -> Result<Duration> {
    pids.iter().try_fold(Duration::ZERO, |sum, pid| {
        let (_, time) = thread_time(Path::new(&format!("/proc/{pid}")))?;
        Ok(sum + time)
    })
}

/// Notes what the threads that run guest code have used. One that is gone keeps its last value.
fn sample_guest_threads(pids: &[u32], seen: &mut HashMap<PathBuf, Duration>) {
    for pid in pids {
        let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else {
            continue;
        };
        for task in tasks.flatten() {
            let path = task.path();
            // QEMU: `CPU 0/KVM`; ours: `vcpu0`.
            if let Ok((name, time)) = thread_time(&path)
                && (name.starts_with("CPU ") || name.starts_with("vcpu"))
            {
                seen.insert(path, time);
            }
        }
    }
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

/// The kernel counts in steps of 10 ms; a finer sample would see no more.
const SAMPLE_PERIOD: Duration = Duration::from_millis(5);
