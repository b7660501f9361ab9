use super::*;
use crate::writer_lock::{start_time, writer_of};

const VM: VmUid = VmUid::from_bytes([1; 16]);
const SETTLE: Duration = Duration::from_secs(4);
const DEVICE: Identity = Identity {
    device: 1,
    inode: 2,
    special: 3,
};

fn at(seconds: u64) -> BootTime {
    BootTime(0).after(Duration::from_secs(seconds))
}

fn me() -> WriterId {
    writer_of(VM, std::process::id()).unwrap()
}

/// A process that is no more.
fn dead() -> WriterId {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let (vm, pid) = (VM, child.id());
    child.wait().unwrap();
    WriterId {
        vm,
        pid,
        started: 1,
    }
}

fn runs(writer: WriterId) -> bool {
    start_time(writer.pid) == Some(writer.started)
}

#[test]
fn a_new_process_knows_the_writers_of_the_one_before() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert!(table.open(me(), DEVICE).unwrap());
    assert!(!table.open(me(), DEVICE).unwrap(), "not a new one");
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert!(next.must_be_watched() && !next.is_drained(VM));
    assert!(next.note_dead(&runs).is_empty());
    next.close(me()).unwrap();
    assert!(
        !WriterTable::load(run_dir.path(), Rules::ENFORCED)
            .unwrap()
            .must_be_watched()
    );
}

/// Used to be settled by a counter of the device that says nothing about requests that wait in a
/// queue, and that a busy neighbour always keeps above zero.
#[test]
fn i1_a_writer_that_died_counts_until_its_lock_was_free_for_the_settle_time() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let writer = dead();
    table.open(writer, DEVICE).unwrap();
    assert_eq!(table.note_dead(&runs), [(writer, vec![DEVICE])]);
    table.note_lock(writer, WriterLock::Held, at(10), SETTLE);
    table.note_lock(writer, WriterLock::Held, at(99), SETTLE);
    let why = table.why_not_drained(VM).unwrap();
    assert!(why.contains("has writes in flight"), "{why}");
    // A new bascule-volume asks too, and counts the settle time anew.
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert_eq!(table.note_dead(&runs), [(writer, vec![DEVICE])]);
    table.note_lock(writer, WriterLock::Free, at(100), SETTLE);
    table.note_lock(writer, WriterLock::Free, at(103), SETTLE);
    assert!(!table.is_drained(VM), "settle has not passed");
    table.note_lock(writer, WriterLock::Free, at(104), SETTLE);
    assert!(table.is_drained(VM) && table.note_dead(&runs).is_empty());
    assert!(
        !WriterTable::load(run_dir.path(), Rules::ENFORCED)
            .unwrap()
            .must_be_watched()
    );
}

#[test]
fn i1_without_proof_a_dead_writer_counts_until_the_node_restarts() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let writer = dead();
    table.open(writer, DEVICE).unwrap();
    table.note_dead(&runs);
    table.note_lock(writer, WriterLock::Free, at(10), SETTLE);
    for now in [at(20), at(30)] {
        table.note_lock(writer, WriterLock::NoProof, now, SETTLE);
        assert!(!table.is_drained(VM));
    }
    let why = table.why_not_drained(VM).unwrap();
    assert!(why.contains("restart this node"), "{why}");
    WriterTable::remove_all(run_dir.path()).unwrap();
    assert!(
        WriterTable::load(run_dir.path(), Rules::ENFORCED)
            .unwrap()
            .is_drained(VM)
    );
}

#[test]
fn i1_an_unclean_writer_stays_so_in_the_next_process_and_cannot_close() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    table.open(me(), DEVICE).unwrap();
    table.fail(me()).unwrap();
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    for table in [&mut table, &mut next] {
        let refused = table.close(me()).unwrap_err().to_string();
        assert!(refused.contains("may still land"), "{refused}");
        assert!(!table.is_drained(VM) && !table.is_completing(VM));
        assert_eq!(table.why_not_drained(VM), Some(refused));
        let other = WriterId { pid: 1, ..me() };
        let (_, may_help) = table.why_not_opened(other, true).unwrap();
        assert!(!may_help);
        assert_eq!(table.why_not_opened(me(), false), None, "it goes on");
    }
}

#[test]
fn a_later_process_with_the_same_id_is_another_writer() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let earlier = WriterId { started: 1, ..me() };
    table.open(earlier, DEVICE).unwrap();
    let (why, may_help) = table.why_not_opened(me(), false).unwrap();
    assert!(may_help, "{why}");
    table.note_dead(&runs);
    table.open(me(), DEVICE).unwrap();
    table.close(me()).unwrap();
    assert!(!table.is_drained(VM) && table.is_completing(VM));
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert_eq!(next.note_dead(&runs), [(earlier, vec![DEVICE])]);
    next.note_lock(earlier, WriterLock::Free, at(10), SETTLE);
    next.note_lock(earlier, WriterLock::Free, at(14), SETTLE);
    assert!(next.is_drained(VM));
}

#[test]
fn a_writer_with_two_devices_is_asked_for_on_both() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let writer = dead();
    let other = Identity { inode: 9, ..DEVICE };
    table.open(writer, DEVICE).unwrap();
    table.open(writer, other).unwrap();
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert_eq!(next.note_dead(&runs), [(writer, vec![DEVICE, other])]);
}

#[test]
fn a_record_of_an_earlier_release_is_a_writer_without_proof() {
    let run_dir = tempfile::tempdir().unwrap();
    fs::create_dir(run_dir.path().join("writers")).unwrap();
    let old = run_dir.path().join("writers").join(old_name(me()));
    fs::write(&old, me().started.to_string()).unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert!(
        !table.is_drained(VM) && table.note_dead(&runs).is_empty(),
        "it lives"
    );
    table.close(me()).unwrap();
    assert!(table.is_drained(VM) && !old.exists());
    fs::write(&old, "1").unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert_eq!(table.note_dead(&runs).len(), 1);
    assert_eq!(table.note_dead(&runs)[0].1, [], "no device is known");
}

#[test]
fn two_importers_of_one_vm_are_two_writers() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let other = WriterId { pid: 1, ..me() };
    table.open(other, DEVICE).unwrap();
    assert_eq!(table.why_not_opened(me(), true), None);
    table.open(me(), DEVICE).unwrap();
    table.close(other).unwrap();
    assert!(!table.is_drained(VM));
    table.close(me()).unwrap();
    assert!(table.is_drained(VM));
}

fn attached(table: &mut WriterTable, writer: WriterId) -> WriterPage {
    WriterPage::attach(table.page(writer).unwrap()).unwrap()
}

#[test]
fn a_dead_writer_whose_page_says_that_nothing_is_under_way_is_not_waited_for() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let writer = dead();
    let page = attached(&mut table, writer);
    table.open(writer, DEVICE).unwrap();
    page.write_begins();
    // A new bascule-volume reads the same page.
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert_eq!(next.note_dead(&runs).len(), 1, "a write is under way");
    page.writes_ended();
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert!(next.note_dead(&runs).is_empty() && next.is_drained(VM));
    assert_eq!(fs::read_dir(&next.page_directory).unwrap().count(), 0);
}

#[test]
fn i1_a_failed_write_in_a_page_makes_the_writer_unclean_for_good() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let page = attached(&mut table, me());
    table.open(me(), DEVICE).unwrap();
    assert_eq!(table.why_unclean(VM), None);
    page.write_failed();
    let refused = table.close(me()).unwrap_err().to_string();
    assert_eq!(table.why_unclean(VM), Some(refused));
    let next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    assert!(next.why_unclean(VM).is_some(), "it is in the record too");
}

#[test]
fn i1_only_idle_clean_writers_that_keep_their_pages_are_drained() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    table.open(me(), DEVICE).unwrap();
    assert!(!table.are_all_drained(), "it has no page");
    let file = table.page(me()).unwrap();
    assert!(!table.are_all_drained(), "it does not keep its page");
    let page = WriterPage::attach(file).unwrap();
    assert!(table.are_all_drained());
    page.write_begins();
    assert!(!table.are_all_drained(), "a write is under way");
    page.writes_ended();
    assert!(table.are_all_drained());
    page.write_failed();
    assert!(!table.are_all_drained(), "the failed write may land");
}

#[test]
fn a_writer_with_a_write_under_way_cannot_close() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let page = attached(&mut table, me());
    table.open(me(), DEVICE).unwrap();
    page.write_begins();
    table.close(me()).unwrap_err();
    page.writes_ended();
    table.close(me()).unwrap();
    assert!(table.is_drained(VM));
}

#[test]
fn the_page_of_a_process_that_only_reads_stays_while_it_lives() {
    let run_dir = tempfile::tempdir().unwrap();
    let mut table = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    let page = attached(&mut table, me());
    drop(table.page(dead()).unwrap());
    table.note_dead(&runs);
    let mut next = WriterTable::load(run_dir.path(), Rules::ENFORCED).unwrap();
    next.note_dead(&runs);
    assert_eq!(next.pages.len(), 1);
    page.write_begins();
    next.open(me(), DEVICE).unwrap();
    next.close(me()).expect_err("the same page");
}
