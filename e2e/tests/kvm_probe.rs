//! The probe guest itself, under QEMU: that what later tests rely on can be relied on.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use bascule_e2e::{Console, Flow, GUEST, Network, Qemu, QemuSpec, Session, kvm_or_skip, wait_for};
use bascule_probe_wire::block::BLOCK_BYTES;

const SOON: Duration = Duration::from_secs(20);
const DISK_BYTES: u64 = 64 << 20;

struct Lab {
    network: Network,
    directory: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self {
            network: Network::new().unwrap(),
            directory: tempfile::tempdir().unwrap(),
        };
        File::create(lab.disk())
            .unwrap()
            .set_len(DISK_BYTES)
            .unwrap();
        lab
    }

    fn disk(&self) -> std::path::PathBuf {
        self.directory.path().join("disk.img")
    }

    fn boot(&self, options: &str) -> (Qemu, Console) {
        let tap = self.network.tap().unwrap();
        let spec = QemuSpec {
            memory_mib: 256,
            cmdline: format!("ip={GUEST}/24 {options}"),
            disk: Some(self.disk()),
            incoming_port: None,
        };
        let qemu =
            Qemu::start(&self.network, &tap, self.directory.path(), &tap.name, &spec).unwrap();
        let console = Console::new();
        console.follow(qemu.console().unwrap()).unwrap();
        console.wait_line("disk last=", SOON).unwrap();
        (qemu, console)
    }

    fn session(&self) -> Session {
        Session::open(&self.network, GUEST, SOON).unwrap()
    }
}

fn overwrite(disk: &Path, block: u64, byte: u8) {
    let file = File::options().write(true).open(disk).unwrap();
    file.write_all_at(&[byte], block * BLOCK_BYTES as u64 + 100)
        .unwrap();
}

#[test]
fn a_healthy_guest_counts_echoes_and_reports_no_fault() {
    if !kvm_or_skip("a_healthy_guest_counts_echoes_and_reports_no_fault") {
        return;
    }
    let lab = Lab::new();
    let (mut qemu, console) = lab.boot("tick_ms=10 dirty=16M fill=64M disk_ms=0");
    let mut session = lab.session();
    let flow = Flow::start(&lab.network, GUEST).unwrap();
    for _ in 0..200 {
        session.count().unwrap();
    }
    console.wait_ticks(50, SOON).unwrap();
    let summary = flow.finish().unwrap();
    assert!(summary.received > 100, "{summary:?}");
    assert_eq!(summary.duplicated, 0, "{summary:?}");
    let report = session.clean_report().unwrap();
    assert!(report.disk_ack > 10, "{report}");
    assert!(
        report.mem_pages > 4096 && report.mem_checked > 0,
        "{report}"
    );
    console.check().unwrap();
    session.command("poweroff").unwrap();
    assert!(qemu.process().wait(SOON).unwrap().success());
}

/// A guest that starts on another node is found there at once, not when the bridges have forgotten where it was.
#[test]
fn a_guest_announces_its_address_at_boot_before_anybody_asks_for_it() {
    if !kvm_or_skip("a_guest_announces_its_address_at_boot_before_anybody_asks_for_it") {
        return;
    }
    let lab = Lab::new();
    let (_qemu, _console) = lab.boot("");
    let learned = wait_for("the bridge to learn where the guest is", SOON, || {
        let mut fdb = lab.network.command("bridge");
        let shown = fdb.args(["fdb", "show", "br", "br0", "dynamic"]).output()?;
        let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
        Ok(shown.contains("dev tap0").then_some(()))
    });
    learned.unwrap();
}

#[test]
fn the_power_button_switches_the_guest_off() {
    if !kvm_or_skip("the_power_button_switches_the_guest_off") {
        return;
    }
    let lab = Lab::new();
    let (mut qemu, console) = lab.boot("");
    qemu.press_power_button().unwrap();
    console.wait_line("power button", SOON).unwrap();
    assert!(qemu.process().wait(SOON).unwrap().success());
}

#[test]
fn after_a_kill_every_acknowledged_block_is_found_and_a_lost_one_is_noticed() {
    if !kvm_or_skip("after_a_kill_every_acknowledged_block_is_found") {
        return;
    }
    let lab = Lab::new();
    let options = "disk_ms=0 disk_slots=64";
    let (mut qemu, console) = lab.boot(options);
    console.wait_ticks(20, SOON).unwrap();
    qemu.process().kill().unwrap();
    let acknowledged = console.disk_ack();
    assert!(acknowledged > 0);

    // The second life hardly writes, so that the block to damage is not one that it overwrites.
    let (mut qemu, _console) = lab.boot("disk_ms=60000 disk_slots=64");
    let report = lab.session().clean_report().unwrap();
    assert!(
        report.disk_start >= acknowledged,
        "{report}, acknowledged {acknowledged}"
    );
    qemu.process().kill().unwrap();

    overwrite(&lab.disk(), (report.disk_start + 32) % 64, 0x55);
    let (_qemu, _console) = lab.boot(options);
    let report = lab.session().report().unwrap();
    assert_eq!(report.disk_start_bad, 1, "{report}");
}

#[test]
fn a_second_writer_on_the_disk_is_noticed_while_the_guest_runs() {
    if !kvm_or_skip("a_second_writer_on_the_disk_is_noticed_while_the_guest_runs") {
        return;
    }
    let lab = Lab::new();
    let (_qemu, console) = lab.boot("disk_ms=0 disk_slots=64");
    console.wait_ticks(20, SOON).unwrap();
    let mut session = lab.session();
    session.clean_report().unwrap();
    overwrite(&lab.disk(), 7, 0x55);
    let line = console.wait_line("bad: disk slot", SOON).unwrap();
    assert!(line.contains("Torn"), "{line}");
    assert!(session.report().unwrap().disk_bad > 0);
    assert!(console.check().is_err());
}
