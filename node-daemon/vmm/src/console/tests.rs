use std::io::Read as _;

use super::*;

#[test]
fn a_terminal_that_attaches_late_sees_the_past_and_then_the_present() {
    let mut console = Console::new();
    console.write_all(b"early ").unwrap();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    console.attach(ours);
    console.write_all(b"late").unwrap();
    drop(console);
    let mut seen = String::new();
    theirs.read_to_string(&mut seen).unwrap();
    assert_eq!(seen, "early late");
}

#[test]
fn a_terminal_that_does_not_read_never_holds_the_guest_up() {
    let mut console = Console::new();
    let (ours, _theirs) = UnixStream::pair().unwrap();
    console.attach(ours);
    for _ in 0..1024 {
        console.write_all(&[b'x'; 4096]).unwrap();
    }
    assert_eq!(console.recent().len(), HISTORY_BYTES);
}

/// Attaches by position, and reads until the console detaches the terminal.
fn followed(console: &Console, from: Option<u64>) -> (u64, String) {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let position = console.follow(ours, from).unwrap();
    console.detach_followers();
    let mut seen = String::new();
    theirs.read_to_string(&mut seen).unwrap();
    (position, seen)
}

#[test]
fn a_terminal_goes_on_at_its_position_where_the_guest_has_moved_to() {
    let mut source = Console::new();
    source.write_all(b"before the move, ").unwrap();
    let text = serde_json::to_string(&source.save()).unwrap();
    let mut destination = Console::new();
    destination.restore(&serde_json::from_str(&text).unwrap());
    destination.write_all(b"after it").unwrap();
    assert_eq!(
        followed(&destination, Some(7)),
        (7, "the move, after it".to_owned())
    );
    let all = "before the move, after it";
    assert_eq!(followed(&destination, None), (0, all.to_owned()));
    assert_eq!(destination.recent(), all.as_bytes());
    // A position that is not reached yet is of an earlier start.
    assert_eq!(followed(&destination, Some(99)), (0, all.to_owned()));
}

#[test]
fn a_terminal_is_told_how_much_it_has_missed() {
    let mut console = Console::new();
    console.write_all(&vec![b'x'; HISTORY_BYTES]).unwrap();
    console.write_all(b"y").unwrap();
    let (position, seen) = followed(&console, Some(0));
    assert_eq!((position, seen.len()), (1, HISTORY_BYTES));
    assert!(seen.ends_with("xy"));
}

/// Positions are counted, so no line may be left out.
#[test]
fn a_follower_that_does_not_read_is_detached_and_loses_nothing_before_that() {
    let mut console = Console::new();
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    console.follow(ours, None).unwrap();
    let line = |number: u32| format!("{number:099}\n");
    for number in 0..20_000 {
        console.write_all(line(number).as_bytes()).unwrap();
    }
    let mut seen = String::new();
    theirs.read_to_string(&mut seen).unwrap();
    let expected: String = (0..20_000).map(line).collect();
    assert!(seen.len() < expected.len(), "it was not detached");
    assert!(expected.starts_with(&seen));
}

#[test]
fn so_many_terminals_may_follow_and_one_that_has_gone_makes_room() {
    let console = Console::new();
    let mut theirs = Vec::new();
    let mut follow = || {
        let (ours, end) = UnixStream::pair().unwrap();
        theirs.push(end);
        console.follow(ours, None)
    };
    for _ in 0..FOLLOWERS_MAX {
        follow().unwrap();
    }
    assert_eq!(follow(), Err(TooManyTerminals));
    theirs.clear();
    let (ours, _end) = UnixStream::pair().unwrap();
    console.follow(ours, None).unwrap();
}

#[test]
fn an_absurd_position_and_too_much_output_of_a_peer_are_cut() {
    let console = Console::new();
    console.restore(&SavedConsole {
        position: 3,
        recent: Blob::of_bytes(&vec![b'x'; HISTORY_BYTES + 7]),
    });
    assert_eq!(console.recent().len(), HISTORY_BYTES);
    assert_eq!(console.save().position, HISTORY_BYTES as u64);
    console.restore(&SavedConsole {
        position: u64::MAX,
        recent: Blob::of_bytes(b"x"),
    });
    console.clone().write_all(b"y").unwrap();
    assert_eq!(console.save().position, u64::MAX);
}

/// A crash of the process leaves the file as it is after any write.
#[test]
fn the_end_of_the_log_is_the_last_output_after_each_write() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("console.log");
    let open = || {
        let mut options = std::fs::OpenOptions::new();
        let options = options.create(true).truncate(false).write(true);
        options.open(&path).unwrap()
    };
    std::fs::write(&path, "of an earlier process\n").unwrap();
    let mut console = Console::with_log(open()).unwrap();
    let piece: Vec<u8> = (0..=u8::MAX).cycle().take(99_991).collect();
    for number in 0..40_u32 {
        console.write_all(&number.to_le_bytes()).unwrap();
        console.write_all(&piece).unwrap();
        let log = std::fs::read(&path).unwrap();
        let recent = console.recent();
        assert!(log.ends_with(&recent), "after piece {number}");
        assert!(log.len() < (1 << 20) + 100_000, "{} bytes", log.len());
    }
}
