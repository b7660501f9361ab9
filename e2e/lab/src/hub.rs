//! The hub: one network namespace per lab with the bridges that its nodes are connected to.
//!
//! The control plane runs in it, and so do the clients of a test ([`Hub::connect`], [`Hub::run`]): nothing of a lab
//! is reachable from, or reaches, the host's own network.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use crate::addresses::Families;
use crate::command::Run;
use crate::names::{HUB_VM_ADDRESS, LabName, MGMT_BRIDGE, NodeIndex, VM_BRIDGE};
use crate::process::enter_netns;

/// The hub of a lab.
#[derive(Debug, Clone)]
pub struct Hub {
    name: LabName,
}

impl Hub {
    /// The hub of lab `name`, made or not.
    pub fn new(name: &LabName) -> Self {
        Self { name: name.clone() }
    }

    /// Creates the namespace and its bridges.
    pub fn create(&self, families: Families) -> Result<()> {
        create_netns(&self.name.hub_netns())?;
        self.ip(&["link", "set", "lo", "up"])?;
        let management = families
            .each()
            .map(|family| format!("{}/{}", family.hub(), family.management_prefix()));
        for (bridge, addresses) in [
            (MGMT_BRIDGE, management.collect()),
            (VM_BRIDGE, vec![format!("{HUB_VM_ADDRESS}/24")]),
        ] {
            self.ip(&["link", "add", bridge, "type", "bridge"])?;
            for address in addresses {
                // No duplicate address detection: it delays the address by a second.
                self.ip(&["addr", "add", &address, "dev", bridge, "nodad"])?;
            }
            self.ip(&["link", "set", bridge, "up"])?;
        }
        Ok(())
    }

    /// Name of the hub's interface for a node on this bridge.
    pub fn port(bridge: &str, node: NodeIndex) -> String {
        let kind = if bridge == MGMT_BRIDGE { "m" } else { "v" };
        format!("{kind}-{}", node.name())
    }

    /// Adds a route to a node's pods, for admission webhooks and tests.
    pub fn route_pods(&self, families: Families, node: NodeIndex) -> Result<()> {
        families.each().try_for_each(|family| {
            let (pods, via) = (family.pods_of(node), family.node(node).to_string());
            self.ip(&["route", "replace", &pods, "via", &via, "dev", MGMT_BRIDGE])
        })
    }

    /// `ip` in the hub.
    pub fn ip(&self, args: &[&str]) -> Result<()> {
        self.run("ip").args(args).done()
    }

    /// A program in the hub's network.
    pub fn run(&self, program: &str) -> Run {
        Run::in_netns(&self.name.hub_netns(), program)
    }

    /// A TCP connection from the hub.
    pub fn connect(&self, address: SocketAddr, timeout: Duration) -> Result<TcpStream> {
        self.enter(move || TcpStream::connect_timeout(&address, timeout))?
            .with_context(|| format!("connect to {address}"))
    }

    /// Calls `body` on a thread that is in the hub's network; sockets it makes stay there when they are returned.
    pub fn enter<T: Send + 'static>(&self, body: impl FnOnce() -> T + Send + 'static) -> Result<T> {
        let netns = self.name.hub_netns();
        let thread = thread::Builder::new()
            .name("hub".into())
            .spawn(move || enter_netns(&netns).map(|()| body()))
            .context("start a thread for the hub")?;
        thread
            .join()
            .map_err(|_| anyhow!("the thread in the hub panicked"))?
    }
}

/// Makes a named network namespace.
pub(crate) fn create_netns(name: &str) -> Result<()> {
    Run::new("ip").args(["netns", "add", name]).done()
}

/// Names of the network namespaces that begin with `prefix`.
pub(crate) fn netns_with_prefix(prefix: &str) -> Result<Vec<String>> {
    let entries = match std::fs::read_dir("/run/netns") {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("list /run/netns"),
    };
    let names = entries.filter_map(|entry| Some(entry.ok()?.file_name().to_string_lossy().into()));
    Ok(names
        .filter(|name: &String| name.starts_with(prefix))
        .collect())
}
