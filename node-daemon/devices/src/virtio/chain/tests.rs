use super::*;
use crate::testing::write_descriptor;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
const TABLE: u64 = 0x1000;

fn ram() -> GuestRam {
    GuestRam::from_ranges(&[(GuestAddress(0), 0x10_0000)]).unwrap()
}

fn read(ram: &GuestRam, head: u16) -> Result<Chain, ChainError> {
    Chain::read(ram, GuestAddress(TABLE), 8, head)
}

fn lengths(segments: &Segments) -> Vec<usize> {
    segments
        .as_slice()
        .iter()
        .map(|segment| segment.length_bytes)
        .collect()
}

#[test]
fn a_chain_is_split_into_readable_and_writable_buffers() {
    let ram = ram();
    write_descriptor(&ram, TABLE, 3, (0x8000, 16, NEXT, 5));
    write_descriptor(&ram, TABLE, 5, (0x9000, 512, NEXT | WRITE, 1));
    write_descriptor(&ram, TABLE, 1, (0xA000, 1, WRITE, 0));
    let chain = read(&ram, 3).unwrap();
    assert_eq!(chain.head, 3);
    assert_eq!(lengths(&chain.readable), [16]);
    assert_eq!(lengths(&chain.writable), [512, 1]);
}

#[test]
fn virtio_2_7_5_3_an_indirect_table_is_followed_once() {
    let ram = ram();
    write_descriptor(&ram, TABLE, 0, (0x2000, 32, INDIRECT, 0));
    write_descriptor(&ram, 0x2000, 0, (0x8000, 16, NEXT, 1));
    write_descriptor(&ram, 0x2000, 1, (0x9000, 64, WRITE, 0));
    assert_eq!(lengths(&read(&ram, 0).unwrap().writable), [64]);

    write_descriptor(&ram, 0x2000, 1, (0x3000, 16, INDIRECT, 0));
    assert_eq!(read(&ram, 0), Err(ChainError::BadIndirect { head: 0 }));
    write_descriptor(&ram, TABLE, 0, (0x2000, 33, INDIRECT, 0));
    assert_eq!(read(&ram, 0), Err(ChainError::BadIndirect { head: 0 }));
    write_descriptor(&ram, TABLE, 0, (0x2000, 0, INDIRECT, 0));
    assert_eq!(read(&ram, 0), Err(ChainError::BadIndirect { head: 0 }));
    write_descriptor(&ram, TABLE, 0, (0x2000, 32, INDIRECT | NEXT, 1));
    assert_eq!(read(&ram, 0), Err(ChainError::BadIndirect { head: 0 }));
    write_descriptor(&ram, TABLE, 0, (0xFFFF_FFFF_FFFF_FFF0, 32, INDIRECT, 0));
    assert!(matches!(read(&ram, 0), Err(ChainError::NotRam { .. })));
}

#[test]
fn a_loop_is_refused() {
    let ram = ram();
    write_descriptor(&ram, TABLE, 0, (0x8000, 16, NEXT, 1));
    write_descriptor(&ram, TABLE, 1, (0x8000, 16, NEXT, 0));
    assert_eq!(
        read(&ram, 0),
        Err(ChainError::TooLong { head: 0, limit: 8 })
    );
    write_descriptor(&ram, 0x2000, 0, (0x8000, 0, NEXT, 0));
    write_descriptor(&ram, TABLE, 2, (0x2000, 16, INDIRECT, 0));
    assert_eq!(
        read(&ram, 2),
        Err(ChainError::TooLong { head: 2, limit: 1 })
    );
}

#[test]
fn a_chain_over_the_full_table_is_not_a_loop() {
    let ram = ram();
    for index in 0..8 {
        let flags = if index == 7 { 0 } else { NEXT };
        write_descriptor(&ram, TABLE, index, (0x8000, 1, flags, index + 1));
    }
    assert_eq!(read(&ram, 0).unwrap().readable.length_bytes(), 8);
}

#[test]
fn buffers_outside_of_guest_memory_are_refused() {
    let ram = ram();
    for (start, length) in [
        (0x10_0000, 1),
        (0xF_FFFF, 2),
        (u64::MAX, 2),
        (0xFFFF_FFFF_FFFF_0000, 0x1_0000),
        (0, 0x10_0001),
    ] {
        write_descriptor(&ram, TABLE, 0, (start, length, 0, 0));
        let expected = ChainError::NotRam {
            start,
            length_bytes: length,
        };
        assert_eq!(read(&ram, 0), Err(expected));
    }
    write_descriptor(&ram, TABLE, 0, (0, u32::MAX, 0, 0));
    assert_eq!(read(&ram, 0), Err(ChainError::TooManyBytes { head: 0 }));
    assert_eq!(
        read(&ram, 8),
        Err(ChainError::IndexOutOfRange { index: 8, size: 8 })
    );
    write_descriptor(&ram, TABLE, 0, (0x8000, 1, NEXT, 9));
    assert_eq!(
        read(&ram, 0),
        Err(ChainError::IndexOutOfRange { index: 9, size: 8 })
    );
}

#[test]
fn virtio_2_7_4_2_readable_after_writable_is_refused() {
    let ram = ram();
    write_descriptor(&ram, TABLE, 0, (0x8000, 1, NEXT | WRITE, 1));
    write_descriptor(&ram, TABLE, 1, (0x8000, 1, 0, 0));
    assert_eq!(
        read(&ram, 0),
        Err(ChainError::ReadableAfterWritable { head: 0 })
    );
}

#[test]
fn empty_buffers_are_skipped() {
    let ram = ram();
    write_descriptor(&ram, TABLE, 0, (u64::MAX, 0, NEXT, 1));
    write_descriptor(&ram, TABLE, 1, (0x8000, 4, 0, 0));
    assert_eq!(lengths(&read(&ram, 0).unwrap().readable), [4]);
}

#[test]
fn ranges_are_split_and_copied_across_their_borders() {
    let ram = ram();
    let mut runs: Segments = [(0x8000, 3), (0x9000, 5)]
        .map(|(start, length_bytes)| Segment {
            start: GuestAddress(start),
            length_bytes,
        })
        .into_iter()
        .collect();
    assert_eq!(runs.write(&ram, b"abcdefghij"), 8);
    let last = runs.take_back(1).unwrap();
    let first = runs.take_front(4).unwrap();
    let text = |runs: &Segments| {
        let mut data = vec![0; runs.length_bytes()];
        assert_eq!(runs.read(&ram, &mut data), data.len());
        String::from_utf8(data).unwrap()
    };
    assert_eq!(
        (text(&first), text(&runs), text(&last)),
        ("abcd".into(), "efg".into(), "h".into())
    );
    assert_eq!(runs.take_front(4), None);
    assert_eq!(runs.length_bytes(), 3, "a refused split changes nothing");
}
