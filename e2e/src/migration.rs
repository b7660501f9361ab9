//! Fixture of the migration tests: two nodes, one volume, one VM with the probe guest.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_ipc::vm::{
    MigrationLimits, MigrationPhase, MigrationStatus, Request, StartMode, VmState,
};
use bascule_types::{AttemptId, Epoch, Owner};

use crate::{
    Console, GUEST, Network, Session, TestCluster, TestNode, TestVm, TestVmSpec, VmOnVolume,
    wait_for,
};

/// Two nodes, one volume, one VM.
#[derive(Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct TwoNodes {
    /// What the nodes have in common.
    pub cluster: TestCluster,
    pub nodes: [TestNode; 2],
    pub vm: VmOnVolume,
}

/// A guest that runs on one of two nodes, and what watches it.
#[derive(Debug)]
pub struct MovableGuest {
    /// The process that it runs in.
    pub vm: TestVm,
    /// The index of its node.
    pub at: usize,
    /// Its console, over all its processes.
    pub console: Console,
    /// A TCP session that must survive every migration.
    pub session: Session,
}

impl TwoNodes {
    /// The nodes, and on their volume a probe guest with these options besides its address and a
    /// disk that it writes to.
    ///
    /// # Errors
    /// When a step fails.
    pub fn new(options: &str) -> Result<Self> {
        let (cluster, first) = TestCluster::new(VOLUME_MIB)?;
        let second = cluster.join(1, &first)?;
        let options = format!("ip={GUEST}/24 disk_ms=0 disk_slots=256 {options}");
        let spec = TestVmSpec::probe()?.with_options(&options);
        let vm = cluster.install(&first, spec, DISK_MIB)?;
        Ok(Self {
            cluster,
            nodes: [first, second],
            vm,
        })
    }

    /// Boots the guest on the first node, in the process that `vm` describes.
    ///
    /// # Errors
    /// When it does not boot.
    pub fn boot(&self, vm: &VmOnVolume) -> Result<MovableGuest> {
        let mut vm = self.cluster.boot(&self.nodes[0], vm, Epoch(0))?;
        let console = Console::new();
        console.follow(vm.console()?)?;
        console.wait_line("disk last=0", SOON)?;
        let session = Session::open(&self.cluster.network, GUEST, SOON)?;
        Ok(MovableGuest {
            vm,
            at: 0,
            console,
            session,
        })
    }

    /// The VM's epoch on the volume.
    ///
    /// # Errors
    /// When there is no coordinator, or no such VM.
    pub fn epoch(&self) -> Result<Epoch> {
        let rows = self.nodes[0].rows()?;
        Ok(rows.vms.first().context("the volume has no such VM")?.epoch)
    }

    /// The node that the guest is not on.
    #[must_use]
    pub fn other(&self, guest: &MovableGuest) -> &TestNode {
        &self.nodes[1 - guest.at]
    }

    /// Starts a destination, in the process that `vm` describes, and orders the migration to it.
    ///
    /// # Errors
    /// When either is refused.
    pub fn begin(
        &self,
        guest: &mut MovableGuest,
        vm: &VmOnVolume,
        limits: MigrationLimits,
    ) -> Result<(TestVm, AttemptId)> {
        let attempt = AttemptId::random();
        let node = self.other(guest);
        let mut destination = self.cluster.expect(node, vm, self.epoch()?, attempt)?;
        let peer = destination.wait_listening(SOON)?;
        let to = node.owner()?;
        guest.vm.must(&Request::MigrateLive {
            attempt,
            peer,
            to,
            limits,
        })?;
        Ok((destination, attempt))
    }

    /// Begins a migration whose first round takes two seconds for 16 MiB, and waits until that is under way.
    ///
    /// # Errors
    /// When it is refused, or ends before.
    pub fn begin_slowly(&self, guest: &mut MovableGuest) -> Result<TestVm> {
        let limits = MigrationLimits {
            downtime_ms_max: 2000,
            bytes_per_second_max: Some(8 << 20),
            ..MigrationLimits::default()
        };
        let (destination, _) = self.begin(guest, &self.vm, limits)?;
        wait_for("the pre-copy", SOON, || {
            let migration = guest.vm.status()?.migration;
            let copies = |status: &MigrationStatus| {
                status.phase == MigrationPhase::PreCopy && status.bytes.0 > 0
            };
            Ok(migration.filter(copies))
        })?;
        Ok(destination)
    }

    /// Moves the guest to the other node and follows it there.
    ///
    /// # Errors
    /// When it does not arrive.
    pub fn migrate(&self, guest: &mut MovableGuest) -> Result<MigrationStatus> {
        let epoch = self.epoch()?;
        let limits = MigrationLimits {
            downtime_ms_max: DOWNTIME_MS_MAX,
            ..MigrationLimits::default()
        };
        let (mut destination, _) = self.begin(guest, &self.vm, limits)?;
        guest.console.follow(destination.console()?)?;
        let outcome = guest.wait_completed()?;
        destination.wait_state(&VmState::Running, SOON)?;
        guest.vm.wait_state(&VmState::Departed, SOON)?;
        // Not the one that its process was started in, if the guest had come by a migration.
        let left = guest.vm.status()?.epoch;
        ensure!(left == epoch, "it left in {epoch}, and says {left}");
        let written = destination.written_ownership()?.epoch;
        let came = epoch.next();
        ensure!(written == came, "it came in {came}, and wrote {written}");
        guest.vm.exit(SOON)?;
        guest.vm = destination;
        guest.at = 1 - guest.at;
        Ok(outcome)
    }

    /// Saves the guest on the volume for `to`, or for whoever acquires it next. Its process is left for the caller to
    /// look at.
    ///
    /// # Errors
    /// When it is not saved.
    pub fn save(&self, guest: &mut MovableGuest, to: Option<Owner>) -> Result<()> {
        let attempt = AttemptId::random();
        guest.vm.must(&Request::MigrateQuick { attempt, to })?;
        guest.wait_completed().map(drop)
    }

    /// Restores the saved guest on the node with index `at`, which owns it in `epoch`, and follows it there.
    ///
    /// # Errors
    /// When its process does not start.
    pub fn restore(&self, guest: &mut MovableGuest, at: usize, epoch: Epoch) -> Result<()> {
        let node = &self.nodes[at];
        guest.vm = (self.cluster).start(node, &self.vm, epoch, StartMode::Restore)?;
        guest.at = at;
        guest.console.follow(guest.vm.console()?)
    }
}

impl MovableGuest {
    /// Waits for the end of its migration, live or quick.
    fn wait_completed(&mut self) -> Result<MigrationStatus> {
        let outcome = self.vm.wait_migration(SOON)?;
        ensure!(
            outcome.phase == MigrationPhase::Completed,
            "{outcome:?}\n{}",
            self.vm.log()
        );
        Ok(outcome)
    }

    /// Waits until it runs at `destination`, to which it is being moved, and follows its console there.
    ///
    /// # Errors
    /// When it does not arrive.
    pub fn wait_arrival(&mut self, destination: &mut TestVm) -> Result<()> {
        self.wait_completed()?;
        self.console.follow(destination.console()?)?;
        destination.wait_state(&VmState::Running, SOON)
    }

    /// Has the guest reset its machine by `command` (`reset` or `fault`), for the `count`th time since its
    /// start, and waits until it serves again, with all that its disk had acknowledged.
    ///
    /// # Errors
    /// When it does not come back in the same process.
    pub fn reset(&mut self, network: &Network, command: &str, count: u32) -> Result<()> {
        let before = (self.session.clean_report()?, self.vm.status()?);
        self.console.expect_reset();
        self.session.command(command)?;
        let after = self.vm.wait_resets(count, SOON)?;
        self.session = Session::open(network, GUEST, SOON)?;
        ensure!(after.resets.count == count, "{:?}", after.resets);
        ensure!(
            (after.pid, after.owner, after.epoch) == (before.1.pid, before.1.owner, before.1.epoch),
            "{before:?} and then {after:?}"
        );
        let report = self.session.written_report(SOON)?;
        ensure!(
            report.boot != before.0.boot,
            "it is the same boot: {report}"
        );
        ensure!(
            report.disk_start >= before.0.disk_ack,
            "acknowledged blocks are lost: {} and then {report}",
            before.0
        );
        Ok(())
    }

    /// Checks that the guest runs and reports no fault of its memory, disk and session.
    ///
    /// # Errors
    /// The first property of the guest that does not hold.
    pub fn check(&mut self) -> Result<()> {
        self.console.wait_ticks(TICKS, SOON)?;
        self.session.count()?;
        let before = self.session.clean_report()?.disk_ack;
        wait_for("the disk to go on", SOON, || {
            Ok((self.session.clean_report()?.disk_ack > before).then_some(()))
        })?;
        self.console.check()
    }
}

const VOLUME_MIB: u32 = 512;
const DISK_MIB: u32 = 16;
/// Many times the duration on an idle machine: slowness is not a failure.
const DOWNTIME_MS_MAX: u64 = 2000;
/// More ticks than can be in flight.
const TICKS: usize = 20;
const SOON: Duration = Duration::from_secs(60);
