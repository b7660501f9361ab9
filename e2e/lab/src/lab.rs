//! A handle on a lab that is up: kubectl, helm, its network, its control plane, its logs.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::addresses::{Families, Family};
use crate::command::Run;
use crate::control_plane::{Component, ControlPlane};
use crate::down::down;
use crate::hub::Hub;
use crate::names::LabName;
use crate::pki::Pki;
use crate::state::{LabPaths, State};
use crate::tools::Tools;
use crate::wait::wait_for;

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    pub(crate) state: State,
    pub(crate) paths: LabPaths,
    pub(crate) tools: Tools,
    pub(crate) hub: Hub,
    /// Taken down when this is dropped.
    pub(crate) ephemeral: bool,
    /// Keeps other tests from having a lab of this name.
    pub(crate) session_lock: Option<File>,
}

impl Lab {
    /// A handle on a lab that another process brought up.
    pub fn open(name: &LabName) -> Result<Self> {
        let paths = LabPaths::new(name)?;
        let state = State::load(&paths)?;
        let state = state.with_context(|| format!("there is no lab {name}: `lab up` makes one"))?;
        ensure!(
            state.complete,
            "the lab {name} did not come up: `lab up` again"
        );
        let hub = Hub::new(name);
        Ok(Self {
            state,
            paths,
            tools: Tools::ensure()?,
            hub,
            ephemeral: false,
            session_lock: None,
        })
    }

    /// As [`Self::open`], also while the lab is coming up: for the management controllers.
    pub(crate) fn open_incomplete(name: &LabName) -> Result<Self> {
        let paths = LabPaths::new(name)?;
        let state = State::load(&paths)?.with_context(|| format!("there is no lab {name}"))?;
        let hub = Hub::new(name);
        Ok(Self {
            state,
            paths,
            tools: Tools::ensure()?,
            hub,
            ephemeral: false,
            session_lock: None,
        })
    }

    /// Takes the lab down and removes everything but its logs.
    pub fn down(mut self) -> Result<()> {
        self.ephemeral = false;
        down(&self.state.name)
    }

    /// The state file's content when this handle was made.
    pub fn state(&self) -> &State {
        &self.state
    }

    /// The address families of its cluster.
    pub fn families(&self) -> Families {
        self.state.families
    }

    /// The first of them.
    pub fn family(&self) -> Family {
        self.families().first()
    }

    /// Its hub: network access for tests.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// The paths of the programs that the lab runs.
    pub fn tools(&self) -> &Tools {
        &self.tools
    }

    /// Where its logs are.
    pub fn logs(&self) -> &Path {
        &self.state.logs
    }

    /// The shared disk's file on the host: an offline checker may read it.
    pub fn shared_disk(&self) -> PathBuf {
        self.paths.shared_disk()
    }

    /// `kubectl` as cluster administrator; its standard output.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_run()?.args(args).text()
    }

    /// A prepared `kubectl`, for what [`Self::kubectl`] does not do (standard input, longer deadlines, exit codes).
    pub fn kubectl_run(&self) -> Result<Run> {
        let kubectl = self.tools.path("kubectl")?;
        Ok(Run::in_netns(&self.state.name.hub_netns(), kubectl)
            .env("KUBECONFIG", self.kubeconfig()))
    }

    /// A prepared program of this machine, in the hub's network, with the kubeconfig of a user of that name.
    pub fn run_as(&self, user: &str, program: &Path) -> Result<Run> {
        let pki = Pki::open(&self.paths.pki(), self.family())?;
        let kubeconfig = pki.kubeconfig_file(&format!("user-{user}"), user, None)?;
        Ok(Run::in_netns(&self.state.name.hub_netns(), program).env("KUBECONFIG", kubeconfig))
    }

    /// One object, or a list of objects, as JSON.
    pub fn get(&self, args: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], args].concat())?;
        serde_json::from_str(&text).context("parse what kubectl says")
    }

    /// `kubectl apply --server-side` of these documents.
    pub fn apply(&self, yaml: &str) -> Result<()> {
        let args = ["apply", "--server-side", "--force-conflicts", "-f", "-"];
        self.kubectl_run()?.args(args).stdin(yaml).done()
    }

    /// `helm` as cluster administrator; its standard output.
    pub fn helm(&self, args: &[&str]) -> Result<String> {
        self.helm_run()?.args(args).text()
    }

    /// A prepared `helm`.
    pub fn helm_run(&self) -> Result<Run> {
        let run = Run::in_netns(&self.state.name.hub_netns(), self.tools.path("helm")?);
        let run = run.env("KUBECONFIG", self.kubeconfig());
        Ok(run
            .env("HELM_CACHE_HOME", self.paths.dir().join("helm"))
            .deadline(HELM_DEADLINE))
    }

    /// The administrator's kubeconfig. Its server is reachable from the hub only.
    pub fn kubeconfig(&self) -> PathBuf {
        self.paths.pki().join("admin.kubeconfig")
    }

    /// As [`wait_for`]; on failure the ends of all logs are printed.
    pub fn wait_for<T>(
        &self,
        what: &str,
        deadline: Duration,
        probe: impl FnMut() -> Result<T>,
    ) -> Result<T> {
        wait_for(what, deadline, probe).inspect_err(|_| self.print_logs())
    }

    /// A TCP connection from the hub: to a guest (10.91.0.x), a node, a pod.
    pub fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        self.hub.connect(address, timeout)
    }

    /// Kills a component of the control plane; it stays down.
    pub fn kill(&self, component: Component) -> Result<()> {
        self.control_plane().kill(component)
    }

    /// Starts a component of the control plane that was killed; the API server is ready when this returns.
    pub fn restart(&self, component: Component) -> Result<()> {
        let process = self.control_plane().start(component)?;
        match component {
            Component::Apiserver => self.control_plane().wait_ready(&[(component, process)]),
            _ => Ok(()),
        }
    }

    /// Freezes or thaws a component of the control plane.
    pub fn freeze(&self, component: Component, frozen: bool) -> Result<()> {
        self.control_plane().freeze(component, frozen)
    }

    /// Whether a component of the control plane runs.
    pub fn running(&self, component: Component) -> Result<bool> {
        self.control_plane().running(component)
    }

    /// Prints the ends of all logs on standard error, those of Bascule's own pods last.
    pub fn print_logs(&self) {
        print_logs(&self.state.logs);
        self.print_bascule();
    }

    pub(crate) fn control_plane(&self) -> ControlPlane<'_> {
        ControlPlane {
            name: &self.state.name,
            paths: &self.paths,
            logs: &self.state.logs,
            tools: &self.tools,
            families: self.families(),
        }
    }

    pub(crate) fn paths(&self) -> &LabPaths {
        &self.paths
    }

    /// Changes the state file: locks it, reads it, applies `change`, writes it.
    pub(crate) fn record(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let _lock = self.paths.lock_state()?;
        let mut state = State::load(&self.paths)?.context("the lab is gone")?;
        change(&mut state);
        state.save(&self.paths)
    }

    /// Reads the state file.
    pub(crate) fn recorded(&self) -> Result<State> {
        State::load(&self.paths)?.context("the lab is gone")
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if self.ephemeral
            && let Err(error) = down(&self.state.name)
        {
            eprintln!("lab: take down {}: {error:#}", self.state.name);
        }
    }
}

/// Prints the end of every log in `logs`.
pub fn print_logs(logs: &Path) {
    let Ok(entries) = fs::read_dir(logs) else {
        return;
    };
    let mut files: Vec<PathBuf> = entries.filter_map(|e| Some(e.ok()?.path())).collect();
    files.sort();
    for file in files {
        let Ok(text) = read_tail(&file) else { continue };
        eprintln!("==> {} <==\n{text}", file.display());
    }
}

fn read_tail(file: &Path) -> Result<String> {
    use std::io::{Read, Seek, SeekFrom};

    let mut file = File::open(file).context("open a log")?;
    let size = file.metadata().context("stat a log")?.len();
    file.seek(SeekFrom::Start(size.saturating_sub(TAIL_BYTES)))
        .context("seek in a log")?;
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).context("read a log")?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Bytes of the end of each log that are shown on failure.
const TAIL_BYTES: u64 = 3000;
/// `helm --wait` has a shorter one of its own (5 minutes).
const HELM_DEADLINE: Duration = Duration::from_secs(600);
