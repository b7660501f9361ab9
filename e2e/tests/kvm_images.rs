//! Disks from images in every packing that is taken, in embedded mode, as a guest reads them.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;
use std::time::Duration;

use bascule_e2e::{
    EmbeddedHost, EmbeddedHosts, ImagePacking, kvm_or_skip, numbered_disk, pack, wait_for,
};

const SOON: Duration = Duration::from_secs(60);
/// A disk whose first 256 blocks the guest reads when it boots; afterwards it goes on to write them.
const DOCUMENT: &str = "
apiVersion: bascule.dev/v1alpha1
kind: VirtualMachine
metadata: {name: NAME}
spec:
  volume: gold
  memory: 128Mi
  boot:
    kernel: {hostFile: {name: probe}}
    cmdline: button=0x603 ip=10.77.0.5/24 disk_ms=0 disk_slots=256 tick_ms=10
  disks:
  - {name: data, size: 16Mi, source: {hostFile: {name: image}}}
  interfaces:
  - {name: lan, bridge: lan}
";
const DISK_BYTES: usize = 16 << 20;

fn document(hosts: &EmbeddedHosts, name: &str) -> String {
    let text = DOCUMENT.replace("NAME", name);
    let path = hosts.write(&format!("{name}.yaml"), &text).unwrap();
    path.to_string_lossy().into_owned()
}

/// Boots a throw-away guest from the image; what it has read of its disk.
fn survey(host: &EmbeddedHost<'_>, hosts: &EmbeddedHosts, name: &str) -> String {
    let document = document(hosts, name);
    let run = ["run", &document, "--no-cgroups", "--rm"];
    let mut terminal = host.start(&run).unwrap();
    let survey = terminal.console.wait_line("disk last=", SOON);
    assert!(survey.is_ok(), "{survey:?}\n{}", terminal.said());
    // It writes on, so that the next disk on the same extents begins with what is not its own.
    wait_for("the guest to overwrite its disk", SOON, || {
        Ok((terminal.console.disk_ack() > 300).then_some(()))
    })
    .unwrap();
    host.must(&["stop", name, "--force"]).unwrap();
    assert!(terminal.wait().unwrap().0);
    survey.unwrap()
}

#[test]
fn a_guest_reads_its_disk_from_an_image_in_every_packing() {
    if !kvm_or_skip("a_guest_reads_its_disk_from_an_image_in_every_packing") {
        return;
    }
    let hosts = EmbeddedHosts::new().unwrap();
    let host = hosts.host("a", 1);
    let raw = hosts.path("raw");
    fs::write(&raw, numbered_disk(DISK_BYTES, 256, 200)).unwrap();
    for (name, qcow2, compressor) in [
        ("raw", None, None),
        ("raw-gz", None, Some("gzip")),
        ("raw-xz", None, Some("xz")),
        ("raw-zst", None, Some("zstd")),
        ("qcow2", Some(""), None),
        ("qcow2-old", Some("-o compat=0.10,cluster_size=4k"), None),
        ("qcow2-c", Some("-c"), None),
        ("qcow2-zst", Some("-o cluster_size=2M"), Some("zstd")),
        ("qcow2-c-xz", Some("-c"), Some("xz")),
    ] {
        let image = pack(&raw, ImagePacking { qcow2, compressor }).unwrap();
        fs::copy(image, hosts.path("image")).unwrap();
        let survey = survey(&host, &hosts, name);
        assert!(
            survey.contains("last=200 faults=0 slots=256"),
            "{name}: {survey}"
        );
    }
}

#[test]
fn a_disk_that_is_read_only_is_read_and_takes_no_write() {
    if !kvm_or_skip("a_disk_that_is_read_only_is_read_and_takes_no_write") {
        return;
    }
    let hosts = EmbeddedHosts::new().unwrap();
    let host = hosts.host("a", 1);
    fs::write(hosts.path("image"), numbered_disk(DISK_BYTES, 256, 200)).unwrap();
    let text = DOCUMENT.replace("NAME", "reader");
    let text = text.replace("size: 16Mi", "size: 16Mi, readOnly: true");
    let document = hosts.write("reader.yaml", &text).unwrap();
    let run = ["run", &document.to_string_lossy(), "--no-cgroups", "--rm"];
    let mut terminal = host.start(&run).unwrap();
    let read = terminal.console.wait_line("disk last=200 faults=0", SOON);
    assert!(read.is_ok(), "{read:?}\n{}", terminal.said());
    // VIRTIO_BLK_S_IOERR
    let written = terminal
        .console
        .wait_line("bad: disk status 1 in Write", SOON);
    assert!(written.is_ok(), "{written:?}\n{}", terminal.said());
    host.must(&["stop", "reader", "--force"]).unwrap();
    assert!(terminal.wait().unwrap().0);
}

/// Images that are refused: the VM's name, the image, and what the refusal says.
fn bad_images(hosts: &EmbeddedHosts) -> Vec<(&'static str, Vec<u8>, &'static str)> {
    let packed = |file: &str, bytes, qcow2, compressor| {
        let raw = hosts.path(file);
        fs::write(&raw, numbered_disk(bytes, 256, 200)).unwrap();
        fs::read(pack(&raw, ImagePacking { qcow2, compressor }).unwrap()).unwrap()
    };
    let made = |arguments: &[&str]| {
        let path = hosts.path("made");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f"]).args(arguments);
        create.arg(&path).arg("16M").current_dir(hosts.path(""));
        assert!(create.output().unwrap().status.success());
        fs::read(path).unwrap()
    };
    let qcow2 = packed("raw", DISK_BYTES, Some(""), None);
    let gzip = packed("raw", DISK_BYTES, None, Some("gzip"));
    vec![
        (
            "backed",
            made(&["qcow2", "-b", "raw", "-F", "raw"]),
            "has a backing file (header field backing_file_offset)",
        ),
        (
            "large",
            packed("large", 2 * DISK_BYTES, Some(""), None),
            "is a disk of 33554432 bytes (header field size), and the disk here has 16777216",
        ),
        (
            "bomb",
            packed("large", 2 * DISK_BYTES, None, Some("zstd")),
            "in the zstd file: the image has ",
        ),
        (
            "cut",
            qcow2[..qcow2.len() / 2].to_vec(),
            "is truncated: its ",
        ),
        (
            "cut-gzip",
            gzip[..gzip.len() / 2].to_vec(),
            "the gzip file is truncated",
        ),
        (
            "vmdk",
            made(&["vmdk", "-o", "subformat=streamOptimized"]),
            "the image is a VMDK image",
        ),
    ]
}

#[test]
fn a_bad_image_is_refused_with_the_field_named_and_leaves_nothing() {
    if !kvm_or_skip("a_bad_image_is_refused_with_the_field_named_and_leaves_nothing") {
        return;
    }
    let hosts = EmbeddedHosts::new().unwrap();
    let host = hosts.host("a", 1);
    for (name, image, says) in bad_images(&hosts) {
        fs::write(hosts.path("image"), image).unwrap();
        let file = document(&hosts, name);
        let said = host.complains(&["run", &file, "--no-cgroups", "--detach"]);
        let said = said.unwrap();
        assert!(
            said.contains(".source: ") && said.contains(says),
            "{name}: {said}"
        );
    }
    let spool = fs::read_dir(hosts.path("a/state/image-spool")).unwrap();
    assert_eq!(spool.count(), 0);
}
