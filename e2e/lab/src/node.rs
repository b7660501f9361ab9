//! A node, and everything that can befall it.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use rustix::process::Signal;

use crate::cgroup::Cgroup;
use crate::command::Run;
use crate::control::{Control, ExecOutcome, Op, Reply};
use crate::emulated;
use crate::init::CONTROL;
use crate::lab::Lab;
use crate::machine::{MachineContext, NodeFiles};
use crate::names::NodeIndex;
use crate::native;
use crate::process::ProcessId;
use crate::qmp::Monitor;
use crate::state::Tier;
use crate::wait::wait_for;

/// A node of a lab.
#[derive(Debug, Clone, Copy)]
pub struct Node<'a> {
    pub(crate) lab: &'a Lab,
    index: NodeIndex,
}

/// A service of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Service {
    /// The container runtime.
    Containerd,
    /// The kubelet.
    Kubelet,
    /// kube-proxy.
    KubeProxy,
}

impl Service {
    fn name(self) -> String {
        match self {
            Self::Containerd => "containerd",
            Self::Kubelet => "kubelet",
            Self::KubeProxy => "kube-proxy",
        }
        .to_owned()
    }
}

impl Lab {
    /// The node called `name`.
    pub fn node(&self, name: &str) -> Result<Node<'_>> {
        let known = self
            .state()
            .nodes
            .iter()
            .find(|node| node.index.name() == name);
        let record = known.with_context(|| format!("the lab has no node {name}"))?;
        Ok(Node::new(self, record.index))
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = Node<'_>> {
        self.state()
            .nodes
            .iter()
            .map(|record| Node::new(self, record.index))
    }
}

impl<'a> Node<'a> {
    fn new(lab: &'a Lab, index: NodeIndex) -> Self {
        Self { lab, index }
    }

    /// Its name in the cluster.
    pub fn name(&self) -> String {
        self.index.name()
    }

    /// Its index.
    pub fn index(&self) -> NodeIndex {
        self.index
    }

    /// Runs a program on it; its standard output, or an error with all that it wrote.
    ///
    /// The way there is not the node's network: it works during partitions.
    pub fn exec(&self, argv: &[&str]) -> Result<String> {
        let outcome = self.try_exec(argv, None, EXEC_DEADLINE)?;
        match outcome.code {
            Some(0) => Ok(outcome.stdout),
            code => Err(anyhow!(
                "{argv:?} on {}: exit code {code:?}: {}{}",
                self.name(),
                outcome.stderr,
                outcome.stdout
            )),
        }
    }

    /// Runs a program on it, whatever its exit code.
    pub fn try_exec(
        &self,
        argv: &[&str],
        stdin: Option<&str>,
        deadline: Duration,
    ) -> Result<ExecOutcome> {
        self.control().exec(argv, stdin, deadline)
    }

    /// Turns it on.
    pub fn boot(&self) -> Result<()> {
        ensure!(
            self.machine()?.is_none_or(|m| !m.alive()),
            "{} is on",
            self.name()
        );
        let files = NodeFiles::at(self.lab.paths().node(&self.name()));
        let name = &self.lab.state().name;
        let context = MachineContext {
            name,
            logs: self.lab.logs(),
            files: &files,
        };
        let machine = match self.lab.state().tier {
            Tier::Native => native::start(&context, self.index)?,
            Tier::Emulated => emulated::start(&context, self.index)?,
        };
        self.record(Some(machine))
    }

    /// Pulls its plug: everything on it stops between two instructions, nothing is flushed.
    pub fn cut(&self) -> Result<()> {
        let machine = self
            .machine()?
            .with_context(|| format!("{} is off", self.name()))?;
        machine.signal(Signal::KILL)?;
        // A frozen node has to be let go to die; it runs no instruction of its own any more.
        self.cgroup()?.freeze(false)?;
        wait_for(&format!("the end of {}", self.name()), CUT_DEADLINE, || {
            let left = self.cgroup()?.processes()?;
            ensure!(left.is_empty(), "left: {left:?}");
            Ok(())
        })?;
        self.record(None)
    }

    /// Whether it is on (frozen counts as on).
    pub fn is_on(&self) -> Result<bool> {
        Ok(self.machine()?.is_some_and(ProcessId::alive))
    }

    /// Stops it where it stands, with all that it has in flight.
    pub fn freeze(&self) -> Result<()> {
        self.cgroup()?.freeze(true)
    }

    /// Lets it go on, back from the dead.
    pub fn thaw(&self) -> Result<()> {
        self.cgroup()?.freeze(false)
    }

    /// Makes its path to the shared disk stand still: what is submitted waits until [`Self::resume_disk`].
    /// Emulated tier only, as the other faults of a disk.
    pub fn stall_disk(&self) -> Result<()> {
        self.monitor()?.stall_disk(true)
    }

    /// Ends [`Self::stall_disk`].
    pub fn resume_disk(&self) -> Result<()> {
        self.monitor()?.stall_disk(false)
    }

    /// Pulls the shared disk out of it: the device is gone, what is submitted fails.
    pub fn remove_disk(&self) -> Result<()> {
        self.monitor()?.remove_disk()
    }

    /// Puts the shared disk in again.
    pub fn return_disk(&self) -> Result<()> {
        self.monitor()?.return_disk(&self.lab.shared_disk())
    }

    fn monitor(&self) -> Result<Monitor> {
        let tier = self.lab.state().tier;
        ensure!(
            tier == Tier::Emulated,
            "a {tier:?} node has no hardware of its own"
        );
        Monitor::connect(&self.lab.paths().node(&self.name()).join(emulated::MONITOR))
    }

    /// Kills a service; it is started again at once, as an init system does.
    pub fn kill_service(&self, service: Service) -> Result<()> {
        self.signal_service(service, Signal::KILL)
    }

    /// Sends a service a signal.
    pub fn signal_service(&self, service: Service, signal: Signal) -> Result<()> {
        self.ask(Op::Signal {
            service: service.name(),
            signal: signal.as_raw(),
        })
    }

    /// Kills a service and leaves it down.
    pub fn stop_service(&self, service: Service) -> Result<()> {
        self.ask(Op::Stop {
            service: service.name(),
        })
    }

    /// Starts a service that was stopped.
    pub fn start_service(&self, service: Service) -> Result<()> {
        self.ask(Op::Start {
            service: service.name(),
        })
    }

    /// Unplugs its network cables, both ends dark; heartbeats on the shared disk go on.
    pub fn unplug(&self) -> Result<()> {
        self.link("down")
    }

    /// Plugs its network cables in again.
    pub fn plug(&self) -> Result<()> {
        self.link("up")
    }

    /// Imports an image archive that the node can see: any path of the host natively, a URL's file copied before
    /// in the emulated tier.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        let archive = archive.to_string_lossy();
        let argv = [
            "ctr", "-n", "k8s.io", "images", "import", "--local", &archive,
        ];
        self.exec(&argv).map(drop)
    }

    /// Waits until all its services were started and its Node object says Ready.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let name = self.name();
        wait_for(&format!("node {name} to be Ready"), deadline, || {
            ensure!(
                self.is_on()?,
                crate::wait::Hopeless(format!("{name} has died"))
            );
            let ready = r#"jsonpath={.status.conditions[?(@.type=="Ready")].status}"#;
            let status = self.lab.kubectl(&["get", "node", &name, "-o", ready])?;
            ensure!(status == "True", "Ready is {status:?}");
            match self.control().ask(Op::Status, CONTROL_DEADLINE)? {
                Reply::Status { started: true, .. } => Ok(()),
                other => bail!("not all services are started: {other:?}"),
            }
        })
    }

    /// Its services and their process ids on the node.
    pub fn services(&self) -> Result<Vec<(String, Option<i32>)>> {
        match self.control().ask(Op::Status, CONTROL_DEADLINE)? {
            Reply::Status { services, .. } => Ok(services),
            other => Err(anyhow!("unexpected reply {other:?}")),
        }
    }

    /// The process whose end is its power cut.
    pub fn machine(&self) -> Result<Option<ProcessId>> {
        let state = self.lab.recorded()?;
        Ok(state.node(self.index).and_then(|node| node.machine))
    }

    fn record(&self, machine: Option<ProcessId>) -> Result<()> {
        self.lab.record(|state| {
            for node in state
                .nodes
                .iter_mut()
                .filter(|node| node.index == self.index)
            {
                node.machine = machine;
            }
        })
    }

    fn link(&self, to: &str) -> Result<()> {
        use crate::hub::Hub;
        use crate::names::{MGMT_BRIDGE, VM_BRIDGE};

        for bridge in [MGMT_BRIDGE, VM_BRIDGE] {
            self.lab
                .hub()
                .ip(&["link", "set", &Hub::port(bridge, self.index), to])?;
        }
        Ok(())
    }

    fn ask(&self, op: Op) -> Result<()> {
        match self.control().ask(op, CONTROL_DEADLINE)? {
            Reply::Done => Ok(()),
            other => Err(anyhow!("unexpected reply {other:?}")),
        }
    }

    fn control(&self) -> Control {
        let files = NodeFiles::at(self.lab.paths().node(&self.name()));
        Control::new(&files.conf.join(CONTROL))
    }

    fn cgroup(&self) -> Result<Cgroup> {
        Ok(Cgroup::at(self.lab.state().name.cgroup())?.child(&self.name()))
    }

    /// A program of the host in the node's network namespace. Native tier only.
    pub fn in_netns(&self, program: &str) -> Run {
        Run::in_netns(&self.lab.state().name.node_netns(&self.name()), program)
    }
}

/// Quick answers; an emulated node under load takes its seconds.
const CONTROL_DEADLINE: Duration = Duration::from_secs(30);
/// Most commands on a node are short.
const EXEC_DEADLINE: Duration = Duration::from_secs(120);
/// The kernel takes a PID namespace apart in milliseconds.
const CUT_DEADLINE: Duration = Duration::from_secs(20);
