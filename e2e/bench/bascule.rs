//! Bascule moving the guest.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bascule_e2e::{Console, CpuMeter, TestCluster, TestVmSpec};
use bascule_ipc::vm::{MigrationLimits, MigrationPhase, Request, VmState};
use bascule_types::{AttemptId, Epoch};

use crate::measure::{Load, Outcome, Said, Watch};

/// Boots the guest on one node of a shared volume and moves it to another.
pub(crate) fn migrate(load: Load, memory_mib: u32, downtime: Duration) -> Result<Outcome> {
    let (cluster, first) = TestCluster::new(VOLUME_MIB)?;
    let second = cluster.join(1, &first)?;
    let spec = TestVmSpec::probe()?
        .with_memory_mib(memory_mib)
        .with_options(&load.cmdline());
    // QEMU's guest has no disk, and ours only one that it does not use.
    let vm = cluster.install(&first, spec.with_options("disk=0"), DISK_MIB)?;
    let mut source = cluster.boot(&first, &vm, Epoch(0))?;
    let console = Console::new();
    console.follow(source.console()?)?;
    let attempt = AttemptId::random();
    let epoch = source.status()?.epoch;
    let mut destination = cluster.expect(&second, &vm, epoch, attempt)?;
    console.follow(destination.console()?)?;
    let peer = destination.wait_listening(START_TIME)?;
    let to = second.owner()?;

    let watch = Watch::start(&cluster.network, console, load)?;
    let meter = CpuMeter::start(&[source.process(), destination.process()])?;
    let started = Instant::now();
    let limits = MigrationLimits {
        downtime_ms_max: u64::try_from(downtime.as_millis()).context("the limit")?,
        ..MigrationLimits::default()
    };
    source.must(&Request::MigrateLive {
        attempt,
        peer,
        to,
        limits,
    })?;
    let said = source.wait_migration(MIGRATION_TIME)?;
    ensure!(
        said.phase == MigrationPhase::Completed,
        "{said:?}; log: {}",
        source.log()
    );
    let total = started.elapsed();
    let cpu = meter.finish()?;
    destination.wait_state(&VmState::Running, START_TIME)?;
    let resident_kib = destination.process().resident_kib_beyond_guest()?;
    let said = Said {
        downtime: Duration::from_millis(said.downtime_ms.context("no downtime")?),
        bytes: said.bytes.0,
    };
    let outcome = watch.finish(total, said, cpu)?;
    Ok(Outcome {
        resident_kib: Some(resident_kib),
        ..outcome
    })
}

const VOLUME_MIB: u32 = 128;
const DISK_MIB: u32 = 4;
const START_TIME: Duration = Duration::from_secs(60);
const MIGRATION_TIME: Duration = Duration::from_secs(120);
