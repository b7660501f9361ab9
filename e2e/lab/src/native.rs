//! Nodes of the native tier: namespaces of this machine.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::cgroup::{Cgroup, hierarchies};
use crate::command::Run;
use crate::hub::{Hub, create_netns, netns_with_prefix};
use crate::init::NativeSpec;
use crate::names::{MGMT_BRIDGE, NodeIndex, VM_BRIDGE};
use crate::node_conf::{MachineContext, NodeFiles};
use crate::process::{Daemon, ProcessId};
use crate::tools::lab_binary;
use crate::wait::{PermanentError, wait_for};

/// The native part of a node's `spec.json`: host directories, cgroup hierarchies, device nodes.
pub(crate) fn native_spec(files: &NodeFiles) -> Result<NativeSpec> {
    let (var_lib, var_log) = (files.dir.join("var-lib"), files.dir.join("var-log"));
    for dir in [&var_lib, &var_log] {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    Ok(NativeSpec {
        conf: files.conf.clone(),
        var_lib,
        var_log,
        cgroups: hierarchies()?,
        devices: DEVICES.iter().map(|&name| name.to_owned()).collect(),
    })
}

/// Starts the node and returns its PID 1. Killing that process is a power cut.
pub(crate) fn start(context: &MachineContext<'_>, node: NodeIndex) -> Result<ProcessId> {
    let name = node.name();
    let netns = context.name.node_netns(&name);
    if netns_with_prefix(&netns)?.contains(&netns) {
        // A power cut loses the node's network configuration.
        Run::new("ip").args(["netns", "del", &netns]).done()?;
    }
    create_netns(&netns)?;
    plug_in(context, node, &netns)?;
    let cgroup = format!("{}/{name}", context.name.cgroup());
    let group = Cgroup::at(&cgroup)?;
    group.kill_all()?;
    group.remove()?;
    group.create()?;

    let lab = lab_binary()?;
    let lab = lab.to_string_lossy();
    let spec = context.files.conf.join("spec.json");
    let spec = spec.to_string_lossy();
    let argv = [
        "unshare",
        "--mount",
        "--pid",
        "--uts",
        "--ipc",
        "--cgroup",
        "--fork",
        "--kill-child",
        "--mount-proc",
        &lab,
        "node-init",
        "--spec",
        &spec,
    ];
    let log = context.logs.join(format!("{name}-init.log"));
    let outer = Daemon::new(cgroup, &log, argv).in_netns(netns).start()?;
    wait_for(&format!("PID 1 of {name}"), Duration::from_secs(10), || {
        if !outer.alive() {
            return Err(PermanentError(format!("it ended at once: see {}", log.display())).into());
        }
        init_of(outer)
    })
}

/// A native node is two cables and a process; its interfaces are made anew at each start.
fn plug_in(context: &MachineContext<'_>, node: NodeIndex, netns: &str) -> Result<()> {
    let hub = Hub::new(context.name);
    let hub_netns = context.name.hub_netns();
    for (number, bridge, interface) in [(0, MGMT_BRIDGE, "eth0"), (1, VM_BRIDGE, "eth1")] {
        let (port, mac) = (Hub::port(bridge, node), node.mac(number));
        // The kernel takes the last boot's cable away with its namespace, a moment later.
        wait_for(
            &format!("the old cable {port} to go"),
            Duration::from_secs(10),
            || {
                let gone = hub.run("ip").args(["link", "delete", &port]).output()?;
                ensure!(
                    gone.stderr.contains("Cannot find"),
                    "{}",
                    gone.stderr.trim()
                );
                Ok(())
            },
        )?;
        Run::new("ip")
            .args([
                "link", "add", &port, "netns", &hub_netns, "type", "veth", "peer",
            ])
            .args(["name", interface, "netns", netns, "address", &mac])
            .done()?;
        hub.ip(&["link", "set", &port, "master", bridge])?;
        hub.ip(&["link", "set", &port, "up"])?;
    }
    hub.route_pods(context.families, node)
}

/// The child of `unshare --fork`: the namespace's first process, seen from here.
fn init_of(outer: ProcessId) -> Result<ProcessId> {
    let pid = outer.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"))
        .context("list the children of unshare")?;
    let child = children
        .split_whitespace()
        .next()
        .context("unshare has no child yet")?;
    let child = ProcessId::of(child.parse().context("process id")?)?;
    let namespace =
        |pid: i32| fs::read_link(Path::new("/proc").join(pid.to_string()).join("ns/pid"));
    let (inner, own) = (namespace(child.pid())?, fs::read_link("/proc/self/ns/pid")?);
    ensure!(inner != own, "the child is not in its namespace yet");
    Ok(child)
}

/// Device nodes that a native node has; those that the host lacks are left out.
const DEVICES: &[&str] = &[
    "full",
    "fuse",
    "kmsg",
    "kvm",
    "net/tun",
    "null",
    "random",
    "tty",
    "urandom",
    "userfaultfd",
    "zero",
];
