//! Embedded mode: `bascule-node` on the command line, without Kubernetes, in a private network.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::{Child, Console, Network, binary, probe, wait_for};

/// Hosts that share a network, a file as their volume, and a certificate authority.
#[derive(Debug)]
pub struct EmbeddedHosts {
    /// Where all of it runs.
    pub network: Network,
    directory: tempfile::TempDir,
    program: PathBuf,
}

/// One host: its directories and its address.
#[derive(Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct EmbeddedHost<'a> {
    hosts: &'a EmbeddedHosts,
    name: &'static str,
    pub address: Ipv4Addr,
}

/// A running command whose standard output is followed as a guest's console.
#[derive(Debug)]
pub struct RunningCommand {
    /// Its standard output: the guest's console.
    pub console: Console,
    inner: std::process::Child,
    errors: PathBuf,
}

impl EmbeddedHosts {
    /// A network and an empty directory; the programs are built.
    ///
    /// # Errors
    /// When a step fails.
    pub fn new() -> Result<Self> {
        let program = binary("bascule-node", "bascule-node")?;
        // The others are found beside it.
        for (package, name) in [
            ("bascule-node", "bascule-import"),
            ("bascule-volume", "bascule-volume"),
            ("bascule-vmm", "bascule-vm"),
            ("bascule-watchdog", "bascule-watchdog"),
        ] {
            binary(package, name)?;
        }
        Ok(Self {
            network: Network::new()?,
            directory: tempfile::tempdir().context("make a directory")?,
            program,
        })
    }

    /// A host by this name, at its own address of the network's loopback.
    #[must_use]
    pub fn host(&self, name: &'static str, number: u8) -> EmbeddedHost<'_> {
        EmbeddedHost {
            hosts: self,
            name,
            address: Ipv4Addr::new(127, 0, 0, number),
        }
    }

    /// A path within the directory that all hosts see.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Writes a file that all hosts see.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn write(&self, name: &str, text: &str) -> Result<PathBuf> {
        let path = self.path(name);
        fs::write(&path, text).with_context(|| format!("write {}", path.display()))?;
        Ok(path)
    }

    /// Runs a command of `bascule-node` that belongs to no host and must succeed.
    ///
    /// # Errors
    /// When it fails, with what it printed.
    pub fn must(&self, words: &[&str]) -> Result<String> {
        succeeded(&self.run(words)?, words)
    }

    fn run(&self, words: &[&str]) -> Result<Output> {
        let mut command = self.network.command(&self.program);
        let output = command.args(words).stdin(Stdio::null()).output();
        output.with_context(|| format!("run bascule-node {words:?}"))
    }
}

impl Drop for EmbeddedHosts {
    /// Processes of a node outlive the command that started them: those that name this directory.
    fn drop(&mut self) {
        let Ok(entries) = fs::read_dir("/proc") else {
            return;
        };
        for entry in entries.flatten() {
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            let (Some(pid), Ok(line)) = (pid, fs::read(entry.path().join("cmdline"))) else {
                continue;
            };
            let ours =
                String::from_utf8_lossy(&line).contains(&*self.directory.path().to_string_lossy());
            if let Some(pid) = Pid::from_raw(pid).filter(|_| ours)
                && let Err(error) = kill_process(pid, Signal::KILL)
            {
                eprintln!("end {pid:?}: {error}");
            }
        }
    }
}

impl EmbeddedHost<'_> {
    /// Runs a command of `bascule-node` on this host that must succeed, and returns its output.
    ///
    /// # Errors
    /// When it fails, with what it printed.
    pub fn must(&self, words: &[&str]) -> Result<String> {
        succeeded(&self.command(words)?, words)
    }

    fn command(&self, words: &[&str]) -> Result<Output> {
        let words = self.words(words)?;
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        self.hosts.run(&words)
    }

    /// Runs a command that must fail, and returns its standard error.
    ///
    /// # Errors
    /// When the command succeeds.
    pub fn complains(&self, words: &[&str]) -> Result<String> {
        let output = self.command(words)?;
        ensure!(!output.status.success(), "{words:?} succeeds");
        Ok(String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Starts `bascule-node serve --standalone`, which other hosts reach, and waits until it serves.
    ///
    /// # Errors
    /// When it does not.
    pub fn serve(&self) -> Result<Child> {
        let address = self.address.to_string();
        let words = self.words(&[
            "serve",
            "--standalone",
            "--no-cgroups",
            "--address",
            &address,
        ])?;
        let log = self.hosts.path(&format!("{}-serve.log", self.name));
        let mut command = self.hosts.network.command(&self.hosts.program);
        let mut daemon = Child::spawn("bascule-node serve", command.args(words), &log)?;
        wait_for("the daemon to serve", SOON, || {
            if let Some(status) = daemon.ended()? {
                bail!("it ended with {status}");
            }
            let api = SocketAddrV4::new(self.address, API_PORT);
            Ok(self.hosts.network.connect(api, SOON).ok().map(drop))
        })
        .with_context(|| format!("log: {}", fs::read_to_string(&log).unwrap_or_default()))?;
        Ok(daemon)
    }

    /// Starts a command and follows its standard output as a console.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, words: &[&str]) -> Result<RunningCommand> {
        let errors = self
            .hosts
            .path(&format!("{}-{}.log", self.name, words.join("-").len()));
        let log = fs::File::create(&errors).context("make a log")?;
        let mut command: Command = self.hosts.network.command(&self.hosts.program);
        let mut inner = command
            .args(self.words(words)?)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .with_context(|| format!("start {words:?}"))?;
        let console = Console::new();
        console.follow(inner.stdout.take().context("no standard output")?)?;
        Ok(RunningCommand {
            console,
            inner,
            errors,
        })
    }

    /// The host's own folders and what a VM may use of it, where the command takes them.
    fn words(&self, words: &[&str]) -> Result<Vec<String>> {
        let folder = |name: &str| {
            let path = self.hosts.path(&format!("{}/{name}", self.name));
            path.to_string_lossy().into_owned()
        };
        let mut all: Vec<String> = words.iter().map(|&word| word.to_owned()).collect();
        let kernel = format!("probe={}", probe::build()?.display());
        for (option, value) in [
            ("--run-dir", folder("run")),
            ("--state-dir", folder("state")),
            ("--bridge", "lan=br0".to_owned()),
            ("--host-file", kernel),
            (
                "--host-file",
                format!("broken={}", self.hosts.path("broken").display()),
            ),
            (
                "--host-file",
                format!("image={}", self.hosts.path("image").display()),
            ),
        ] {
            all.extend([option.to_owned(), value]);
        }
        Ok(all)
    }
}

impl RunningCommand {
    /// Sends SIGINT, as Ctrl-C in a terminal that is not in raw mode does.
    ///
    /// # Errors
    /// When the command has ended.
    pub fn interrupt(&self) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.inner.id())?).context("process id")?;
        kill_process(pid, Signal::INT).context("send SIGINT")
    }

    /// Waits for its end; whether it succeeded, and what it said beside the console.
    ///
    /// # Errors
    /// When it is still running after the limit.
    pub fn wait(&mut self) -> Result<(bool, String)> {
        let ended = wait_for("the command's end", SOON, || {
            self.inner.try_wait().context("ask for its end")
        });
        let said = read(&self.errors);
        let status = ended.with_context(|| said.clone())?;
        Ok((status.success(), said))
    }

    /// Its standard error so far.
    #[must_use]
    pub fn said(&self) -> String {
        read(&self.errors)
    }
}

impl Drop for RunningCommand {
    fn drop(&mut self) {
        // It may have ended already.
        drop(self.inner.kill());
        drop(self.inner.wait());
    }
}

fn succeeded(output: &Output, words: &[&str]) -> Result<String> {
    let (said, complained) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    ensure!(
        output.status.success(),
        "{words:?} fails: {said}{complained}"
    );
    Ok(said.into_owned())
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

const SOON: Duration = Duration::from_secs(90);
/// `bascule_node_api::NODE_PORT`.
const API_PORT: u16 = 7410;
