//! Services and other children of a node's PID 1.
//!
//! One thread reaps, as PID 1 must for all orphans of its node; one thread per service decides whether its service
//! should run. They meet in [`Reaper::spawn`], which hands out a receiver for the child's end.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use rustix::process::{
    Pid, Signal, WaitIdOptions, WaitOptions, WaitStatus, kill_process, wait, waitid,
};

use super::mounts::open_log;
use super::{NodeSpec, ServiceSpec};
use crate::command::named_thread;
use crate::control::ExecOutcome;

/// Waits for every child of this process.
#[derive(Debug)]
pub(crate) struct Reaper {
    /// Children with a receiver for their exit status.
    awaited: Mutex<HashMap<i32, Sender<WaitStatus>>>,
    spawned: Condvar,
}

impl Reaper {
    pub(crate) fn start() -> Result<Arc<Self>> {
        let reaper = Arc::new(Self {
            awaited: Mutex::new(HashMap::new()),
            spawned: Condvar::new(),
        });
        let this = Arc::clone(&reaper);
        named_thread("reap", move || this.run())?;
        Ok(reaper)
    }

    /// Starts a child. The receiver gets its status; the child must not be waited for in any other way.
    pub(crate) fn spawn(&self, mut command: Command) -> Result<Child> {
        // Held across the start: a program that cannot be started is reaped by the standard library itself, and
        // one that ends at once must find its sender.
        let mut awaited = lock(&self.awaited);
        let mut child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        let pid = i32::try_from(child.id()).context("process id")?;
        let (status_tx, status_rx) = mpsc::channel();
        awaited.insert(pid, status_tx);
        self.spawned.notify_all();
        let (stdin, stdout, stderr) =
            (child.stdin.take(), child.stdout.take(), child.stderr.take());
        Ok(Child {
            pid,
            status_rx,
            stdin,
            stdout,
            stderr,
        })
    }

    fn run(&self) {
        loop {
            // Blocks until a child has ended, and leaves it for the look under the lock.
            let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            let none_left = waitid(rustix::process::WaitId::All, options).is_err();
            let mut awaited = lock(&self.awaited);
            if none_left && awaited.is_empty() {
                let guard = self.spawned.wait_timeout(awaited, IDLE_CHECK);
                drop(guard.unwrap_or_else(PoisonError::into_inner));
                continue;
            }
            while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
                if let Some(status_tx) = awaited.remove(&pid.as_raw_nonzero().get()) {
                    // The receiver may be gone.
                    status_tx.send(status).ok();
                }
            }
        }
    }
}

#[derive(Debug)]
pub(crate) struct Child {
    pid: i32,
    status_rx: Receiver<WaitStatus>,
    stdin: Option<std::process::ChildStdin>,
    stdout: Option<std::process::ChildStdout>,
    stderr: Option<std::process::ChildStderr>,
}

/// Starts, restarts and stops services. A clone is another handle on the same ones.
#[derive(Debug, Clone)]
pub(crate) struct Supervisor {
    shared: Arc<Shared>,
    path: String,
}

#[derive(Debug)]
struct Shared {
    reaper: Arc<Reaper>,
    services: Mutex<Vec<Service>>,
    changed: Condvar,
    started: Mutex<bool>,
}

#[derive(Debug)]
struct Service {
    spec: ServiceSpec,
    wanted: bool,
    has_thread: bool,
    pid: Option<i32>,
}

impl Supervisor {
    pub(crate) fn new(reaper: Arc<Reaper>, spec: &NodeSpec) -> Self {
        let services = spec
            .services
            .iter()
            .map(|spec| Service {
                spec: spec.clone(),
                wanted: false,
                has_thread: false,
                pid: None,
            })
            .collect();
        let shared = Shared {
            reaper,
            services: Mutex::new(services),
            changed: Condvar::new(),
            started: Mutex::new(false),
        };
        Self {
            shared: Arc::new(shared),
            path: spec.path.clone(),
        }
    }

    /// Starts a service and keeps it running.
    pub(crate) fn start(&self, name: &str) -> Result<()> {
        let first = self.with(name, |service| {
            service.wanted = true;
            !std::mem::replace(&mut service.has_thread, true)
        })?;
        self.shared.changed.notify_all();
        if first {
            let (this, name) = (self.clone(), name.to_owned());
            named_thread(&format!("svc-{name}"), move || this.keep_running(&name))?;
        }
        Ok(())
    }

    /// Kills a service and leaves it down.
    pub(crate) fn stop(&self, name: &str) -> Result<()> {
        let pid = self.with(name, |service| {
            service.wanted = false;
            service.pid
        })?;
        pid.map_or(Ok(()), |pid| signal(pid, Signal::KILL))?;
        let mut services = lock(&self.shared.services);
        let until = Instant::now() + STOP_DEADLINE;
        while services
            .iter()
            .any(|service| service.spec.name == name && service.pid.is_some())
        {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(anyhow!(
                    "{name} is still there {STOP_DEADLINE:?} after SIGKILL"
                ));
            }
            let woken = self.shared.changed.wait_timeout(services, left);
            services = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Sends a running service a signal.
    pub(crate) fn signal(&self, name: &str, number: i32) -> Result<()> {
        let number = Signal::from_named_raw(number).with_context(|| format!("signal {number}"))?;
        let pid = self.with(name, |service| service.pid)?;
        signal(pid.with_context(|| format!("{name} is down"))?, number)
    }

    /// Each service and its process.
    pub(crate) fn services(&self) -> Vec<(String, Option<i32>)> {
        lock(&self.shared.services)
            .iter()
            .map(|s| (s.spec.name.clone(), s.pid))
            .collect()
    }

    pub(crate) fn set_started(&self) {
        *lock(&self.shared.started) = true;
    }

    pub(crate) fn started(&self) -> bool {
        *lock(&self.shared.started)
    }

    /// Runs a program to its end.
    pub(crate) fn exec(
        &self,
        argv: &[String],
        stdin: Option<String>,
        deadline: Duration,
    ) -> Result<ExecOutcome> {
        let mut command = self.command(argv)?;
        command.stdin(if stdin.is_some() {
            Stdio::piped()
        } else {
            Stdio::null()
        });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.shared.reaper.spawn(command)?;
        if let (Some(text), Some(mut pipe)) = (stdin, child.stdin.take()) {
            named_thread("stdin", move || drop(pipe.write_all(text.as_bytes())))?;
        }
        let stdout = child.stdout.take().map(read_all).transpose()?;
        let stderr = child.stderr.take().map(read_all).transpose()?;
        let status = match child.status_rx.recv_timeout(deadline) {
            Ok(status) => status,
            Err(RecvTimeoutError::Timeout) => {
                signal(child.pid, Signal::KILL)?;
                return Err(anyhow!("{argv:?}: killed after {deadline:?}"));
            }
            Err(RecvTimeoutError::Disconnected) => return Err(anyhow!("{argv:?}: lost")),
        };
        let text = |rx: Option<Receiver<Vec<u8>>>| {
            // A background grandchild may keep the pipe open.
            let bytes = rx
                .and_then(|rx| rx.recv_timeout(PIPE_GRACE).ok())
                .unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        Ok(ExecOutcome {
            code: status.exit_status(),
            stdout: text(stdout),
            stderr: text(stderr),
        })
    }

    fn with<T>(&self, name: &str, change: impl FnOnce(&mut Service) -> T) -> Result<T> {
        let mut services = lock(&self.shared.services);
        let service = services
            .iter_mut()
            .find(|service| service.spec.name == name);
        service
            .map(change)
            .with_context(|| format!("there is no service {name}"))
    }

    fn command(&self, argv: &[String]) -> Result<Command> {
        let (program, args) = argv.split_first().context("no program")?;
        let mut command = Command::new(program);
        command
            .args(args)
            .env_clear()
            .env("PATH", &self.path)
            .env("HOME", "/root");
        Ok(command)
    }

    /// Loop of a service's thread: starts, restarts and stops the service.
    fn keep_running(&self, name: &str) {
        loop {
            let spec = self.wait_wanted(name);
            let outcome = self.run_once(&spec);
            self.set_pid(name, None);
            eprintln!("node-init: {name}: {outcome:?}");
            self.back_off(name);
        }
    }

    fn run_once(&self, spec: &ServiceSpec) -> Result<Option<i32>> {
        let log = open_log(&spec.log)?;
        let mut command = self.command(&spec.argv)?;
        command.stdin(Stdio::null());
        command
            .stdout(log.try_clone().context("duplicate the log")?)
            .stderr(log);
        let child = self.shared.reaper.spawn(command)?;
        self.set_pid(&spec.name, Some(child.pid));
        let status = child.status_rx.recv().context("lost")?;
        Ok(status.exit_status())
    }

    fn set_pid(&self, name: &str, pid: Option<i32>) {
        // Stopped between its start and this: `stop` has seen no process, so it is killed here.
        let unwanted = self.with(name, |service| {
            service.pid = pid;
            pid.filter(|_| !service.wanted)
        });
        if let Ok(Some(pid)) = unwanted
            && let Err(error) = signal(pid, Signal::KILL)
        {
            eprintln!("node-init: {name}: {error:#}");
        }
        self.shared.changed.notify_all();
    }

    fn wait_wanted(&self, name: &str) -> ServiceSpec {
        let mut services = lock(&self.shared.services);
        loop {
            let wanted = services.iter().find(|s| s.spec.name == name && s.wanted);
            if let Some(service) = wanted {
                return service.spec.clone();
            }
            let woken = self.shared.changed.wait(services);
            services = woken.unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits a moment before a restart, or until the service is stopped or started by hand.
    fn back_off(&self, name: &str) {
        let services = lock(&self.shared.services);
        let wanted = services.iter().any(|s| s.spec.name == name && s.wanted);
        if wanted {
            drop(self.shared.changed.wait_timeout(services, RESTART_PAUSE));
        }
    }
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    let pid = Pid::from_raw(pid).context("process id")?;
    match kill_process(pid, signal) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => Ok(()),
        Err(error) => Err(error).context("send a signal"),
    }
}

fn read_all(mut pipe: impl Read + Send + 'static) -> Result<Receiver<Vec<u8>>> {
    let (bytes_tx, bytes_rx) = mpsc::channel();
    named_thread("output", move || {
        let mut bytes = Vec::new();
        // A read error keeps the bytes that were read before it.
        drop(pipe.read_to_end(&mut bytes));
        drop(bytes_tx.send(bytes));
    })?;
    Ok(bytes_rx)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // PID 1 must not die of another thread's panic; every critical section here leaves its data whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As systemd does by default for a service that it restarts, near enough (100 ms there).
const RESTART_PAUSE: Duration = Duration::from_millis(500);
/// A killed process is gone within milliseconds unless the kernel holds it.
const STOP_DEADLINE: Duration = Duration::from_secs(20);
/// How long to wait for output after the program itself has ended.
const PIPE_GRACE: Duration = Duration::from_secs(2);
/// Without any child there is nothing to wait for but the next one.
const IDLE_CHECK: Duration = Duration::from_secs(1);
