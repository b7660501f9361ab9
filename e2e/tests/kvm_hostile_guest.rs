//! A guest that attacks every device of its machine, beside one that minds its own business.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::Result;
use bascule_e2e::{
    Console, GUEST, HostileGuest, Session, TestCluster, TestNode, TestVmSpec, VmOnVolume,
    kvm_or_skip, wait_for,
};
use bascule_ipc::vm::{Request, StopReason};
use bascule_types::{DiskRole, Epoch};

const SOON: Duration = Duration::from_secs(60);
/// Steps of one seed: some twenty seconds of a busy machine with two processors.
const STEPS: u64 = 12_000;
/// The number in the environment variable `name`.
fn setting(name: &str, otherwise: u64) -> u64 {
    let text = std::env::var(name).ok().filter(|text| !text.is_empty());
    text.map_or(otherwise, |text| text.parse().unwrap())
}

#[test]
fn a_hostile_guest_harms_nobody_but_itself() {
    if !kvm_or_skip("a_hostile_guest_harms_nobody_but_itself") {
        return;
    }
    let first = setting("BASCULE_HOSTILE_FROM", 1);
    let seeds = setting("BASCULE_HOSTILE_SEEDS", 1);
    for seed in first..first + seeds {
        attack_with(seed, setting("BASCULE_HOSTILE_STEPS", STEPS));
    }
}

fn attack_with(seed: u64, steps: u64) {
    println!("seed {seed}");
    let (cluster, node) = TestCluster::new(256).unwrap();
    let bystanders = [bystander(&cluster, &node, 3), neighbour(&cluster, &node)];
    let hostile = hostile(&cluster, &node, seed);
    bystander(&cluster, &node, 5);
    let before = contents_of_others(&cluster, &node, [bystanders[1].uid, hostile.uid]);
    assert!(before.values().map(Vec::len).sum::<usize>() > 8 << 20);

    let mut neighbour = Neighbour::boot(&cluster, &node, &bystanders[1]);
    let mut guest = HostileGuest::new(&cluster, &node, hostile.clone());
    guest.attack(0, steps, || neighbour.look()).unwrap();
    println!("{:?}", guest.tally());
    // It has done something: the control of all that follows.
    assert!(guest.tally().resets > 0 && guest.tally().starts > 1);

    // In the middle of it, it can be stopped and killed, and its disk is free each time.
    guest.let_loose(steps).unwrap();
    neighbour.look().unwrap();
    guest.stop().unwrap();
    guest.let_loose(2 * steps).unwrap();
    neighbour.look().unwrap();
    guest.kill().unwrap();
    guest.let_loose(3 * steps).unwrap();
    guest.stop().unwrap();

    neighbour.finish(&cluster);
    let after = contents_of_others(&cluster, &node, [bystanders[1].uid, hostile.uid]);
    let changed: Vec<_> = after
        .iter()
        .filter(|(name, bytes)| before.get(*name) != Some(*bytes))
        .map(|(name, _)| name)
        .collect();
    assert!(changed.is_empty(), "{changed:?}");
    assert_eq!(after.len(), before.len());
}

/// A guest with any devices that there are, and a seed.
fn hostile(cluster: &TestCluster, node: &TestNode, seed: u64) -> VmOnVolume {
    let mac = [0x52, 0x54, 0, 0x77, 1, 5];
    let tap = cluster.network.tap_of(mac).unwrap();
    let mut spec = TestVmSpec::probe()
        .unwrap()
        .with_options(&format!("hostile={seed}"))
        .with_interface_of(&tap, mac);
    spec.config_mut().guest_agent = true;
    cluster.install(node, spec, 16).unwrap()
}

fn neighbour(cluster: &TestCluster, node: &TestNode) -> VmOnVolume {
    let options =
        format!("ip={GUEST}/24 tick_ms=5 disk_ms=5 disk_slots=256 dirty=4M rate=16M fill=8M");
    let spec = TestVmSpec::probe().unwrap().with_options(&options);
    cluster.install(node, spec, 16).unwrap()
}

/// A VM that is off, whose disk is full of `byte`.
fn bystander(cluster: &TestCluster, node: &TestNode, byte: u8) -> VmOnVolume {
    let vm = cluster
        .install(node, TestVmSpec::probe().unwrap(), 4)
        .unwrap();
    let rows = node.rows().unwrap().disks;
    let disk = rows
        .iter()
        .find(|row| row.vm == Some(vm.uid) && row.role == DiskRole::Data)
        .unwrap();
    cluster.write_disk(disk, &vec![byte; 4 << 20]).unwrap();
    vm
}

/// What is on the volume's disks but the data disks of `except`, by the disks' names.
fn contents_of_others(
    cluster: &TestCluster,
    node: &TestNode,
    except: [bascule_types::VmUid; 2],
) -> BTreeMap<String, Vec<u8>> {
    let mut contents = BTreeMap::new();
    for row in node.rows().unwrap().disks {
        let is_data = row.role == DiskRole::Data;
        if is_data && row.vm.is_some_and(|vm| except.contains(&vm)) {
            continue;
        }
        let mut bytes = Vec::new();
        for run in &row.extents {
            let mut part = vec![0; usize::try_from(run.length.0).unwrap()];
            let at = u64::try_from(bytes.len()).unwrap();
            cluster.read_disk(&row, at, &mut part).unwrap();
            bytes.extend(part);
        }
        contents.insert(row.name.as_str().to_owned(), bytes);
    }
    contents
}

/// The guest that must not notice.
struct Neighbour {
    vm: bascule_e2e::TestVm,
    console: Console,
    session: Session,
    began: Instant,
    acknowledged: u64,
}

impl Neighbour {
    fn boot(cluster: &TestCluster, node: &TestNode, vm: &VmOnVolume) -> Self {
        let mut vm = cluster.boot(node, vm, Epoch(0)).unwrap();
        let console = Console::new();
        console.follow(vm.console().unwrap()).unwrap();
        let mut session = Session::open(&cluster.network, GUEST, SOON).unwrap();
        let acknowledged = session.written_report(SOON).unwrap().disk_ack;
        Self {
            vm,
            console,
            session,
            began: Instant::now(),
            acknowledged,
        }
    }

    /// Its session, disk, memory and clock are sound, and its disk goes on.
    fn look(&mut self) -> Result<()> {
        self.session.count()?;
        let before = self.acknowledged;
        self.acknowledged = wait_for("the neighbour's disk to go on", SOON, || {
            let report = self.session.clean_report()?;
            Ok((report.disk_ack > before).then_some(report.disk_ack))
        })?;
        self.console.check()
    }

    /// It finds every block that its disk has acknowledged when it boots again.
    fn finish(mut self, cluster: &TestCluster) {
        self.look().unwrap();
        println!(
            "the neighbour stood still for at most {:?}",
            self.console.gap_max(self.began)
        );
        let acknowledged = self.session.clean_report().unwrap().disk_ack;
        self.console.expect_reset();
        self.session.command("reset").unwrap();
        self.vm.wait_resets(1, SOON).unwrap();
        let mut session = Session::open(&cluster.network, GUEST, SOON).unwrap();
        let report = session.written_report(SOON).unwrap();
        assert!(report.disk_start >= acknowledged, "{report}");
        wait_for("memory to be verified", SOON, || {
            Ok((session.clean_report()?.mem_checked > 0).then_some(()))
        })
        .unwrap();
        self.vm.must(&Request::Stop).unwrap();
        assert_eq!(self.vm.wait_stopped(SOON).unwrap(), StopReason::Requested);
    }
}
