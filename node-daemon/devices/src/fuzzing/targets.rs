//! The devices that are fuzzed, with the other end of each in a socket.

use std::os::unix::net::UnixDatagram;
use std::sync::Arc;

use bascule_types::{Bytes, ExtentRun, Lba};

use crate::blk::{BlkConfig, BlkDevice, Serial};
use crate::console::{ConsoleConfig, ConsoleDevice, HostPort};
use crate::disk::{AlwaysOpen, Disk};
use crate::net::{MacAddress, NetConfig, NetDevice, Tap};
use crate::rng::{RngConfig, RngDevice};
use crate::testing::TestMachine;
use crate::virtio::VirtioFunction;

pub(crate) fn block_device(machine: &TestMachine, size: u64, queue_count: u16) -> VirtioFunction {
    let file = tempfile::tempfile().unwrap();
    file.set_len(size).unwrap();
    let run = ExtentRun {
        start: Lba(0),
        length: Bytes(size),
    };
    let mut disk = Disk::new(file.into(), &[run], run.length, Arc::new(AlwaysOpen)).unwrap();
    disk.block_bytes = 4096;
    let config = BlkConfig {
        name: "blk0".into(),
        serial: Serial::default(),
        queue_count,
        read_only: false,
    };
    BlkDevice::new(&config, disk, machine.context())
        .unwrap()
        .function
}

/// A console device and the host at the other end of its port.
pub(crate) fn console_device(machine: &TestMachine) -> (VirtioFunction, UnixDatagram) {
    let (port, host) = UnixDatagram::pair().unwrap();
    port.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    let config = ConsoleConfig {
        name: "agent0".into(),
        port: "org.qemu.guest_agent.0".into(),
    };
    let port = Arc::new(SocketPort(port));
    let device = ConsoleDevice::new(&config, port, machine.context()).unwrap();
    (device.function, host)
}

pub(super) fn entropy_device(machine: &TestMachine) -> VirtioFunction {
    let config = RngConfig {
        name: "rng0".into(),
    };
    RngDevice::new(&config, machine.context()).unwrap().function
}

/// A network device and the network at its other end.
pub(crate) fn network_device(
    machine: &TestMachine,
    mac: MacAddress,
) -> (VirtioFunction, UnixDatagram) {
    let (socket, network) = UnixDatagram::pair().unwrap();
    socket.set_nonblocking(true).unwrap();
    network.set_nonblocking(true).unwrap();
    let config = NetConfig {
        name: "net0".into(),
        mac,
        mtu: Some(1450),
        refuses_larger_mtu: true,
    };
    let tap = Arc::new(SocketTap(socket));
    let device = NetDevice::new(&config, tap, machine.context()).unwrap();
    (device.function, network)
}

#[derive(Debug)]
struct SocketTap(UnixDatagram);

impl Tap for SocketTap {
    fn raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }
    fn receive(&self, frame: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(frame)
    }
    fn send(&self, frame: &[u8]) -> std::io::Result<()> {
        self.0.send(frame).map(drop)
    }
    fn set_offloads(&self, _flags: u32) -> std::io::Result<()> {
        Ok(())
    }
}

#[derive(Debug)]
struct SocketPort(UnixDatagram);

impl HostPort for SocketPort {
    fn raw_fd(&self) -> std::os::fd::RawFd {
        std::os::fd::AsRawFd::as_raw_fd(&self.0)
    }
    fn receive(&self, data: &mut [u8]) -> std::io::Result<usize> {
        self.0.recv(data)
    }
    fn send(&self, data: &[u8]) -> std::io::Result<usize> {
        self.0.send(data)
    }
    fn guest_opened(&self, _open: bool) {}
}

/// The address of the network device in the golden states.
pub(crate) const GOLDEN_MAC: MacAddress = MacAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]);
