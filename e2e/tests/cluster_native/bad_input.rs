//! Bad input: the API refuses it and names the field, or, where only a node or the volume can check
//! it, a condition names it. Running guests are not affected.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, ensure};
use bascule_e2e::kubernetes::{Installation, NAMESPACE, VOLUME};
use bascule_types::{ClusterId, Lba, VolumeId};
use bascule_volume_format::{
    BLOCK_BYTES, BLOCK_BYTES_U64, BlockStore, Features, Fencing, FencingPolicy, FormatRequest,
    MemStore, Place, Timings, make_volume, seal_block,
};
use serde_json::Value;

use super::CLUSTER;

/// What to replace in a good document, by what, and what the refusal must contain.
const BAD_DOCUMENTS: &[(&str, &str, &str)] = &[
    ("memory: 128Mi", "memory: -1Gi", "spec.memory"),
    ("memory: 128Mi", "memory: \"0\"", "at least 16Mi"),
    ("memory: 128Mi", "memory: 8Ti", "at most 4Ti"),
    ("memory: 128Mi", "memory: 99999999Ti", "at most 4Ti"),
    ("memory: 128Mi", "memory: 17Mi", "multiple of 2Mi"),
    ("memory: 128Mi", "memory: 17825792", "multiple of 2Mi"),
    ("memory: 128Mi", "memory: 1", "at least 16Mi"),
    ("memory: 128Mi", "memory: 128Mb", "such as 512Mi"),
    (
        "migration: {downtime",
        "migration: {liveTimeout: 300, downtime",
        "spec.availability.migration.liveTimeout",
    ),
    ("size: 64Mi", "size: 5", "at least 1Mi"),
    ("size: 64Mi", "size: 1gi", "spec.disks[0].size"),
    (
        "memory: 128Mi",
        "memory: 128Mi\n  cpu: {cores: 0}",
        "spec.cpu.cores",
    ),
    (
        "memory: 128Mi",
        "memory: 128Mi\n  cpu: {cores: -4}",
        "spec.cpu.cores",
    ),
    (
        "memory: 128Mi",
        "memory: 128Mi\n  cpu: {cores: 100000}",
        "spec.cpu.cores",
    ),
    ("bridge: lan", "bridge: ../lan", "spec.interfaces[0].bridge"),
    (
        "{name: lan, bridge: lan}",
        "{name: lan, bridge: lan, mac: \"01:00:5e:00:00:01\"}",
        "mac must be a unicast address",
    ),
    (
        "{name: lan, bridge: lan}",
        "{name: a, bridge: lan, mac: \"02:00:00:00:00:0a\"}\n  \
         - {name: b, bridge: lan, mac: \"02:00:00:00:00:0a\"}",
        "two interfaces have the same mac",
    ),
    ("sha256: ", "sha256: x", "spec.boot.kernel.http.sha256"),
    ("sha256: ", "sha512: ", "spec.boot.kernel.http.sha512"),
    (
        "sha256: ",
        "sha512: x, sha256: ",
        "set exactly one of sha256 and sha512",
    ),
    ("url: \"http", "url: \"ftp", "spec.boot.kernel.http.url"),
    (
        "sha256: ",
        "authorizationFrom: {secretKeyRef: {name: a, key: b}}, sha256: ",
        "authorizationFrom needs an https:// URL",
    ),
    (
        "url: \"http://",
        "authorizationFrom: {secretKeyRef: {name: a, key: b}}, url: \"https://user:password@",
        "set authorizationFrom or user and password in the URL, not both",
    ),
    (
        "url: \"http://",
        "authorizationFrom: {secretKeyRef: {name: ../a, key: b}}, url: \"https://",
        "spec.boot.kernel.http.authorizationFrom.secretKeyRef.name",
    ),
    (
        "size: 64Mi",
        "size: 64Mi, existing: {name: a.b}",
        "spec.disks[0]",
    ),
    ("size: 64Mi", "size: \"-5\"", "spec.disks[0].size"),
];

#[test]
fn the_api_refuses_a_bad_document_and_names_the_field() {
    CLUSTER.with(
        "the_api_refuses_a_bad_document_and_names_the_field",
        |cluster| {
            let good = cluster.document("refused", 60);
            for (from, to, words) in BAD_DOCUMENTS {
                assert!(good.contains(from), "{from} is not in {good}");
                let error = cluster
                    .lab()
                    .apply(&good.replacen(from, to, 1))
                    .unwrap_err();
                let error = format!("{error:#}");
                assert!(error.contains(words), "{to}: {error}");
            }
            // A quantity may be a number. Nothing is created, so that nothing has to be taken down.
            let number = good
                .replacen("memory: 128Mi", "memory: 134217728", 1)
                .replacen("size: 64Mi", "size: 67108864", 1);
            let dry_run = ["apply", "--server-side", "--dry-run=server", "-f", "-"];
            let run = cluster.lab().kubectl_run().unwrap().args(dry_run);
            run.stdin(number).done().unwrap();
            let left = cluster
                .lab()
                .kubectl(&["get", "vm", "-n", NAMESPACE, "-o", "name"]);
            assert!(!left.unwrap().contains("refused"), "none was let in");
        },
    );
}

#[test]
fn a_vm_that_cannot_start_says_why_in_a_condition_and_does_not_affect_others() {
    CLUSTER.with_vm("bystander", 61, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        apply_bad_vms(cluster);

        for (name, reason, words) in [
            ("greedy", "Unschedulable", "Insufficient memory"),
            (
                "nobridge",
                "StartFailed",
                "interfaces[0].bridge: no bridge \"wan\"",
            ),
            (
                "nourl",
                "ImportFailed",
                "could not be fetched: fetch http://",
            ),
            ("wronghash", "ImportFailed", "its SHA-256 is"),
            ("nokernel", "ImageRefused", "not a kernel: neither"),
            ("thief", "DiskClaimed", "spec.disks[data].existing.name: "),
            ("novolume", "VolumeMissing", "silver"),
            ("toolarge", "VolumeFull", "spec.disks[data]: "),
        ] {
            await_ready_says(cluster, &["vm", name, "-n", NAMESPACE], reason, words);
        }

        talk.ping().unwrap();
        talk.check().unwrap();
        let names = [
            "greedy",
            "nobridge",
            "nourl",
            "wronghash",
            "nokernel",
            "thief",
            "novolume",
            "toolarge",
        ];
        let delete = [
            &["delete", "vm", "-n", NAMESPACE, "--timeout=90s"][..],
            &names,
        ]
        .concat();
        let gone = lab
            .kubectl_run()
            .unwrap()
            .args(delete)
            .deadline(DELETE_LIMIT)
            .done();
        gone.unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
    });
}

#[test]
fn an_impossible_migration_is_refused_with_its_reason() {
    CLUSTER.with_vm("mover", 63, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let home = vm.node().unwrap();
        let other = lab.nodes().map(|n| n.name()).find(|n| *n != home).unwrap();
        let stopped =
            cluster
                .document("resting", 64)
                .replacen("spec:\n", "spec:\n  runPolicy: Stopped\n", 1);
        lab.apply(&stopped).unwrap();
        lab.kubectl(&["cordon", &other]).unwrap();
        let ask = |name: &str, vm: &str, more: &str| {
            let document = format!(
                "apiVersion: bascule.dev/v1alpha1\nkind: VirtualMachineMigration\n\
                 metadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
                 spec: {{virtualMachine: {vm}{more}}}\n"
            );
            lab.apply(&document).unwrap();
        };
        ask("no-vm", "absent", "");
        ask("at-rest", "resting", "");
        for (name, target, reason) in [
            ("to-itself", home.as_str(), "TargetIsSource"),
            ("to-nowhere", "n99", "TargetUnknown"),
            ("to-a-cordoned-node", other.as_str(), "TargetCordoned"),
        ] {
            ask(name, "mover", &format!(", target: {target}"));
            await_refusal(cluster, name, reason);
        }
        await_refusal(cluster, "no-vm", "VirtualMachineNotFound");
        await_refusal(cluster, "at-rest", "VirtualMachineNotRunning");
        // The other node is cordoned: the first migration waits for a node, the second is refused.
        ask("first", "mover", "");
        lab.wait_for("the first to be under way", SAID_LIMIT, || {
            let first = lab.get(&["vmmig", "first", "-n", NAMESPACE])?;
            ensure!(first["status"]["phase"] == "Placing", "{}", first["status"]);
            Ok(())
        })
        .unwrap();
        ask("second", "mover", "");
        await_refusal(cluster, "second", "AnotherMigrationRuns");
        lab.kubectl(&["uncordon", &other]).unwrap();
        assert_eq!(vm.wait_elsewhere(&home, MOVE_LIMIT).unwrap(), other);
        talk.ping().unwrap();
        talk.check().unwrap();
        lab.kubectl(&["delete", "vm", "resting", "-n", NAMESPACE])
            .unwrap();
    });
}

#[test]
fn a_volume_that_cannot_be_used_says_why_and_is_left_as_it_is() {
    let name = "a_volume_that_cannot_be_used_says_why_and_is_left_as_it_is";
    CLUSTER.with(name, |cluster| {
        let lab = cluster.lab();
        // The nodes of this tier see the host's files here; they get copies, as they would be given
        // the same device.
        let dir = tempfile::tempdir().unwrap();
        let at = |file: &str| dir.path().join(file);
        fs::write(at("small"), vec![0; 1 << 20]).unwrap();
        fs::write(at("garbage"), vec![0x5A; 128 << 20]).unwrap();
        write_volume(&at("foreign"), Features::NONE).unwrap();
        write_volume(&at("newer"), Features::from_bits(1 << 41)).unwrap();
        let files = ["small", "garbage", "foreign", "newer"];
        for file in files {
            for node in lab.nodes() {
                let from = at(file).to_string_lossy().into_owned();
                node.exec(&["cp", &from, &on_node(file)]).unwrap();
            }
        }
        for file in files.iter().chain(&["missing"]) {
            let backing = format!("{{file: {{path: {}}}}}", on_node(file));
            lab.apply(&volume(&format!("bad-{file}"), &backing, "LeaseOnly"))
                .unwrap();
        }
        let gone = "{device: {path: /dev/disk/by-id/gone}}";
        lab.apply(&volume("bad-gone", gone, "LeaseOnly")).unwrap();
        lab.apply(&volume("bad-fencing", gone, "PersistentReservation"))
            .unwrap();
        for (name, reason, words) in [
            ("bad-small", "NotFormatted", "bad-small is too small"),
            ("bad-garbage", "NotBlank", "magic missing"),
            ("bad-foreign", "NotBlank", "is bound to cluster"),
            ("bad-newer", "NotBlank", "newer than this release"),
            ("bad-missing", "NotFormatted", "bad-missing: "),
            ("bad-gone", "NotFormatted", "/dev/disk/by-id/gone"),
            (
                "bad-fencing",
                "FencingNotImplemented",
                "use Watchdog or LeaseOnly",
            ),
        ] {
            await_ready_says(cluster, &["sv", name], reason, words);
        }
        let refused = lab.get(&["sv", "bad-fencing"]).unwrap();
        let message = complaint(&refused, "FencingAvailable").unwrap();
        assert!(message.starts_with("FencingNotImplemented"), "{message}");
        strand_a_vm(cluster);
        let names = [
            "small", "garbage", "foreign", "newer", "missing", "gone", "fencing",
        ];
        let names: Vec<String> = names.iter().map(|name| format!("bad-{name}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        lab.kubectl(&[&["delete", "sv", "--timeout=60s"][..], &names].concat())
            .unwrap();
        for file in files {
            for node in lab.nodes() {
                let before = at(file).to_string_lossy().into_owned();
                node.exec(&["cmp", &before, &on_node(file)])
                    .expect("it was written to");
                node.exec(&["rm", &on_node(file)]).unwrap();
            }
        }
    });
}

#[test]
fn a_node_without_kvm_says_so_and_is_given_no_guest() {
    CLUSTER.with_vm("elsewhere", 66, |cluster, vm| {
        let lab = cluster.lab();
        let mut talk = vm.talk().unwrap();
        let home = vm.node().unwrap();
        let other = lab.nodes().map(|n| n.name()).find(|n| *n != home).unwrap();
        let node = lab.node(&other).unwrap();
        node.exec(&["mv", "/dev/kvm", "/dev/kvm.away"]).unwrap();
        lab.wait_for("the volume's status to say so", SAID_LIMIT, || {
            let volume = lab.get(&["sv", VOLUME])?;
            let nodes = volume["status"]["nodes"].as_array();
            let found = nodes
                .into_iter()
                .flatten()
                .find(|node| node["name"] == *other);
            let message = found.and_then(|node| node["kvmError"].as_str());
            ensure!(
                message.is_some_and(|t| t.contains("/dev/kvm")),
                "it says {found:?}"
            );
            Ok(())
        })
        .unwrap();
        lab.wait_for("an event about the node", SAID_LIMIT, || {
            let described = lab.kubectl(&["describe", "node", &other])?;
            ensure!(described.contains("KvmUnavailable"), "{described}");
            Ok(())
        })
        .unwrap();
        lab.apply(&cluster.document("pinned", 67).replacen(
            "spec:\n",
            &format!("spec:\n  placement: {{nodeSelector: {{kubernetes.io/hostname: {other}}}}}\n"),
            1,
        ))
        .unwrap();
        let pinned = ["vm", "pinned", "-n", NAMESPACE];
        await_ready_says(cluster, &pinned, "Unschedulable", "/dev/kvm");
        node.exec(&["mv", "/dev/kvm.away", "/dev/kvm"]).unwrap();
        // The node accepts guests again at once.
        cluster.handle("pinned", 67).wait_ready(MOVE_LIMIT).unwrap();
        lab.kubectl(&["delete", "vm", "pinned", "-n", NAMESPACE])
            .unwrap();
        talk.ping().unwrap();
        talk.check().unwrap();
    });
}

/// A VM on an unusable volume waits, names the reason in its condition, and can be deleted.
fn strand_a_vm(cluster: &Installation) {
    let lab = cluster.lab();
    let stranded = cluster.document("stranded", 65).replacen(
        &format!("volume: {VOLUME}"),
        "volume: bad-gone",
        1,
    );
    lab.apply(&stranded).unwrap();
    let vm = ["vm", "stranded", "-n", NAMESPACE];
    await_ready_says(cluster, &vm, "VolumeUnavailable", "bad-gone");

    lab.kubectl(&["delete", "vm", "stranded", "-n", NAMESPACE])
        .unwrap();
}

/// VMs with one error each that the API server cannot detect.
fn apply_bad_vms(cluster: &Installation) {
    let lab = cluster.lab();
    let garbage = tempfile::NamedTempFile::new().unwrap();
    fs::write(garbage.path(), vec![0x5A; 8192]).unwrap();
    let no_kernel = lab.publish("no-kernel", garbage.path()).unwrap();

    let bad = |name: &str, from: &str, to: &str| {
        let document = cluster.document(name, 62);
        assert!(document.contains(from), "{from} is not in {document}");
        lab.apply(&document.replacen(from, to, 1)).unwrap();
    };
    let document = cluster.document("x", 62);
    let between = |a: &str, b: &str| {
        let from = document.find(a).unwrap() + a.len();
        let length = document[from..].find(b).unwrap();
        document[from..from + length].to_owned()
    };
    let (url, hash) = (between("url: \"", "\""), between("sha256: ", "}"));
    let image = format!("\"{url}\", sha256: {hash}");
    let other = format!("\"{}\", sha256: {}", no_kernel.url, no_kernel.sha256);
    let stolen = "existing: {name: bystander.data}";
    bad("greedy", "memory: 128Mi", "memory: 1Ti");
    bad("nobridge", "bridge: lan", "bridge: wan");
    bad("nourl", &url, &url.replace("/probe", "/nothing"));
    bad("wronghash", &hash, &"f".repeat(64));
    bad("nokernel", &image, &other);
    bad("thief", "size: 64Mi", stolen);
    bad("novolume", &format!("volume: {VOLUME}"), "volume: silver");
    let too_large = "size: 1Ti";
    bad("toolarge", "size: 64Mi", too_large);
}

pub(super) fn await_ready_says(cluster: &Installation, object: &[&str], reason: &str, words: &str) {
    let what = format!("{object:?} to say {reason}: {words}");
    let said = cluster.lab().wait_for(&what, SAID_LIMIT, || {
        let message = complaint(&cluster.lab().get(object)?, "Ready")?;
        ensure!(
            message.starts_with(&format!("{reason}: ")) && message.contains(words),
            "it says {message}"
        );
        Ok(())
    });
    said.unwrap();
}

fn await_refusal(cluster: &Installation, migration: &str, reason: &str) {
    let what = format!("migration {migration} to be refused as {reason}");
    let said = cluster.lab().wait_for(&what, SAID_LIMIT, || {
        let object = cluster.lab().get(&["vmmig", migration, "-n", NAMESPACE])?;
        let message = complaint(&object, "Complete")?;
        ensure!(
            message.starts_with(&format!("{reason}: ")),
            "it says {message}"
        );
        ensure!(
            object["status"]["phase"] == "Failed",
            "{}",
            object["status"]
        );
        Ok(())
    });
    said.unwrap();
}

/// Reason and message of a condition that is False.
fn complaint(object: &Value, kind: &str) -> Result<String> {
    let conditions = object["status"]["conditions"].as_array();
    let found = conditions.into_iter().flatten().find(|c| c["type"] == kind);
    let found = found.ok_or_else(|| anyhow::anyhow!("no condition {kind} yet"))?;
    ensure!(found["status"] == "False", "{found}");
    let text = |field: &str| found[field].as_str().unwrap_or_default().to_owned();
    Ok(format!("{}: {}", text("reason"), text("message")))
}

/// Path of a node's copy of a bad volume.
fn on_node(file: &str) -> String {
    format!("/var/lib/bascule/bad-{file}")
}

fn volume(name: &str, backing: &str, fencing: &str) -> String {
    format!(
        "apiVersion: bascule.dev/v1alpha1\nkind: SharedVolume\nmetadata: {{name: {name}}}\n\
         spec: {{backing: {backing}, fencing: {{mode: {fencing}}}}}\n"
    )
}

/// A volume of another cluster, with these features in its superblock.
fn write_volume(path: &Path, features: Features) -> io::Result<()> {
    let device_bytes = 128 << 20;
    let request = FormatRequest {
        volume: VolumeId::random(),
        cluster: ClusterId::random(),
        fencing: Fencing::LeaseOnly,
        policy: FencingPolicy::default(),
        timings: Timings::default(),
        slot_count: 8,
        extent_mib: 1,
        device_bytes,
    };
    let mut store = MemStore::new(device_bytes / BLOCK_BYTES_U64);
    let made = make_volume(&mut store, &request, None).map_err(io::Error::other)?;
    let mut superblock = made;
    superblock.features = features;
    for lba in superblock.copy_lbas() {
        let volume = superblock.volume;
        store.write(lba, &seal_block(&superblock, Place { volume, lba }))?;
    }
    store.flush()?;
    let mut bytes = vec![];
    let mut block = [0; BLOCK_BYTES];
    for lba in 0..device_bytes / BLOCK_BYTES_U64 {
        store.read(Lba(lba), &mut block)?;
        bytes.extend_from_slice(&block);
    }
    fs::write(path, bytes)
}

/// A scheduler, an importer, a few tries.
const SAID_LIMIT: Duration = Duration::from_secs(90);
const MOVE_LIMIT: Duration = Duration::from_secs(90);
const DELETE_LIMIT: Duration = Duration::from_secs(120);
