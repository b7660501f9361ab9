//! Storage faults on a real path: open-iscsi, dm-multipath with `queue_if_no_path`, and a SAN that records
//! every write with the time at which it landed.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::ClusterVm;

use crate::{BACK_LIMIT, CLUSTER};

/// The process of a guest is killed while the SAN has its last writes and has not landed them: the same node
/// starts the guest again in a new epoch, after they have landed and not before, and no acknowledged block is lost.
#[test]
fn killed_vmm_is_not_started_again_over_its_writes_in_flight() {
    CLUSTER.with_san("killed", |cluster, vm| {
        let lab = cluster.lab();
        let home = vm.node().unwrap();
        let node = lab.node(&home).unwrap();
        let (slot, epoch) = vm.slot_and_epoch().unwrap();
        let (taken, resets) = (
            vm.times_taken_over().unwrap(),
            node.watchdog_resets().unwrap(),
        );
        let process = vm.process(&node).unwrap();
        assert!(process.holds_its_lock(&node).unwrap());
        let writer = vm.writer().unwrap();
        let since = SystemTime::now();
        // Only the guest's own blocks: the node's heartbeat goes on, and nothing is reset.
        lab.san_hold(&home, &vm.ranges().unwrap()).unwrap();
        lab.wait_for("the SAN to hold a write", HELD_LIMIT, || {
            ensure!(lab.san_held(since)? > 0, "none yet");
            Ok(())
        })
        .unwrap();
        process.kill(&node).unwrap();
        process.wait_dead(&node).unwrap();
        assert!(
            process.holds_its_lock(&node).unwrap(),
            "its writes are in flight"
        );
        // The length of the fault itself: time for a node that does not wait to start the guest again.
        std::thread::sleep(Duration::from_secs(10));
        assert!(
            process.holds_its_lock(&node).unwrap(),
            "its writes are in flight"
        );
        let held = lab.san_held(since).unwrap();
        let released = SystemTime::now();
        lab.san_release().unwrap();

        lab.wait_for("the guest to run in a new epoch", BACK_LIMIT, || {
            let now = vm.slot_and_epoch()?;
            ensure!(now.0 == slot && now.1 > epoch, "it is {now:?}");
            Ok(())
        })
        .unwrap();
        vm.wait_ready(BACK_LIMIT).unwrap();
        let mut talk = vm.talk().unwrap();
        let found = talk.check().unwrap();
        let promised = writer.finish().unwrap();
        assert!(
            found >= promised,
            "{promised} were acknowledged, {found} are there"
        );
        talk.append().unwrap();
        assert!(!process.holds_its_lock(&node).unwrap());

        late_writes_came_first(vm, since, released, held).unwrap();
        assert_eq!(vm.times_taken_over().unwrap(), taken);
        assert_eq!(node.watchdog_resets().unwrap(), resets);
        assert_eq!(vm.node().unwrap(), home);
    });
}

/// The writes that were held until `released` have landed, `held` in number, before the guest wrote again.
fn late_writes_came_first(
    vm: &ClusterVm<'_>,
    since: SystemTime,
    released: SystemTime,
    held: usize,
) -> Result<()> {
    let (late, next): (Vec<_>, Vec<_>) = vm
        .writes(since)?
        .into_iter()
        .filter(|write| write.ended >= released)
        .partition(|write| write.begun < released);
    ensure!(late.len() == held, "{} of {held} have landed", late.len());
    let last = late.iter().map(|write| write.ended).max();
    let next = next.iter().map(|write| write.begun).min();
    let (last, next) = (last.context("none")?, next.context("it wrote nothing")?);
    ensure!(last < next, "the guest wrote before them");
    println!(
        "{held} held writes landed; the next came {:?} later",
        next.duration_since(last)?
    );
    Ok(())
}

/// An emulated guest writes a few times a second.
const HELD_LIMIT: Duration = Duration::from_secs(30);
