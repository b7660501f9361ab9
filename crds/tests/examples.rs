//! The manifests in `examples/` are valid, and the README shows the same text.
#![cfg(feature = "kinds")]
#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use bascule_crds::{SharedVolume, VirtualMachine, VirtualMachineMigration};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn example(name: &str) -> String {
    let path = root().join("examples").join(name);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The document as its type; fails on a field that the type does not have.
fn parse<T: DeserializeOwned + Serialize>(text: &str) -> T {
    let object: T = serde_saphyr::from_str(text).unwrap();
    let written: Value = serde_saphyr::from_str(text).unwrap();
    assert_known(&written, &serde_json::to_value(&object).unwrap(), "");
    object
}

fn assert_known(written: &Value, read: &Value, path: &str) {
    match (written, read) {
        (Value::Object(written), Value::Object(read)) => {
            for (key, value) in written {
                let path = format!("{path}.{key}");
                let known = read
                    .get(key)
                    .unwrap_or_else(|| panic!("unknown field {path}"));
                assert_known(value, known, &path);
            }
        }
        (Value::Array(written), Value::Array(read)) => {
            assert_eq!(written.len(), read.len(), "{path}");
            for (written, read) in written.iter().zip(read) {
                assert_known(written, read, path);
            }
        }
        _ => {}
    }
}

#[test]
fn every_example_is_parsed_and_checked() {
    let mut names: Vec<String> = fs::read_dir(root().join("examples"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    assert_eq!(
        names,
        [
            "authorized-image.yaml",
            "bascule-guests.service",
            "embedded.yaml",
            "migration.yaml",
            "sharedvolume.yaml",
            "virtualmachine.yaml"
        ],
        "an example that this test does not check"
    );
    for name in [
        "authorized-image.yaml",
        "embedded.yaml",
        "virtualmachine.yaml",
    ] {
        let vm: VirtualMachine = parse(&example(name));
        let checked = vm.spec.check(&vm.metadata);
        assert_eq!(checked, Ok(()), "{name}");
    }
    let volume: SharedVolume = parse(&example("sharedvolume.yaml"));
    let vm: VirtualMachine = parse(&example("virtualmachine.yaml"));
    assert_eq!(volume.metadata.name.as_deref(), Some(&*vm.spec.volume));
    let migration: VirtualMachineMigration = parse(&example("migration.yaml"));
    assert_eq!(migration.metadata.namespace, vm.metadata.namespace);
    let moved = Some(migration.spec.virtual_machine);
    assert_eq!(moved, vm.metadata.name);
}

/// The lines of a section, as key and value, in their order.
fn section<'a>(unit: &'a str, name: &str) -> Vec<(&'a str, &'a str)> {
    let header = format!("[{name}]");
    let lines = unit.lines().skip_while(|line| *line != header).skip(1);
    lines
        .take_while(|line| !line.starts_with('['))
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
        .map(|line| line.split_once('=').unwrap_or_else(|| panic!("{line}")))
        .collect()
}

/// A key that systemd does not know is only a line in its log; so is a unit that is stopped too late.
#[test]
fn the_service_unit_stops_guests_before_what_they_need() {
    let unit = example("bascule-guests.service");
    let value = |part: &str, key: &str| -> String {
        let lines = section(&unit, part);
        let values = lines.iter().filter(|line| line.0 == key).map(|line| line.1);
        values.collect::<Vec<_>>().join(" ")
    };
    let known = [
        (
            "Unit",
            &["Description", "After", "Wants", "RequiresMountsFor"][..],
        ),
        (
            "Service",
            &[
                "Type",
                "RemainAfterExit",
                "ExecStart",
                "ExecStop",
                "TimeoutStopSec",
                "KillMode",
            ],
        ),
        ("Install", &["WantedBy"]),
    ];
    for (part, keys) in known {
        for (key, _) in section(&unit, part) {
            assert!(keys.contains(&key), "[{part}] {key}");
        }
    }
    let sections = unit.lines().filter(|line| line.starts_with('['));
    assert_eq!(sections.count(), known.len());
    let after = value("Unit", "After");
    for needed in [
        "network-online.target",
        "remote-fs.target",
        "iscsid.service",
        "multipathd.service",
        "kubelet.service",
        "containerd.service",
    ] {
        assert!(after.split(' ').any(|unit| unit == needed), "{needed}");
    }
    // Otherwise it counts as stopped right after the boot, and nothing is executed at a shutdown.
    assert_eq!(value("Service", "Type"), "oneshot");
    assert_eq!(value("Service", "RemainAfterExit"), "yes");
    let stop = value("Service", "ExecStop");
    assert!(
        stop.ends_with("/bin/current/bascule-node host-shutdown"),
        "{stop}"
    );
    assert_eq!(value("Service", "TimeoutStopSec"), "10min");
    assert_eq!(value("Install", "WantedBy"), "multi-user.target");
}

/// systemd's own check: unknown keys, values that it cannot read, cycles of its order.
#[test]
fn systemd_accepts_the_service_unit() {
    let unit = root().join("examples/bascule-guests.service");
    let verified = Command::new("systemd-analyze")
        .args(["verify", "--man=no"])
        .arg(&unit)
        .output();
    let Ok(verified) = verified else {
        let ci = std::env::var_os("CI").is_some();
        assert!(!ci, "CI needs systemd-analyze");
        eprintln!("skipped: there is no systemd-analyze");
        return;
    };
    // What it ignores is no failure to it, but a line.
    let said = String::from_utf8_lossy(&verified.stderr);
    assert!(verified.status.success() && said.is_empty(), "{said}");
}

#[test]
fn the_readme_shows_the_examples() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let (_, block) = readme.split_once("```yaml\n").unwrap();
    let (block, _) = block.split_once("```").unwrap();
    let without_comments = |text: String| {
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(|line| format!("{line}\n")).collect::<String>()
    };
    let shown = ["sharedvolume.yaml", "virtualmachine.yaml"].map(example);
    assert_eq!(block, shown.map(without_comments).join("---\n"));
}
