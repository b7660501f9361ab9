//! Storage faults on a real path: open-iscsi, dm-multipath with `queue_if_no_path`, and a SAN that records
//! every write with the time at which it landed.

use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use bascule_e2e::kubernetes::{
    ClusterVm, Installation, NAMESPACE, SAN_VOLUME, condition, scenarios,
};
use bascule_lab::{Node, SanPath};

use crate::watchdog::{ensure_reset_between, resets, wait_reset};
use crate::{BACK_LIMIT, CLUSTER, WRITEBACK};

/// The process of a guest is killed while the SAN has its last writes and has not landed them: the same node
/// starts the guest again in a new epoch, after they have landed and not before, and no acknowledged block is lost.
#[test]
#[ignore = "long: `make soak-storage`"]
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

/// Both paths of a node are lost while its guest writes. The process of the guest is killed, and so is
/// bascule-watchdog. The node cannot prove that its writes have ended: it is reset, once, and only then the guest
/// starts elsewhere, with every acknowledged block and no write of the old node after its first.
#[test]
#[ignore = "long: `make soak-storage`"]
fn lost_path_with_writes_in_flight_resets_the_node_once_whoever_is_killed() {
    CLUSTER.with_san("lost", |cluster, vm| {
        lose_path(cluster, vm, &[Victim::Vmm, Victim::Watchdog(1)]).unwrap();
    });
}

/// As above, with bascule-watchdog killed after the lease has ended, halfway to the reset, and right before it.
#[test]
#[ignore = "long: `make soak-storage`"]
fn lost_path_resets_the_node_once_whenever_the_watchdog_process_is_killed() {
    CLUSTER.with_san("watchdog", |cluster, vm| {
        for after in [6, 8, 10] {
            lose_path(cluster, vm, &[Victim::Watchdog(after)]).unwrap();
        }
    });
}

/// What is killed on a node that has lost its paths.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// The process of the guest, at once.
    Vmm,
    /// bascule-watchdog without its holder, this many seconds after the loss. The lease ends 4 s after the last
    /// renewal, and the watchdog fires 8 s after that.
    Watchdog(u8),
}

fn lose_path(cluster: &Installation, vm: &ClusterVm<'_>, victims: &[Victim]) -> Result<()> {
    let lab = cluster.lab();
    let from = vm.node()?;
    let node = lab.node(&from)?;
    let before = resets(lab)?;
    let since = SystemTime::now();
    let process = vm.process(&node)?;
    let writer = vm.writer()?;
    let count = before[usize::from(node.index().number()) - 1];
    lab.cut_san(node.index(), &SanPath::ALL)?;
    let lost = Instant::now();
    for victim in victims {
        match victim {
            Victim::Vmm => process.kill(&node)?,
            Victim::Watchdog(after) => {
                let wait = Duration::from_secs(u64::from(*after)).saturating_sub(lost.elapsed());
                let script = format!("sleep {}; {KILL_WATCHDOG}", wait.as_secs_f32());
                match node.exec(&["sh", "-c", &script]) {
                    Ok(_) => println!(
                        "bascule-watchdog killed {:?} after the loss",
                        lost.elapsed()
                    ),
                    // The command takes up to a second to arrive, and the watchdog does not wait for it.
                    Err(error) => {
                        wait_reset(&node, count).with_context(|| format!("{error:#}"))?;
                        println!("{from} was reset before the kill");
                    }
                }
            }
        }
    }
    let reset = wait_reset(&node, count)?;
    println!("{from} was reset {:?} after the loss", lost.elapsed());
    lab.heal_san()?;
    let (to, takeover) = scenarios::restarted_elsewhere(vm, &from, writer)?;
    let succession = vm.succession(since, &from, &to)?;
    println!("{}; {succession:?}", takeover.detail);
    ensure_reset_between(reset, &succession)?;
    cluster.wait_back(&from)?;
    cluster.wait_volume_on(SAN_VOLUME)?;
    let mut expected = before;
    expected[usize::from(node.index().number()) - 1] += 1;
    ensure!(resets(lab)? == expected, "{:?} resets", resets(lab)?);
    Ok(())
}

/// The SAN is away for longer than a lease, and for longer than lease and watchdog together: no node is reset, as
/// no write is in flight, no guest is taken over, and all go on. With multipath, whose requests queue; without it, on
/// one path whose session is replaced.
#[test]
#[ignore = "long: `make soak-storage`"]
fn san_away_for_a_while_resets_nobody_whose_writes_are_complete() {
    CLUSTER.with_san("away", |cluster, vm| {
        for seconds in [5, 30] {
            san_away(cluster, vm, seconds).unwrap();
        }
        without_multipath(cluster, true).unwrap();
        san_away(cluster, vm, 12).unwrap();
        without_multipath(cluster, false).unwrap();
    });
}

/// As above, for longer.
#[test]
#[ignore = "long: `make soak-storage`"]
fn san_away_for_long_resets_nobody_whose_writes_are_complete() {
    CLUSTER.with_san("away-long", |cluster, vm| {
        for seconds in [12, 90] {
            san_away(cluster, vm, seconds).unwrap();
        }
        without_multipath(cluster, true).unwrap();
        for seconds in [5, 30, 90] {
            san_away(cluster, vm, seconds).unwrap();
        }
        without_multipath(cluster, false).unwrap();
    });
}

/// One path of two is lost while the guest writes: multipath fails over, and nobody else notices.
#[test]
#[ignore = "long: `make soak-storage`"]
fn one_lost_path_of_two_stops_no_guest() {
    CLUSTER.with_san("failover", |cluster, vm| {
        let lab = cluster.lab();
        let home = lab.node(&vm.node().unwrap()).unwrap();
        let before = (vm.slot_and_epoch().unwrap(), resets(lab).unwrap());
        let mut talk = vm.talk().unwrap();
        for path in SanPath::ALL {
            let promised = talk.append().unwrap();
            lab.cut_san(home.index(), &[path]).unwrap();
            // Answered over the other path, once the kernel has given the lost one up.
            assert_eq!(talk.append().unwrap(), promised + 1);
            lab.heal_san().unwrap();
            home.wait_san_paths(PATHS_LIMIT).unwrap();
        }
        talk.check().unwrap();
        vm.wait_ready(BACK_LIMIT).unwrap();
        assert_eq!((vm.slot_and_epoch().unwrap(), resets(lab).unwrap()), before);
    });
}

/// The blocks of one guest go bad on its node: with `onError: Pause` that guest is paused until the confirmation, with
/// `Report` it gets the error and cannot leave the node. The other guest of the volume on that node notices neither,
/// and nobody kills anything. Then every write of the node fails: it is reset, and both guests run again.
#[test]
#[ignore = "long: `make soak-storage`"]
fn san_blocks_that_fail_are_one_guests_and_an_error_storm_resets_the_node() {
    CLUSTER.with_san("bad-blocks", |cluster, reporting| {
        let home = reporting.node().unwrap();
        let node = cluster.lab().node(&home).unwrap();
        let pausing = cluster.pausing_san_vm("pausing", 97, &home).unwrap();
        let before = resets(cluster.lab()).unwrap();
        paused_alone(cluster, &node, &pausing, reporting).unwrap();
        reported_alone(&node, reporting, &pausing).unwrap();
        assert_eq!(resets(cluster.lab()).unwrap(), before);
        error_storm(cluster, &node, &[reporting, &pausing]).unwrap();
        pausing.delete().unwrap();
    });
}

fn paused_alone(
    cluster: &Installation,
    node: &Node<'_>,
    pausing: &ClusterVm<'_>,
    other: &ClusterVm<'_>,
) -> Result<()> {
    let lab = cluster.lab();
    let mut talk = other.talk()?;
    let writer = pausing.writer()?;
    node.san_errors(&pausing.ranges()?)?;
    lab.wait_for("the guest to be paused for its disk", BACK_LIMIT, || {
        let error = condition(&pausing.object()?, "Ready")
            .err()
            .context("it is ready")?;
        ensure!(error.to_string().contains("DiskError"), "{error}");
        Ok(())
    })?;
    let promised = talk.append()?;
    ensure!(talk.append()? == promised + 1);
    talk.check()?;
    other.wait_ready(BACK_LIMIT)?;
    // Repaired, and confirmed.
    node.san_errors(&[])?;
    let patch = r#"[{"op":"replace","path":"/spec/disks/0/onError","value":"Report"}]"#;
    let args = [
        "patch",
        "vm",
        &pausing.name,
        "-n",
        NAMESPACE,
        "--type=json",
        "-p",
        patch,
    ];
    lab.kubectl(&args)?;
    pausing.wait_ready(BACK_LIMIT)?;
    let mut after = pausing.talk()?;
    let found = after.check()?;
    let promised = writer.finish()?;
    ensure!(
        found >= promised,
        "{promised} were acknowledged, {found} are there"
    );
    after.append().map(drop)
}

fn reported_alone(node: &Node<'_>, reporting: &ClusterVm<'_>, other: &ClusterVm<'_>) -> Result<()> {
    let mut talk = reporting.talk()?;
    let mut beside = other.talk()?;
    talk.append()?;
    node.san_errors(&reporting.ranges()?)?;
    let error = talk
        .append()
        .err()
        .context("the guest wrote to bad blocks")?;
    println!("the guest: {error:#}");
    let promised = beside.append()?;
    ensure!(beside.append()? == promised + 1);
    beside.check()?;
    // Its failed write may still land: it stays where it is.
    let refused = reporting.migrate("Live", None).err();
    let refused = refused.context("a guest with a failed write was migrated")?;
    println!("the migration: {refused:#}");
    node.san_errors(&[])
}

fn error_storm(cluster: &Installation, node: &Node<'_>, vms: &[&ClusterVm<'_>]) -> Result<()> {
    let lab = cluster.lab();
    let mut before = resets(lab)?;
    let epochs = vms.iter().map(|vm| Ok(vm.slot_and_epoch()?.1));
    let epochs: Vec<_> = epochs.collect::<Result<_>>()?;
    node.san_write_errors()?;
    let index = usize::from(node.index().number()) - 1;
    wait_reset(node, before[index])?;
    before[index] += 1;
    for (vm, epoch) in vms.iter().zip(epochs) {
        lab.wait_for("the guest to run in a new epoch", BACK_LIMIT, || {
            condition(&vm.object()?, "Ready")?;
            ensure!(vm.slot_and_epoch()?.1 > epoch, "the same epoch");
            Ok(())
        })?;
        let mut talk = vm.talk()?;
        talk.check()?;
        talk.append()?;
    }
    cluster.wait_back(&node.name())?;
    cluster.wait_volume_on(SAN_VOLUME)?;
    ensure!(resets(lab)? == before, "{:?} resets", resets(lab)?);
    Ok(())
}

/// All nodes lose all paths for `seconds`, with no write in flight.
fn san_away(cluster: &Installation, vm: &ClusterVm<'_>, seconds: u64) -> Result<()> {
    let lab = cluster.lab();
    let mut talk = vm.talk()?;
    let promised = talk.append()?;
    let before = (vm.slot_and_epoch()?.1, vm.times_taken_over()?, resets(lab)?);
    if seconds > LEASE_AND_WATCHDOG_SECONDS_MIN {
        lab.wait_for(
            "the guest to have written back everything",
            QUIET_LIMIT,
            || {
                let late = vm.writes(SystemTime::now() - WRITEBACK)?;
                ensure!(late.is_empty(), "{} writes of late", late.len());
                Ok(())
            },
        )?;
    }
    for node in lab.nodes() {
        lab.cut_san(node.index(), &SanPath::ALL)?;
    }
    // The length of the fault itself.
    std::thread::sleep(Duration::from_secs(seconds));
    lab.heal_san()?;
    let back = Instant::now();
    let mut talk = vm.talk()?;
    ensure!(talk.append()? == promised + 1, "a record was lost");
    println!(
        "away for {seconds} s: written again {:?} later",
        back.elapsed()
    );
    talk.check()?;
    vm.wait_ready(BACK_LIMIT)?;
    cluster.wait_volume_on(SAN_VOLUME)?;
    for node in lab.nodes() {
        node.wait_san_paths(PATHS_LIMIT)?;
    }
    let after = (vm.slot_and_epoch()?.1, vm.times_taken_over()?, resets(lab)?);
    ensure!(
        after == before,
        "{before:?} before, {after:?} after {seconds} s"
    );
    Ok(())
}

/// Has every node use one path only, without multipath and with open-iscsi's default patience; or ends it.
fn without_multipath(cluster: &Installation, on: bool) -> Result<()> {
    let mut nodes = cluster.lab().nodes();
    nodes.try_for_each(|node| node.set_san_multipath(!on))
}

/// A write in flight for less than this does not make the watchdog fire.
const LEASE_AND_WATCHDOG_SECONDS_MIN: u64 = 8;
const QUIET_LIMIT: Duration = Duration::from_secs(180);
const KILL_WATCHDOG: &str = "killed=; for p in $(pgrep -x bascule-watchdo); do \
    grep -q -e --hold /proc/$p/cmdline || { kill -KILL $p && killed=1; }; done; [ \"$killed\" ]";
/// A session is logged in again within seconds.
const PATHS_LIMIT: Duration = Duration::from_secs(90);
