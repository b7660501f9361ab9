//! Imports whose processes end in any way, with other programs in the place of `bascule-import`.

use std::process::{Child, Command};

use bascule_types::{Generation, SlotId};

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
