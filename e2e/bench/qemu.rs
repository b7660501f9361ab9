//! The baseline: live migration of the guest by QEMU.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bascule_e2e::{Console, CpuMeter, Network, Qemu, QemuSpec};

use crate::measure::{Load, Outcome, Said, Watch};

/// Boots the guest in one QEMU and migrates it to another.
pub(crate) fn migrate(load: Load, memory_mib: u32, downtime: Duration) -> Result<Outcome> {
    let network = Network::new()?;
    let directory = tempfile::tempdir().context("make a directory")?;
    let start = |name: &str, incoming_port| {
        let spec = QemuSpec {
            memory_mib,
            cmdline: load.cmdline(),
            disk: None,
            incoming_port,
        };
        Qemu::start(&network, &network.tap()?, directory.path(), name, &spec)
    };
    let mut source = start("source", None)?;
    let console = Console::new();
    console.follow(source.console()?)?;
    let mut destination = start("destination", Some(PORT))?;
    console.follow(destination.console()?)?;

    let watch = Watch::start(&network, console, load)?;
    let meter = CpuMeter::start(&[source.process(), destination.process()])?;
    let started = Instant::now();
    let said = source.migrate(PORT, downtime, MIGRATION_TIME)?;
    let total = started.elapsed();
    let cpu = meter.finish()?;
    let said_ours = Said {
        downtime: said.downtime,
        bytes: said.bytes,
    };
    watch.finish(total, said_ours, cpu)
}

/// On the loopback address of the run's own network.
const PORT: u16 = 4444;
const MIGRATION_TIME: Duration = Duration::from_secs(120);
