//! Embedded mode from the first certificate to a live migration, with the commands that a person
//! types.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::net::SocketAddrV4;
use std::time::Duration;

use anyhow::Context as _;
use bascule_e2e::{
    EmbeddedHost, EmbeddedHosts, GUEST, RunningCommand, Session, kvm_or_skip, probe, wait_for,
};

const SOON: Duration = Duration::from_secs(60);
const VOLUME_BYTES: &str = "536870912";
const DOCUMENT: &str = "
apiVersion: bascule.dev/v1alpha1
kind: VirtualMachine
metadata: {name: web}
spec:
  volume: gold
  memory: 128Mi
  boot:
    kernel: {hostFile: {name: probe}}
    cmdline: button=0x603 ip=10.77.0.5/24 disk_ms=0 disk_slots=256 tick_ms=5 dirty=8M fill=16M
  disks:
  - {name: data, size: 16Mi}
  interfaces:
  - {name: lan, bridge: lan}
  cloudInit: {userData: '#cloud-config'}
";

/// Hosts `a` and `b` of one authority; `a` has made the volume `gold` and joined it.
fn two_hosts() -> EmbeddedHosts {
    let hosts = EmbeddedHosts::new().unwrap();
    let ca = path(&hosts, "ca");
    hosts.must(&["cert", "init", "--ca-dir", &ca]).unwrap();
    for name in ["a", "b"] {
        let state = path(&hosts, &format!("{name}/state"));
        let issue = [
            "cert",
            "issue",
            name,
            "--ca-dir",
            &ca,
            "--state-dir",
            &state,
        ];
        hosts.must(&issue).unwrap();
    }
    let volume = path(&hosts, "volume.img");
    let format = ["volume", "format", &volume, "--create-size", VOLUME_BYTES];
    a(&hosts).must(&format).unwrap();
    let joined = join(&a(&hosts), &volume, &[]);
    assert!(joined.contains("Joined volume gold"), "{joined}");
    hosts
}

fn a(hosts: &EmbeddedHosts) -> EmbeddedHost<'_> {
    hosts.host("a", 1)
}

fn b(hosts: &EmbeddedHosts) -> EmbeddedHost<'_> {
    hosts.host("b", 2)
}

fn path(hosts: &EmbeddedHosts, name: &str) -> String {
    hosts.path(name).to_string_lossy().into_owned()
}

fn join(host: &EmbeddedHost<'_>, volume: &str, more: &[&str]) -> String {
    let address = host.address.to_string();
    let join = [
        "volume",
        "join",
        "gold",
        volume,
        "--no-cgroups",
        "--address",
        &address,
    ];
    host.must(&[&join, more].concat()).unwrap()
}

/// Waits for a console's end. The command that ends a guest may forget it before its terminal asks
/// what has become of it.
fn leave(terminal: &mut RunningCommand, became: &str) {
    let (succeeded, said) = terminal.wait().unwrap();
    let known = said.contains(became) || said.contains("no longer on this node");
    assert!(succeeded && known, "{said}");
}

/// What `run` says of a document that it cannot carry out.
fn complaint(host: &EmbeddedHost<'_>, hosts: &EmbeddedHosts, document: &str) -> String {
    hosts.write("bad.yaml", document).unwrap();
    let file = path(hosts, "bad.yaml");
    let complaint = host.complains(&["run", &file, "--no-cgroups", "--detach"]);
    complaint.with_context(|| document.to_owned()).unwrap()
}

#[test]
fn a_guest_is_run_moved_live_and_shut_down_by_hand() {
    if !kvm_or_skip("a_guest_is_run_moved_live_and_shut_down_by_hand") {
        return;
    }
    let hosts = two_hosts();
    let (a, b) = (a(&hosts), b(&hosts));
    let (_serving_a, _serving_b) = (a.serve().unwrap(), b.serve().unwrap());
    join(
        &b,
        &path(&hosts, "volume.img"),
        &["--via", "127.0.0.1:7410"],
    );

    // The guest's console is this terminal.
    hosts.write("web.yaml", DOCUMENT).unwrap();
    let document = path(&hosts, "web.yaml");
    let run = ["run", &document, "--address", "127.0.0.1", "--no-cgroups"];
    let mut terminal = a.start(&run).unwrap();
    let booted = terminal.console.wait_line("disk last=0", SOON);
    assert!(booted.is_ok(), "{booted:?}\n{}", terminal.said());
    let mut session = Session::open(&hosts.network, GUEST, SOON).unwrap();
    session.count().unwrap();
    let disks = a.must(&["volume", "disks", "gold"]).unwrap();
    assert!(
        disks.contains("default/web.data") && disks.contains("used"),
        "{disks}"
    );

    // Live migration: the TCP session survives.
    let migrate = [
        "migrate",
        "web",
        "--to",
        "127.0.0.2:7410",
        "--downtime-ms",
        "1000",
    ];
    let moved = a.must(&migrate).unwrap();
    assert!(moved.contains("Moved to 127.0.0.2:7410"), "{moved}");
    session.count().unwrap();
    let before = session.clean_report().unwrap().disk_ack;
    wait_for("the disk to go on", SOON, || {
        Ok((session.clean_report()?.disk_ack > before).then_some(()))
    })
    .unwrap();
    leave(&mut terminal, "has moved to another node");
    terminal.console.check().unwrap();
    let gone = a.complains(&["stop", "web"]).unwrap();
    assert!(gone.contains("no VM default/web on this node"), "{gone}");

    // It boots again in its process.
    let boot = session.clean_report().unwrap().boot;
    b.must(&["restart", "web"]).unwrap();
    wait_for("the next boot", SOON, || {
        let mut session = Session::open(&hosts.network, GUEST, SOON)?;
        // The guest may be reset while it answers.
        let next = session.clean_report().ok();
        Ok(next.filter(|report| report.boot != boot))
    })
    .unwrap();
    let gone = a.complains(&["restart", "web"]).unwrap();
    assert!(gone.contains("no VM default/web on this node"), "{gone}");

    // The power button stops it on the new host.
    b.must(&["stop", "web"]).unwrap();
    let rows = b.must(&["volume", "vms", "gold"]).unwrap();
    assert!(
        rows.contains("default/web") && rows.contains("none"),
        "{rows}"
    );

    // What it wrote is there when it is run again.
    let mut terminal = a.start(&run).unwrap();
    let line = terminal.console.wait_line("disk last=", SOON).unwrap();
    let last = line.split_ascii_whitespace().nth(1).unwrap();
    let last: u64 = last["last=".len()..].parse().unwrap();
    assert!(last >= before, "{line}: {before} were acknowledged");
    a.must(&["stop", "web", "--force"]).unwrap();
    leave(&mut terminal, "The guest is off");
}

#[test]
fn a_document_that_cannot_be_carried_out_is_refused_with_the_field_named() {
    if !kvm_or_skip("a_document_that_cannot_be_carried_out_is_refused_with_the_field_named") {
        return;
    }
    let empty = EmbeddedHosts::new().unwrap();
    let refused = a(&empty).complains(&["volume", "disks", "gold"]).unwrap();
    assert!(refused.contains("bascule-node cert init"), "{refused}");
    let hosts = two_hosts();
    let a = a(&hosts);
    // Each is another VM: what was made of the one before is on the volume.
    let cases = [
        ("memory: 128Mi", "memory: 1Mi", "spec.memory"),
        ("memory: 128Mi", "memory: [1", "bad.yaml"),
        ("memory:", "memroy: 1Gi\n  memory:", "spec.memroy"),
        (
            "bridge: lan",
            "bridge: wan",
            "interfaces[0].bridge: no bridge \"wan\"",
        ),
        (
            "name: probe",
            "name: none",
            "spec.boot.kernel: hostFile: \"none\"",
        ),
        (
            "volume: gold",
            "volume: tin",
            "volume tin is not attached: name its device or file with --backing",
        ),
        (
            "size: 16Mi",
            "size: 1Ti",
            "disk default/vm6.data: the volume refuses",
        ),
    ];
    for (number, (good, bad, named)) in cases.into_iter().enumerate() {
        let document = DOCUMENT.replace("{name: web}", &format!("{{name: vm{number}}}"));
        let said = complaint(&a, &hosts, &document.replace(good, bad));
        assert!(said.contains(named), "{bad}: {said}");
    }
    let said = a.complains(&["run", "/nowhere.yaml"]).unwrap();
    assert!(said.contains("/nowhere.yaml"), "{said}");

    // Not a kernel image. Each VM has its own copy, imported to the volume once.
    let whole = std::fs::read(probe::build().unwrap()).unwrap();
    for (name, kernel, named) in [
        ("missing", None, "spec.boot.kernel: "),
        ("empty", Some(&whole[..0]), "boot.kernel: "),
        (
            "text",
            Some(b"#!/bin/sh".as_slice()),
            "boot.kernel: not a kernel",
        ),
        ("cut", Some(&whole[..4096]), "boot.kernel: "),
    ] {
        if let Some(bytes) = kernel {
            std::fs::write(hosts.path("broken"), bytes).unwrap();
        }
        let document = DOCUMENT.replace("{name: web}", &format!("{{name: {name}}}"));
        let document = document.replace("hostFile: {name: probe}", "hostFile: {name: broken}");
        let said = complaint(&a, &hosts, &document);
        assert!(said.contains(named), "{name}: {said}");
    }
}

#[test]
fn a_guest_that_cannot_migrate_keeps_running_and_keeps_its_disk() {
    if !kvm_or_skip("a_guest_that_cannot_migrate_keeps_running_and_keeps_its_disk") {
        return;
    }
    let hosts = two_hosts();
    let (a, b) = (a(&hosts), b(&hosts));
    hosts.write("web.yaml", DOCUMENT).unwrap();
    let document = path(&hosts, "web.yaml");
    a.must(&["run", &document, "--no-cgroups", "--detach"])
        .unwrap();
    let mut session = Session::open(&hosts.network, GUEST, SOON).unwrap();
    session.count().unwrap();

    let thief = DOCUMENT.replace("{name: web}", "{name: thief}");
    let thief = thief.replace("size: 16Mi}", "existing: {name: web.data}}");
    let said = complaint(&a, &hosts, &thief);
    let named = said.contains("disk default/web.data");
    assert!(named && said.contains("belongs to another VM"), "{said}");

    let to_b = ["migrate", "web", "--to", "127.0.0.2:7410"];
    let unknown = a.complains(&["migrate", "nope", "--to", to_b[3]]).unwrap();
    let known = "no VM default/nope on this node; there are: default/web";
    assert!(unknown.contains(known), "{unknown}");
    let unreachable = a.complains(&to_b).unwrap();
    assert!(
        unreachable.contains("reach the node at 127.0.0.2:7410"),
        "{unreachable}"
    );
    let said = a
        .complains(&["migrate", "web", "--to", "no address"])
        .unwrap();
    assert!(said.contains("no address"), "{said}");

    // Garbage, or a connection without a certificate, does not disturb a daemon.
    let _serving = b.serve().unwrap();
    for garbage in [[0xFF; 64].as_slice(), b"GET / HTTP/1.1\r\n\r\n"] {
        let address = SocketAddrV4::new(b.address, 7410);
        let mut stream = hosts.network.connect(address, SOON).unwrap();
        stream.write_all(garbage).unwrap();
    }
    let said = a.complains(&to_b).unwrap();
    assert!(said.contains("volume gold is not attached on b"), "{said}");
    session.count().unwrap();
    session.clean_report().unwrap();
    a.must(&["stop", "web"]).unwrap();
}

#[test]
fn run_alone_makes_an_identity_and_a_volume_and_rm_removes_what_it_made() {
    if !kvm_or_skip("run_alone_makes_an_identity_and_a_volume_and_rm_removes_what_it_made") {
        return;
    }
    let hosts = EmbeddedHosts::new().unwrap();
    let a = a(&hosts);
    hosts.write("web.yaml", DOCUMENT).unwrap();
    let document = path(&hosts, "web.yaml");
    let mut terminal = a.start(&["run", &document, "--no-cgroups"]).unwrap();
    let booted = terminal.console.wait_line("disk last=0", SOON);
    assert!(booted.is_ok(), "{booted:?}\n{}", terminal.said());
    let said = terminal.said();
    let state = path(&hosts, "a/state");
    for made in [
        "Made an identity for this node".to_owned(),
        format!("Made volume gold in the file {state}/volumes/gold.img"),
        format!("Log: {}", path(&hosts, "a/run/logs/run.log")),
    ] {
        assert!(said.contains(&made), "{made}: {said}");
    }
    assert!(
        !said.contains("INFO"),
        "the log is not on the console: {said}"
    );
    a.must(&["stop", "web", "--force"]).unwrap();
    leave(&mut terminal, "The guest is off");

    // It is the same node and the same volume the next time, and no place for a throw-away VM of
    // the same name.
    let again = ["run", &document, "--no-cgroups", "--rm"];
    let refused = a.complains(&again).unwrap();
    assert!(refused.contains("only for new VMs"), "{refused}");
    assert!(!refused.contains("Made "), "{refused}");

    // A throw-away VM leaves nothing on the volume, however it ends.
    let throw_away = DOCUMENT.replace("{name: web}", "{name: temp}");
    hosts.write("temp.yaml", &throw_away).unwrap();
    let temp = path(&hosts, "temp.yaml");
    let run = ["run", &temp, "--no-cgroups", "--rm"];
    for interrupted in [false, true] {
        let mut terminal = a.start(&run).unwrap();
        let booted = terminal.console.wait_line("disk last=0", SOON);
        assert!(booted.is_ok(), "{booted:?}\n{}", terminal.said());
        if interrupted {
            terminal.interrupt().unwrap();
        } else {
            a.must(&["stop", "temp", "--force"]).unwrap();
        }
        let (succeeded, said) = terminal.wait().unwrap();
        assert!(
            succeeded && said.contains("Removed VM default/temp"),
            "{said}"
        );
        let disks = a.must(&["volume", "disks", "gold"]).unwrap();
        let rows = a.must(&["volume", "vms", "gold"]).unwrap();
        assert!(
            !disks.contains("temp") && !rows.contains("temp"),
            "{disks}{rows}"
        );
        assert!(disks.contains("default/web.data"), "{disks}");
    }

    // Nor does its volume stay when the run has made it.
    hosts
        .write("temp.yaml", &throw_away.replace("gold", "scratch"))
        .unwrap();
    let mut terminal = a.start(&run).unwrap();
    let booted = terminal.console.wait_line("disk last=0", SOON);
    assert!(booted.is_ok(), "{booted:?}\n{}", terminal.said());
    let file = hosts.path("a/state/volumes/scratch.img");
    assert!(file.exists());
    terminal.interrupt().unwrap();
    let (succeeded, said) = terminal.wait().unwrap();
    assert!(succeeded && !file.exists(), "{said}");
}
