//! Imports whose processes end in any way, with other programs in the place of `bascule-import`.

use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command};

use bascule_types::{
    Generation, HttpAuthorization, ImageDigest, SecretKey, SlotId, SourceAuthorization,
};

use super::*;

fn order<'a>(disk: DiskId, attempt: u32, source: &'a ImportSource) -> ImportOrder<'a> {
    ImportOrder {
        volume: "gold",
        vm: VmUid::random(),
        owner: Owner {
            slot: SlotId(1),
            generation: Generation(1),
        },
        epoch: Epoch(1),
        disk,
        attempt: Some(attempt),
        source,
    }
}

/// An import under way in `process`, as its first report says.
fn under_way(node: &Supervisor, disk: DiskId, process: &Child) {
    let report = ImportReport {
        volume: "gold".to_owned(),
        disk,
        attempt: 1,
        downloaded: Bytes(7),
        written: Bytes(5),
        total: None,
        state: ImportState::Running,
    };
    let path = node.paths.import(disk);
    write_report(&path, &report).unwrap();
    let pid = process.id().to_string();
    fs::write(path.with_extension("pid"), pid).unwrap();
}

fn sleeping() -> Child {
    Command::new("sleep").arg("1000").spawn().unwrap()
}

fn state(node: &Supervisor) -> (u32, ImportState) {
    let reports = node.import_reports().unwrap();
    let [report] = &reports[..] else {
        panic!("{reports:?}")
    };
    (report.attempt, report.state.clone())
}

/// Found by reading: the report said "running" for ever, the disk was never filled, and the deletion of its VM
/// waited for the import's end.
#[test]
fn an_import_whose_process_was_killed_has_failed() {
    let folder = tempfile::tempdir().unwrap();
    let node = Supervisor::test(folder.path());
    let disk = DiskId::random();
    let mut process = sleeping();
    under_way(&node, disk, &process);
    assert_eq!(state(&node), (1, ImportState::Running));
    process.kill().unwrap();
    process.wait().unwrap();
    let (attempt, killed) = state(&node);
    let ImportState::Failed { message, is_final } = killed else {
        panic!("{killed:?}")
    };
    assert!(message.contains("was killed"), "{message}");
    assert!(!is_final && attempt == 1);
}

#[test]
fn a_cancelled_import_leaves_neither_process_nor_cgroup_nor_report() {
    let folder = tempfile::tempdir().unwrap();
    let node = Supervisor::recording(folder.path());
    let disk = DiskId::random();
    let process = sleeping();
    let pid = process.id();
    under_way(&node, disk, &process);
    node.adopt_child(process);
    assert_eq!(node.cancel_import_soon(disk).unwrap(), Outcome::Done);
    assert!(!is_alive(pid));
    assert_eq!(node.import_reports().unwrap(), []);
    assert_eq!(
        node.launched(),
        format!("remove-cgroup bascule/import-{disk}\n")
    );
    // Repeated, as every command may be.
    assert_eq!(node.cancel_import_soon(disk).unwrap(), Outcome::Done);
}

#[test]
fn an_attempt_that_cannot_begin_is_reported_as_failed_and_not_repeated() {
    let folder = tempfile::tempdir().unwrap();
    let node = Supervisor::test(folder.path());
    let disk = DiskId::random();
    let source = ImportSource::HostFile {
        name: "debian".to_owned(),
    };
    for (wanted, reported) in [(1, 1), (1, 1), (2, 2)] {
        let outcome = node.import(&order(disk, wanted, &source)).unwrap();
        assert_eq!(outcome, Outcome::Done);
        let (attempt, failed) = state(&node);
        let ImportState::Failed { message, .. } = failed else {
            panic!("{failed:?}")
        };
        assert!(message.contains("allow-list"), "{message}");
        assert_eq!(attempt, reported);
    }
}

fn https(authorization: Option<SourceAuthorization>) -> ImportSource {
    ImportSource::Http {
        url: "https://images.example/a".to_owned(),
        digest: ImageDigest::Sha256("0".repeat(64)),
        ca_bundle: None,
        authorization,
    }
}

/// Command lines are visible to every user of a node, environments to whoever may trace, and a job stays for as
/// long as its import fails.
#[test]
fn an_importer_gets_the_authorization_header_on_standard_input_and_nowhere_else() {
    let folder = tempfile::tempdir().unwrap();
    let node = Supervisor::recording(folder.path());
    let disk = DiskId::random();
    let header = SourceAuthorization {
        secret: SecretKey {
            name: "images".to_owned(),
            key: "authorization".to_owned(),
        },
        value: HttpAuthorization::parse(b"Bearer hunter2").unwrap(),
    };
    let source = https(Some(header));
    let outcome = node.import(&order(disk, 1, &source)).unwrap();
    assert_eq!(outcome, Outcome::Done);
    let launched = wait_for(LIMIT, || {
        let calls = node.launched();
        calls.contains("bascule-import").then_some(calls)
    });
    let launched = launched.unwrap();
    assert!(launched.contains(" --stdin "), "{launched}");
    assert!(!launched.contains("hunter2"), "{launched}");
    assert_eq!(node.recorded("input"), "Bearer hunter2");
    let environment = node.recorded("environment");
    assert!(environment.contains("PATH="), "{environment}");
    assert!(!environment.contains("hunter2"), "{environment}");
    let job = node.paths.import(disk).with_extension("job");
    let text = fs::read_to_string(&job).unwrap();
    assert!(
        text.contains("images.example") && text.contains("\"authorization\""),
        "{text}"
    );
    assert_eq!(
        fs::metadata(&job).unwrap().permissions().mode() & 0o777,
        0o600
    );
    // Nor is it in any other file of the node, such as its reports and logs.
    let search = ["-r", "-l", "hunter2"];
    let found = Command::new("grep")
        .args(search)
        .arg(folder.path())
        .output();
    let found = String::from_utf8(found.unwrap().stdout).unwrap();
    let record = folder.path().join("programs/bascule-node.input");
    assert_eq!(
        found.lines().collect::<Vec<_>>(),
        [record.to_str().unwrap()]
    );
}

#[test]
fn an_importer_without_a_header_to_send_has_no_standard_input() {
    let folder = tempfile::tempdir().unwrap();
    let node = Supervisor::recording(folder.path());
    node.import(&order(DiskId::random(), 1, &https(None)))
        .unwrap();
    let launched = wait_for(LIMIT, || {
        let calls = node.launched();
        calls.contains("bascule-import").then_some(calls)
    });
    assert!(!launched.unwrap().contains("--stdin"));
    assert_eq!(node.recorded("input"), "");
}

const LIMIT: Duration = Duration::from_secs(20);
