//! Bascule installed on a lab's cluster with helm, and the operations of the scenarios.
//!
//! An [`Installation`] is a [`Lab`] with the chart on it. [`Installation::vm`] applies a
//! VirtualMachine whose guest can be talked to: the probe guest on native nodes, an unmodified
//! Debian kernel on emulated ones. Every wait is on a condition and says what it waited for.

mod firmware;
mod guest;
mod leader;
mod objects;
mod plugin;
mod records;
mod reservation;
mod san;
pub mod scenarios;
mod shared;
mod takeover;
mod writer;

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bascule_lab::{Lab, Tier};
use serde_json::Value;

pub use guest::{Guest, Talk};
pub use leader::Beside;
pub use objects::{Moved, condition};
pub use plugin::{PluginConsole, plugin};
pub use records::{GuestWrite, Succession};
pub use san::VmProcess;
pub use shared::SharedCluster;
pub use takeover::Takeover;
pub use writer::Writer;

/// A cluster with Bascule on it.
#[derive(Debug)]
pub struct Installation {
    lab: Lab,
    guest: Guest,
}

/// A virtual machine of a scenario.
#[derive(Debug)]
pub struct ClusterVm<'a> {
    cluster: &'a Installation,
    /// Its name, in the namespace [`NAMESPACE`].
    pub name: String,
    /// Its guest's address.
    pub address: Ipv4Addr,
    /// The SharedVolume of its disks.
    pub volume: &'static str,
}

impl Installation {
    /// Installs the chart on a lab and waits until every node has joined.
    ///
    /// # Errors
    /// When something does not come up in time; the ends of all logs are printed.
    pub fn on(lab: Lab) -> Result<Self> {
        let guest = match lab.state().tier {
            Tier::Native => Guest::probe(&lab)?,
            Tier::Emulated => Guest::debian(&lab)?,
        };
        lab.install_bascule(&["--set=log.format=text"])?;
        Ok(Self { lab, guest })
    }

    /// The lab that the cluster runs in, for kubectl, faults and node commands.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        &self.lab
    }

    /// Applies a SharedVolume on the lab's shared disk and waits until every node reaches it.
    ///
    /// # Errors
    /// When it does not become ready.
    pub fn volume(&self) -> Result<()> {
        let mode = match self.lab.state().tier {
            // A native node has no watchdog of its own.
            Tier::Native => "LeaseOnly",
            Tier::Emulated => "Watchdog",
        };
        let device = "/dev/disk/by-id/virtio-shared0";
        self.lab
            .apply(&objects::shared_volume(VOLUME, device, mode))?;
        self.wait_volume()
    }

    /// Waits until every node reaches the volume, as after a node's return.
    ///
    /// # Errors
    /// When one does not in time.
    pub fn wait_volume(&self) -> Result<()> {
        self.wait_volume_on(VOLUME)
    }

    /// As [`Self::wait_volume`], for any volume.
    ///
    /// # Errors
    /// When a node does not reach it in time.
    pub fn wait_volume_on(&self, volume: &str) -> Result<()> {
        self.lab
            .wait_for("the SharedVolume on every node", VOLUME_LIMIT, || {
                let volume = self.lab.get(&["sharedvolume", volume])?;
                condition(&volume, "Ready")?;
                let nodes = volume["status"]["nodes"].as_array();
                let (direct, others): (Vec<_>, Vec<_>) = nodes
                    .into_iter()
                    .flatten()
                    .partition(|node| node["state"] == "Direct");
                let wanted = self.lab.state().nodes.len();
                ensure!(
                    direct.len() == wanted,
                    "{} of {wanted} nodes reach it directly; the others: {}",
                    direct.len(),
                    Value::from_iter(others.into_iter().cloned())
                );
                Ok(())
            })
    }

    /// Applies a VirtualMachine with this lab's guest, and waits until it is ready and answers.
    /// `number` makes its address: 10.91.0.`number`.
    ///
    /// # Errors
    /// When it does not become ready, or its guest does not answer.
    pub fn vm(&self, name: &str, number: u8) -> Result<ClusterVm<'_>> {
        self.start(&self.document(name, number), self.handle(name, number))
    }

    fn start<'a>(&'a self, document: &str, vm: ClusterVm<'a>) -> Result<ClusterVm<'a>> {
        self.lab.apply(document)?;
        vm.wait_ready(START_LIMIT)?;
        vm.talk()?;
        Ok(vm)
    }

    /// The VirtualMachine that [`Self::vm`] applies.
    #[must_use]
    pub fn document(&self, name: &str, number: u8) -> String {
        self.guest.document(name, address(number), VOLUME)
    }

    /// A virtual machine that is there, or is about to be.
    #[must_use]
    pub fn handle(&self, name: &str, number: u8) -> ClusterVm<'_> {
        ClusterVm {
            cluster: self,
            name: name.to_owned(),
            address: address(number),
            volume: VOLUME,
        }
    }

    /// Drains a node as an administrator does; returns when kubectl has exited with 0.
    ///
    /// # Errors
    /// When it exits otherwise.
    pub fn drain(&self, node: &str) -> Result<Duration> {
        let begin = Instant::now();
        self.lab
            .kubectl_run()?
            .args([
                "drain",
                node,
                "--ignore-daemonsets",
                "--delete-emptydir-data",
                "--timeout=240s",
            ])
            .deadline(DRAIN_LIMIT)
            .done()
            .inspect_err(|_| self.lab.print_logs())?;
        Ok(begin.elapsed())
    }

    /// Deletes the node daemon's pod on a node and waits until the next one is ready.
    ///
    /// # Errors
    /// When there is none, or the next one does not become ready in time.
    pub fn restart_daemon(&self, node: &str) -> Result<()> {
        let on = format!("--field-selector=spec.nodeName={node}");
        let label = label_of("node");
        let which = ["-n", SYSTEM_NAMESPACE, &label, &on];
        let old = self.lab.get(&[&["pod"], &which[..]].concat())?;
        let old = old["items"][0]["metadata"]["uid"].clone();
        ensure!(old.is_string(), "{node} runs no node daemon");
        self.lab
            .kubectl(&[&["delete", "pod"], &which[..]].concat())?;
        let what = format!("the next node daemon on {node}");
        self.lab.wait_for(&what, POD_LIMIT, || {
            let pods = self.lab.get(&[&["pod"], &which[..]].concat())?;
            let pods = pods["items"].as_array().context("a list of pods")?;
            let next = pods.iter().find(|pod| pod["metadata"]["uid"] != old);
            condition(next.context("there is none yet")?, "Ready")
        })
    }

    /// Kills all pods of a component (`node`, `operator`). Returns their UIDs, for
    /// [`Self::wait_replaced`].
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn kill_pods(&self, component: &str) -> Result<Vec<Value>> {
        let label = label_of(component);
        let which = ["-n", SYSTEM_NAMESPACE, &label];
        let pods = self.lab.get(&[&["pod"], &which[..]].concat())?;
        let pods = pods["items"].as_array().context("a list of pods")?;
        let delete = ["delete", "pod", "--grace-period=0", "--force"];
        let delete = [&delete[..], &["--wait=false"], &which[..]].concat();
        self.lab.kubectl(&delete)?;
        Ok(pods.iter().map(uid).collect())
    }

    /// Waits until a component has as many other pods, all ready.
    ///
    /// # Errors
    /// When it has not in time.
    pub fn wait_replaced(&self, component: &str, old: &[Value]) -> Result<()> {
        let label = label_of(component);
        let what = format!("the next {} pods of {component}", old.len());
        self.lab.wait_for(&what, REPLACED_LIMIT, || {
            let pods = self.lab.get(&["pod", "-n", SYSTEM_NAMESPACE, &label])?;
            let pods = pods["items"].as_array().context("a list of pods")?;
            let next = pods.iter().filter(|pod| !old.contains(&uid(pod)));
            let ready = next.filter(|pod| condition(pod, "Ready").is_ok()).count();
            ensure!(ready == old.len(), "{ready} are ready");
            Ok(())
        })
    }

    /// `kubectl cordon`.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn cordon(&self, node: &str) -> Result<()> {
        self.lab.kubectl(&["cordon", node]).map(drop)
    }

    /// Waits until a node that was reset or turned on is Ready and reaches the volume again.
    ///
    /// # Errors
    /// When it does not come back in time.
    pub fn wait_back(&self, node: &str) -> Result<()> {
        self.lab.node(node)?.wait_ready(NODE_LIMIT)?;
        self.wait_volume()
    }

    /// `kubectl uncordon`.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn uncordon(&self, node: &str) -> Result<()> {
        self.lab.kubectl(&["uncordon", node]).map(drop)
    }

    /// Starts a pod of the lab's busybox on a node, with a program of it: no request, no limit, the
    /// cluster's default tolerations, never started again.
    ///
    /// # Errors
    /// When it does not run, or has not ended already, in time.
    pub fn pod(&self, name: &str, node: &str, program: &[&str]) -> Result<()> {
        self.lab.apply(&objects::pod(name, node, program))?;
        let what = format!("the pod {name} to run");
        self.lab.wait_for(&what, POD_LIMIT, || {
            let pod = self.lab.get(&["pod", name, "-n", NAMESPACE])?;
            let phase = pod["status"]["phase"].as_str().unwrap_or_default();
            ensure!(
                ["Running", "Failed"].contains(&phase),
                "it is {phase}: {}",
                pod["status"]
            );
            Ok(())
        })
    }

    /// Deletes a pod of [`Self::pod`] and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go.
    pub fn delete_pod(&self, name: &str) -> Result<()> {
        let args = ["delete", "pod", name, "-n", NAMESPACE, "--grace-period=1"];
        let run = self.lab.kubectl_run()?.args(args);
        run.deadline(DELETE_LIMIT).done()
    }

    /// Output of `kubectl get vm,sv,vmmig,failover`.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn overview(&self) -> Result<String> {
        self.lab.kubectl(&[
            "get",
            "vm,sv,vmmig,failover",
            "--all-namespaces",
            "-o",
            "wide",
        ])
    }
}

impl ClusterVm<'_> {
    /// The VirtualMachine as the API server has it.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn object(&self) -> Result<Value> {
        self.cluster.lab.get(&["vm", &self.name, "-n", NAMESPACE])
    }

    /// The node that it runs on, as its status says.
    ///
    /// # Errors
    /// When it says none.
    pub fn node(&self) -> Result<String> {
        let object = self.object()?;
        let node = object["status"]["node"].as_str();
        node.map(str::to_owned)
            .with_context(|| format!("{} has no node", self.name))
    }

    /// Waits until its Ready condition is true.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_ready(&self, limit: Duration) -> Result<()> {
        let what = format!("VirtualMachine {} to be ready", self.name);
        self.cluster
            .lab
            .wait_for(&what, limit, || condition(&self.object()?, "Ready"))
    }

    /// Waits until it is ready on another node than `left`, and says on which.
    ///
    /// # Errors
    /// When it is not in time.
    pub fn wait_elsewhere(&self, left: &str, limit: Duration) -> Result<String> {
        let what = format!(
            "VirtualMachine {} to be ready elsewhere than on {left}",
            self.name
        );
        self.cluster.lab.wait_for(&what, limit, || {
            condition(&self.object()?, "Ready")?;
            let node = self.node()?;
            if node == left {
                bail!("it is still on {left}")
            } else {
                Ok(node)
            }
        })
    }

    /// A TCP session with its guest, as soon as that answers.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn talk(&self) -> Result<Talk> {
        let what = format!("the guest of {} to answer", self.name);
        self.cluster.lab.wait_for(&what, GUEST_LIMIT, || {
            self.cluster.guest.talk(&self.cluster.lab, self.address)
        })
    }

    /// A flow of packets to the guest and back, at the rate that this tier's guest can handle.
    ///
    /// # Errors
    /// When the socket cannot be created.
    pub fn flow(&self) -> Result<crate::Flow> {
        self.cluster.guest.flow(&self.cluster.lab, self.address)
    }

    /// Its migrations, oldest first.
    ///
    /// # Errors
    /// When kubectl fails.
    pub fn moves(&self) -> Result<Vec<Moved>> {
        objects::moves(&self.cluster.lab, &self.name)
    }

    /// Creates a VirtualMachineMigration and waits for its end; one that fails is an error.
    ///
    /// # Errors
    /// When it fails, or does not end in time.
    pub fn migrate(&self, mode: &str, target: Option<&str>) -> Result<Moved> {
        let name = format!("{}-{}", self.name, self.moves()?.len());
        self.cluster
            .lab
            .apply(&objects::migration(&name, &self.name, mode, target))?;
        let what = format!("VirtualMachineMigration {name} to end");
        self.cluster.lab.wait_for(&what, MOVE_LIMIT, || {
            let object = self.cluster.lab.get(&["vmmig", &name, "-n", NAMESPACE])?;
            objects::ended(&object)
        })
    }

    /// Deletes it and waits until it is gone.
    ///
    /// # Errors
    /// When it does not go in time.
    pub fn delete(&self) -> Result<()> {
        let args = [
            "delete",
            "vm",
            &self.name,
            "-n",
            NAMESPACE,
            "--timeout=180s",
        ];
        self.cluster
            .lab
            .kubectl_run()?
            .args(args)
            .deadline(DELETE_LIMIT)
            .done()
            .inspect_err(|_| self.cluster.lab.print_logs())
    }
}

fn label_of(component: &str) -> String {
    format!("-lapp.kubernetes.io/component={component}")
}

fn uid(object: &Value) -> Value {
    object["metadata"]["uid"].clone()
}

const fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 91, 0, number)
}

/// The namespace of scenarios' virtual machines.
pub const NAMESPACE: &str = "default";
pub use bascule_lab::project::NAMESPACE as SYSTEM_NAMESPACE;
/// The SharedVolume of a scenario.
pub const VOLUME: &str = "gold";
/// The SharedVolume on the lab's SAN.
pub const SAN_VOLUME: &str = "san";

/// A coordinator's write takes milliseconds. All limits here allow for emulated nodes, which are ten
/// times slower than real ones.
const ROWS_LIMIT: Duration = Duration::from_secs(20);
/// A node that was turned on again: its boot, its services.
const NODE_LIMIT: Duration = Duration::from_secs(420);
const VOLUME_LIMIT: Duration = Duration::from_secs(300);
const POD_LIMIT: Duration = Duration::from_secs(180);
/// Several on each node at once.
const REPLACED_LIMIT: Duration = Duration::from_secs(300);
const START_LIMIT: Duration = Duration::from_secs(240);
const GUEST_LIMIT: Duration = Duration::from_secs(180);
const MOVE_LIMIT: Duration = Duration::from_secs(240);
const DRAIN_LIMIT: Duration = Duration::from_secs(270);
const DELETE_LIMIT: Duration = Duration::from_secs(200);
