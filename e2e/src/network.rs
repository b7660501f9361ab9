//! A network of the test's own: a namespace with a bridge, taps for guests, and the test's end.

use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// The test's own address on the bridge.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 1);
/// The address that the first guest is given.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 5);

/// A network namespace with a bridge; removed when dropped.
#[derive(Debug)]
pub struct Network {
    name: String,
    taps: AtomicU32,
}

/// A tap on the bridge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tap {
    /// The interface's name, within the namespace.
    pub name: String,
}

impl Network {
    /// Makes the namespace, its bridge and the test's address.
    ///
    /// # Errors
    /// When `ip` fails: no root, or no such kernel features.
    pub fn new() -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remove_leftovers()?;
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let name = format!("{PREFIX}{}-{count}", std::process::id());
        run(Command::new("ip").args(["netns", "add", &name]))?;
        let network = Self {
            name,
            taps: AtomicU32::new(0),
        };
        network.ip("link set lo up")?;
        // Without forward delay a port forwards at once; without snooping no frame waits for it.
        network.ip("link add br0 type bridge forward_delay 0 stp_state 0 mcast_snooping 0")?;
        network.ip(&format!("addr add {GATEWAY}/24 dev br0"))?;
        network.ip("link set br0 up")?;
        Ok(network)
    }

    /// Adds a tap to the bridge.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn tap(&self) -> Result<Tap> {
        let name = format!("tap{}", self.taps.fetch_add(1, Ordering::Relaxed));
        self.ip(&format!("tuntap add dev {name} mode tap"))?;
        self.ip(&format!("link set {name} master br0 up"))?;
        Ok(Tap { name })
    }

    /// Adds a tap to the bridge that drops what its guest sends with another source address than `mac`, as that of a
    /// node does.
    ///
    /// # Errors
    /// When `ip` or `tc` fails.
    pub fn tap_of(&self, mac: [u8; 6]) -> Result<Tap> {
        let tap = self.tap()?;
        let [a, b, c, d, e, f] = mac;
        let high = u32::from_be_bytes([a, b, c, d]);
        let low = u32::from_be_bytes([0, 0, e, f]);
        // Classic BPF, and the actions TC_ACT_OK and TC_ACT_SHOT: the six bytes behind the destination are compared.
        let program = format!("6,32 0 0 6,21 0 3 {high},40 0 0 10,21 0 1 {low},6 0 0 0,6 0 0 2");
        let words = ["dev", tap.name.as_str()];
        run(self
            .command("tc")
            .args(["qdisc", "add"])
            .args(words)
            .arg("ingress"))?;
        let filter = [
            "parent", "ffff:", "protocol", "all", "bpf", "da", "bytecode",
        ];
        run(self
            .command("tc")
            .args(["filter", "add"])
            .args(words)
            .args(filter)
            .arg(program))?;
        Ok(tap)
    }

    /// Takes a tap off its bridge, or puts it back.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn plug(&self, tap: &Tap, plugged: bool) -> Result<()> {
        let bridge = if plugged { "master br0" } else { "nomaster" };
        self.ip(&format!("link set {} {bridge}", tap.name))
    }

    /// A command that runs `program` within the namespace, under its own process id.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        // Not `ip netns exec`: it mounts another /sys, without the cgroup hierarchies.
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{}", self.name))
            .arg("--")
            .arg(program);
        command
    }

    /// A TCP connection from the test's end.
    ///
    /// # Errors
    /// When it is refused or takes longer than `limit`.
    pub fn connect(&self, to: SocketAddrV4, limit: Duration) -> Result<TcpStream> {
        self.within(|| {
            TcpStream::connect_timeout(&SocketAddr::V4(to), limit)
                .with_context(|| format!("connect to {to}"))
        })
    }

    /// A UDP socket at the test's end, connected to a peer.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn udp(&self, to: SocketAddrV4) -> Result<UdpSocket> {
        self.within(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("bind")?;
            socket
                .connect(to)
                .with_context(|| format!("connect to {to}"))?;
            Ok(socket)
        })
    }

    /// Runs `work` on a thread within the namespace; sockets that it creates stay there.
    fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let path = format!("/run/netns/{}", self.name);
        let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
        std::thread::scope(|scope| {
            let thread = std::thread::Builder::new().name("in-netns".into());
            let entered = move || {
                let kind = Some(LinkNameSpaceType::Network);
                move_into_link_name_space(namespace.as_fd(), kind).context("enter the network")?;
                work()
            };
            let handle = thread
                .spawn_scoped(scope, entered)
                .context("start a thread")?;
            handle
                .join()
                .map_err(|_| anyhow!("the thread within the network panicked"))?
        })
    }

    fn ip(&self, words: &str) -> Result<()> {
        let netns = ["-n", self.name.as_str()];
        run(Command::new("ip")
            .args(netns)
            .args(words.split_ascii_whitespace()))
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if let Err(error) = run(Command::new("ip").args(["netns", "del", &self.name])) {
            eprintln!("{error:#}");
        }
    }
}

/// Removes namespaces of test processes that were killed.
fn remove_leftovers() -> Result<()> {
    let Ok(entries) = std::fs::read_dir("/run/netns") else {
        return Ok(());
    };
    for entry in entries {
        let name = entry.context("list namespaces")?.file_name();
        let Some(name) = name.to_str() else { continue };
        let owner = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split_once('-'));
        if let Some((pid, _)) = owner
            && !std::path::Path::new("/proc").join(pid).exists()
        {
            // Another test may be removing the same one.
            if let Err(error) = run(Command::new("ip").args(["netns", "del", name])) {
                eprintln!("{error:#}");
            }
        }
    }
    Ok(())
}

/// Runs a program of the host; its error says what it wrote.
pub(crate) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .output()
        .with_context(|| format!("run {command:?}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.success(),
        "{command:?} fails: {}",
        said.trim()
    );
    Ok(())
}

const PREFIX: &str = "bsc-e2e-";
