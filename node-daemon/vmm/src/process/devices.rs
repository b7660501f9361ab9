//! The devices of a configuration, in the order that decides their PCI slots.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, ensure};
use bascule_devices::blk::{BlkConfig, BlkDevice, BlkMetrics, Serial};
use bascule_devices::console::{ConsoleConfig, ConsoleDevice};
use bascule_devices::disk::{AlwaysOpen, Disk, ErrorPolicy, VolumeGate, WriteGate};
use bascule_devices::net::{MacAddress, NetConfig, NetDevice, NetHandle, TapFd};
use bascule_devices::rng::{RngConfig, RngDevice};
use bascule_ipc::vm::{DiskConfig, DiskSource, StartMode, VmConfig};
use bascule_types::{Bytes, DiskRole, DiskRow, ExtentRun, Lba};

use super::home_volume::Opened;
use super::no_cloud;
use crate::VmBuilder;
use crate::clock::SystemClock;
use crate::guest_agent::{self, AgentHandle, Duties};

/// Most queues of a disk. One per vCPU is best; more than four only cost memory.
const DISK_QUEUES_MAX: u16 = 4;

/// The devices' counters and handles, for the status and announcements.
#[derive(Debug, Default)]
pub(crate) struct Devices {
    /// Each disk's name and counters, in order.
    pub(crate) disks: Vec<(String, Arc<BlkMetrics>)>,
    /// Each disk's name and what an error on it does.
    pub(crate) policies: Vec<(String, Arc<ErrorPolicy>)>,
    /// Each interface, in order.
    pub(crate) interfaces: Vec<NetHandle>,
    /// The client of the guest's agent, if the guest has a port for one.
    pub(crate) agent: Option<AgentHandle>,
}

impl Devices {
    /// Whether some disk's writes wait for the gate.
    pub(crate) fn io_stalled(&self) -> bool {
        self.disks.iter().any(|(_, disk)| disk.counts().stalled)
    }

    /// The disks with commands under way, for the user; none when there are none.
    pub(crate) fn unanswered(&self) -> Option<String> {
        let disks = self.disks.iter().filter_map(|(name, disk)| {
            let count = disk.counts().in_flight;
            (count > 0).then(|| format!("disk {name:?} to answer {count} commands"))
        });
        let words: Vec<String> = disks.collect();
        (!words.is_empty()).then(|| words.join(", "))
    }

    /// The MTU in bytes that was offered to the guest on each interface, 0 where none was.
    pub(crate) fn offered_mtus(&self) -> Vec<u16> {
        let interfaces = self.interfaces.iter();
        interfaces
            .map(|nic| nic.offered_mtu().unwrap_or(0))
            .collect()
    }

    /// Announces the guest's addresses once on every interface, even when some fail.
    ///
    /// # Errors
    /// Of the last interface that failed.
    pub(crate) fn announce(&self) -> io::Result<()> {
        let mut announced = Ok(());
        for nic in &self.interfaces {
            announced = nic.announce().map(drop).and(announced);
        }
        announced
    }
}

/// Adds every device: entropy first, then disks, then interfaces, and last cloud-init's disk and the agent's port, so
/// that no other device changes its place when a guest gets one. `press_button` is for a guest that its agent has not
/// shut down; it may block.
pub(super) fn add(
    builder: &mut VmBuilder,
    config: &VmConfig,
    home: Option<(&Opened, &Arc<VolumeGate>)>,
    taps: Vec<io::Result<TapFd>>,
    press_button: impl Fn() + Send + 'static,
) -> anyhow::Result<Devices> {
    let mut devices = Devices::default();
    let rng = RngConfig {
        name: "rng0".to_owned(),
    };
    let rng = RngDevice::new(&rng, builder.device_context()).context("rng0")?;
    builder.add_device(Box::new(rng.function))?;
    for (index, disk) in config.disks.iter().enumerate() {
        let (backing, read_only) =
            backing(disk, home).with_context(|| format!("disks: {:?}", disk.name))?;
        let errors = Arc::new(ErrorPolicy::new(disk.on_error));
        let backing = backing.with_errors(Arc::clone(&errors));
        let settings = BlkConfig {
            name: format!("blk{index}"),
            serial: Serial::of_name(&disk.name),
            queue_count: u16::from(config.cpus).clamp(1, DISK_QUEUES_MAX),
            read_only,
        };
        let device = BlkDevice::new(&settings, backing, builder.device_context())?;
        builder.add_device(Box::new(device.function))?;
        devices.disks.push((disk.name.clone(), device.metrics));
        devices.policies.push((disk.name.clone(), errors));
    }
    for ((index, interface), tap) in config.interfaces.iter().enumerate().zip(taps) {
        let settings = NetConfig {
            name: format!("net{index}"),
            mac: MacAddress(interface.mac),
            mtu: interface.mtu,
            // A live migration has a guest to leave where it is; a saved one has nothing else.
            refuses_larger_mtu: matches!(config.start, StartMode::Incoming { .. }),
        };
        let tap = tap.with_context(|| format!("interfaces: open tap {:?}", interface.tap))?;
        let device = NetDevice::new(&settings, Arc::new(tap), builder.device_context())
            .context(settings.name)?;
        builder.add_device(Box::new(device.function))?;
        devices.interfaces.push(device.handle);
    }
    if let Some(contents) = &config.cloud_init {
        let disk = no_cloud::disk(config, contents).context("cloudInit")?;
        let settings = BlkConfig {
            name: "cloud-init".to_owned(),
            serial: Serial::of_name(no_cloud::NAME),
            queue_count: 1,
            read_only: true,
        };
        let device = BlkDevice::new(&settings, disk, builder.device_context())?;
        builder.add_device(Box::new(device.function))?;
    }
    if config.guest_agent {
        let agent = add_agent_port(builder, config, Box::new(press_button));
        devices.agent = Some(agent.context("guestAgent")?);
    }
    Ok(devices)
}

/// Adds the port of the guest's agent, and starts the agent's client.
fn add_agent_port(
    builder: &mut VmBuilder,
    config: &VmConfig,
    press_button: Box<dyn Fn() + Send>,
) -> anyhow::Result<AgentHandle> {
    let (port, agent) = guest_agent::start(Duties {
        macs: config.interfaces.iter().map(|nic| nic.mac).collect(),
        set_time: config.start == StartMode::Restore,
        press_button,
        clock: Arc::new(SystemClock),
    })?;
    let settings = ConsoleConfig {
        name: "agent0".to_owned(),
        port: guest_agent::PORT.to_owned(),
    };
    let device = ConsoleDevice::new(&settings, port, builder.device_context())?;
    builder.add_device(Box::new(device.function))?;
    Ok(agent)
}

/// Where a disk's blocks are, and whether it is read-only.
fn backing(
    disk: &DiskConfig,
    home: Option<(&Opened, &Arc<VolumeGate>)>,
) -> anyhow::Result<(Disk, bool)> {
    match &disk.source {
        DiskSource::File { path, read_only } => {
            let disk =
                file_disk(path, *read_only).with_context(|| format!("open {}", path.display()))?;
            Ok((disk, *read_only))
        }
        DiskSource::Volume { disk, read_only } => {
            let (opened, gate) = home.context("the VM has no home volume")?;
            let disk = volume_disk(opened, opened.disk(disk)?, Arc::clone(gate) as _)?;
            Ok((disk, *read_only))
        }
    }
}

fn volume_disk(opened: &Opened, row: &DiskRow, gate: Arc<dyn WriteGate>) -> anyhow::Result<Disk> {
    ensure!(!row.importing, "{} is still being imported", row.name);
    ensure!(
        row.role == DiskRole::Data,
        "{} is not a data disk but a {:?}",
        row.name,
        row.role
    );
    let device = OwnedFd::from(opened.device.try_clone().context("clone the device")?);
    let disk = Disk::new(device, &row.extents, row.size, gate)?;
    Ok(disk.with_settle(opened.settle))
}

/// A whole file as a disk, without a gate: the user must ensure that no other process writes it.
fn file_disk(path: &Path, read_only: bool) -> anyhow::Result<Disk> {
    let file = open_direct(path, read_only)?;
    // Not the metadata's length, which a block device does not have.
    let length = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    ensure!(length > 0, "it is empty");
    let run = ExtentRun {
        start: Lba(0),
        length: Bytes(length),
    };
    Ok(Disk::new(
        OwnedFd::from(file),
        &[run],
        Bytes(length),
        Arc::new(AlwaysOpen),
    )?)
}

/// Opens with direct I/O wherever the file system has it.
fn open_direct(path: &Path, read_only: bool) -> io::Result<File> {
    let open = |flags| {
        OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(flags)
            .open(path)
    };
    match open(libc::O_DIRECT) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => open(0),
        other => other,
    }
}
