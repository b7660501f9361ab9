//! A node of a lab: running programs on it, power, services, and faults of its disk and network.

use std::net::IpAddr;
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
use crate::names::NodeIndex;
use crate::native;
use crate::node_conf::{MachineContext, NodeFiles};
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
#[expect(missing_docs, reason = "the variant names say all")]
pub enum Service {
    Containerd,
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

    /// Its address on the management network.
    pub fn address(&self) -> IpAddr {
        self.lab.family().node(self.index)
    }

    /// The number in the node's name: 1 is `n1`.
    pub fn index(&self) -> NodeIndex {
        self.index
    }

    /// Runs a program on the node and returns its standard output; an error contains all output.
    ///
    /// Does not use the node's network, so it works during partitions.
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

    /// Powers the node on.
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
            families: self.lab.families(),
            logs: self.lab.logs(),
            files: &files,
        };
        let machine = match self.lab.state().tier {
            Tier::Native => native::start(&context, self.index)?,
            Tier::Emulated => emulated::start(&context, self.index)?,
        };
        self.record(Some(machine))
    }

    /// Cuts the node's power (SIGKILL): all processes stop at once, nothing is flushed.
    pub fn cut(&self) -> Result<()> {
        let machine = self
            .machine()?
            .with_context(|| format!("{} is off", self.name()))?;
        machine.signal(Signal::KILL)?;
        // A frozen process dies only when it is thawed; it executes no further instruction.
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

    /// Freezes the node: no process on it runs until [`Self::thaw`]; I/O in flight stays in flight.
    pub fn freeze(&self) -> Result<()> {
        self.cgroup()?.freeze(true)
    }

    /// Ends [`Self::freeze`]. The node continues as if no time had passed.
    pub fn thaw(&self) -> Result<()> {
        self.cgroup()?.freeze(false)
    }

    /// Stalls the node's path to the shared disk: submitted requests wait until [`Self::resume_disk`]. Emulated tier
    /// only, like all disk faults.
    pub fn stall_disk(&self) -> Result<()> {
        self.monitor()?.stall_disk(true)
    }

    /// Ends [`Self::stall_disk`].
    pub fn resume_disk(&self) -> Result<()> {
        self.monitor()?.stall_disk(false)
    }

    /// Hot-unplugs the shared disk: the device disappears, submitted requests fail.
    pub fn remove_disk(&self) -> Result<()> {
        self.monitor()?.remove_disk()
    }

    /// Hot-plugs the shared disk again.
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

    /// Kills a service; PID 1 restarts it.
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

    /// Kills a service; it stays down until [`Self::start_service`].
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

    /// Takes the node's links down on both networks; the shared disk stays reachable.
    pub fn unplug(&self) -> Result<()> {
        self.link("down")
    }

    /// Ends [`Self::unplug`].
    pub fn plug(&self) -> Result<()> {
        self.link("up")
    }

    /// Imports an image archive into containerd. `archive` is a path on the node; a native node sees the host's files.
    pub fn import_image(&self, archive: &Path) -> Result<()> {
        let archive = archive.to_string_lossy();
        let argv = [
            "ctr", "-n", "k8s.io", "images", "import", "--local", &archive,
        ];
        self.exec(&argv).map(drop)
    }

    /// Waits until all services have been started and the Node object is Ready.
    pub fn wait_ready(&self, deadline: Duration) -> Result<()> {
        let name = self.name();
        wait_for(&format!("node {name} to be Ready"), deadline, || {
            ensure!(
                self.is_on()?,
                crate::wait::PermanentError(format!("{name} is off or has crashed"))
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

    /// The node's PID 1 (native) or QEMU (emulated); `None` while the node is off.
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

/// Status and service requests; an emulated node under load needs several seconds.
const CONTROL_DEADLINE: Duration = Duration::from_secs(30);
/// Default deadline of a program on a node.
const EXEC_DEADLINE: Duration = Duration::from_secs(120);
/// The kernel takes a PID namespace apart in milliseconds.
const CUT_DEADLINE: Duration = Duration::from_secs(20);
