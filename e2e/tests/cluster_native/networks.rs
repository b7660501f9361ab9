//! A network with jumbo frames, and a virtual IP that has left its guest: what a migration changes and announces. A
//! firewall on the nodes: what a migration needs.

use std::net::Ipv4Addr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bascule_e2e::kubernetes::{ClusterVm, Installation, Talk};
use bascule_lab::command::Run;
use bascule_lab::hub::Hub;
use bascule_lab::names::{HUB_VM_ADDRESS, VM_BRIDGE};
use bascule_lab::{Lab, Node};
use bascule_probe_wire::TCP_PORT;
use serde_json::Value;

use super::CLUSTER;

#[test]
fn jumbo_frames_stay_and_no_address_that_has_left_a_guest_is_announced_by_its_target() {
    let name = "jumbo_frames_stay_and_no_address_that_has_left_a_guest_is_announced_by_its_target";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        let jumbo = Jumbo::new(lab).unwrap();
        let vm = cluster.vm("jumbo", 92).unwrap();
        assert_all_jumbo(lab);
        let mut talk = vm.talk().unwrap();
        let mac = vm.object().unwrap()["status"]["interfaces"][0]["mac"].clone();
        let mac = mac.as_str().unwrap();

        // The control: an address that is the guest's is announced by the target.
        set_alias(&mut talk, &VIRTUAL_IP.to_string()).unwrap();
        lab.connect((VIRTUAL_IP, TCP_PORT).into(), CONNECT_LIMIT)
            .unwrap();
        move_and_await_announcement(cluster, &vm, mac, &[VIRTUAL_IP]);
        talk.ping().unwrap();
        assert_all_jumbo(lab);

        set_alias(&mut talk, "none").unwrap();
        let peer = Peer::with_address(lab, VIRTUAL_IP).unwrap();
        // In the guest's queue behind the peer's claim.
        talk.ping().unwrap();
        move_and_await_announcement(cluster, &vm, mac, &[]);
        assert_eq!(neighbor(lab, VIRTUAL_IP).unwrap(), peer.mac, "hijacked");
        talk.ping().unwrap();
        drop(peer);

        talk.check().unwrap();
        vm.delete().unwrap();
        drop(jumbo);
    });
}

/// It takes some seconds.
#[test]
fn a_guest_moves_between_nodes_whose_firewalls_let_only_the_documented_ports_through() {
    CLUSTER.with_vm("firewalled", 93, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let firewall = Firewall::new(lab).unwrap();
        // The control: a port that is not in the table.
        let [one, other] = lab.nodes().collect::<Vec<_>>()[..] else {
            panic!("two nodes")
        };
        let kubelet = format!("/dev/tcp/{}/10250", other.address());
        let dialled = one
            .in_netns("timeout")
            .args(["1", "bash", "-c", &format!("echo >{kubelet}")])
            .output()
            .unwrap();
        assert!(
            !dialled.status.success(),
            "the firewall lets {kubelet} through"
        );

        for _there_and_back in 0..2 {
            vm.migrate("Live", None).unwrap();
            talk.ping().unwrap();
        }
        talk.check().unwrap();
        drop(firewall);
    });
}

fn set_alias(talk: &mut Talk, address: &str) -> Result<()> {
    match talk {
        Talk::Probe(session) => session.command(&format!("set alias={address}")),
        Talk::Debian(_) => bail!("the native tier's guest is the probe"),
    }
}

/// Moves the guest after the hub was told wrong MAC addresses of it and of `more`, which only an announcement
/// corrects, because the hub sends nothing to these addresses meanwhile.
fn move_and_await_announcement(
    cluster: &Installation,
    vm: &ClusterVm<'_>,
    mac: &str,
    more: &[Ipv4Addr],
) {
    let lab = cluster.lab();
    let announced = [&[vm.address], more].concat();
    for address in &announced {
        let address = address.to_string();
        let wrong = ["lladdr", NOBODY, "dev", VM_BRIDGE, "nud", "stale"];
        let replace = [&["neigh", "replace", &address][..], &wrong].concat();
        lab.hub().ip(&replace).unwrap();
    }
    vm.migrate("Live", None).unwrap();
    lab.wait_for("the announcements", SAID_LIMIT, || {
        for &address in &announced {
            let known = neighbor(lab, address)?;
            ensure!(known == mac, "{address} is at {known}");
        }
        Ok(())
    })
    .unwrap();
}

/// Where the hub takes an address to be.
fn neighbor(lab: &Lab, address: Ipv4Addr) -> Result<String> {
    let address = address.to_string();
    let list = ["-j", "neigh", "show", &address, "dev", VM_BRIDGE];
    let list = json(lab.hub().run("ip").args(list))?;
    let mac = list[0]["lladdr"].as_str();
    mac.map(str::to_owned).context("it is not known")
}

/// The bridge of every node, and everything on it.
fn assert_all_jumbo(lab: &Lab) {
    for node in lab.nodes() {
        for which in [&["master"][..], &["dev"]] {
            let show = [&["-j", "link", "show"], which, &[VM_BRIDGE]].concat();
            let list = json(node.in_netns("ip").args(show)).unwrap();
            for link in list.as_array().unwrap() {
                assert_eq!(link["mtu"], JUMBO, "{} on {}", link["ifname"], node.name());
            }
        }
    }
}

fn json(run: Run) -> Result<Value> {
    serde_json::from_str(&run.text()?).context("parse what ip says")
}

/// The virtual machines' network with large frames; as before when dropped.
struct Jumbo<'a>(&'a Lab);

impl<'a> Jumbo<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let jumbo = Self(lab);
        lab.nodes().try_for_each(|node| set_mtu(lab, node, JUMBO))?;
        Ok(jumbo)
    }
}

impl Drop for Jumbo<'_> {
    fn drop(&mut self) {
        let mut nodes = self.0.nodes();
        if let Err(error) = nodes.try_for_each(|node| set_mtu(self.0, node, 1500)) {
            eprintln!("{error:#}");
        }
    }
}

/// The node's cable. Its bridge takes the smallest MTU of its ports.
fn set_mtu(lab: &Lab, node: Node<'_>, mtu: u32) -> Result<()> {
    let (port, mtu) = (Hub::port(VM_BRIDGE, node.index()), mtu.to_string());
    lab.hub().ip(&["link", "set", &port, "mtu", &mtu])?;
    let cable = ["link", "set", "eth1", "mtu", &mtu];
    node.in_netns("ip").args(cable).done()
}

/// What docs/networking.md says that nodes must let through, and what every node needs for its own network; all
/// other connections to a node are dropped, until it is dropped.
struct Firewall<'a>(&'a Lab);

impl<'a> Firewall<'a> {
    fn new(lab: &'a Lab) -> Result<Self> {
        let firewall = Self(lab);
        let documented = include_str!("../../../docs/networking.md");
        let between = documented
            .lines()
            .find(|line| line.contains("**Between nodes**"));
        ensure!(
            between.is_some_and(|line| line.contains("7410, 7420-7435 and the migration ports"))
        );
        ensure!(documented.contains("49152-49215"));
        let rules = "table inet firewall {
            chain input {
                type filter hook input priority 0; policy drop;
                ct state established,related accept
                iif lo accept
                meta l4proto { icmp, icmpv6 } accept
                tcp dport { 7410, 7420-7435, 49152-49215 } accept
            }
        }";
        for node in lab.nodes() {
            node.in_netns("nft").args(["-f", "-"]).stdin(rules).done()?;
        }
        Ok(firewall)
    }
}

impl Drop for Firewall<'_> {
    fn drop(&mut self) {
        for node in self.0.nodes() {
            let delete = ["delete", "table", "inet", "firewall"];
            if let Err(error) = node.in_netns("nft").args(delete).done() {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Another machine on the virtual machines' network.
struct Peer {
    netns: String,
    mac: String,
}

impl Peer {
    /// One that has taken this address over, and of which the network knows it.
    fn with_address(lab: &Lab, address: Ipv4Addr) -> Result<Self> {
        // Below the lab's prefix, so that it goes with the lab.
        let hub = lab.state().name.hub_netns();
        let netns = format!("{}peer", lab.state().name.netns_prefix());
        let ip = |netns: &str, args: &[&str]| Run::in_netns(netns, "ip").args(args).done();
        Run::new("ip").args(["netns", "add", &netns]).done()?;
        let mac = "02:ba:5c:00:09:09".to_owned();
        let peer = Self { netns, mac };
        let netns = &peer.netns;
        let pair = ["type", "veth", "peer", "name", "eth0", "address", &peer.mac];
        let add = [&["link", "add", "v-peer"][..], &pair, &["netns", netns]].concat();
        ip(&hub, &add)?;
        ip(&hub, &["link", "set", "v-peer", "master", VM_BRIDGE, "up"])?;
        let own = format!("{address}/24");
        ip(netns, &["addr", "add", &own, "dev", "eth0"])?;
        ip(netns, &["link", "set", "eth0", "up"])?;
        lab.wait_for("the network to learn of the peer", SAID_LIMIT, || {
            // Its ARP request for the hub goes to everyone, and names its sender.
            ip(netns, &["neigh", "flush", "dev", "eth0"])?;
            let hub = HUB_VM_ADDRESS.to_string();
            Run::in_netns(netns, "ping")
                .args(["-c1", "-W2", &hub])
                .done()?;
            let known = neighbor(lab, address)?;
            ensure!(known == peer.mac, "{address} is at {known}");
            Ok(())
        })?;
        Ok(peer)
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let delete = ["netns", "del", &self.netns];
        if let Err(error) = Run::new("ip").args(delete).done() {
            eprintln!("{error:#}");
        }
    }
}

const JUMBO: u32 = 9000;
const VIRTUAL_IP: Ipv4Addr = Ipv4Addr::new(10, 91, 0, 200);
/// No machine has this address.
const NOBODY: &str = "02:ba:5c:00:ff:ff";
const CONNECT_LIMIT: Duration = Duration::from_secs(10);
const SAID_LIMIT: Duration = Duration::from_secs(30);
