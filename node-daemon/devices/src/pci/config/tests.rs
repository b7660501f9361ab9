use proptest::prelude::*;

use super::*;

fn space() -> ConfigSpace {
    let mut space = ConfigSpace::new(&Identity {
        vendor: 0x1AF4,
        device: 0x1042,
        revision: 1,
        class: [1, 0, 0],
        subsystem_vendor: 0x1AF4,
        subsystem: 0x40,
    });
    space.add_memory_bar(0, 0x8000);
    space.add_capability(9, &[0x10, 1, 2, 3]);
    space.add_capability(0x11, &[0; 10]);
    space.place_bar(0, GuestAddress(0xC000_0000));
    space
}

fn dword(space: &ConfigSpace, register: u16) -> u32 {
    let mut data = [0; 4];
    space.read(register, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn a_bar_tells_its_size_when_all_ones_are_written_and_then_moves() {
    let mut space = space();
    space.write(0x10, &u32::MAX.to_le_bytes());
    assert_eq!(dword(&space, 0x10), 0xFFFF_8000);
    space.write(0x10, &0xD000_0000_u32.to_le_bytes());
    let bars = space.bars();
    assert_eq!(bars.len(), 1);
    assert_eq!(bars[0].start, GuestAddress(0xD000_0000));
    assert_eq!(bars[0].size_bytes, 0x8000);
}

#[test]
fn no_bar_decodes_while_memory_decoding_is_off() {
    let mut space = space();
    space.write(0x04, &[0, 0]);
    assert_eq!(space.bars(), []);
    space.write(0x04, &[2, 0]);
    assert_eq!(space.bars().len(), 1);
}

#[test]
fn the_capability_list_is_a_chain_that_ends() {
    let space = space();
    let mut at = u16::try_from(dword(&space, 0x34) & 0xFF).unwrap();
    let mut ids = Vec::new();
    while at != 0 {
        ids.push(space.word(at) & 0xFF);
        at = space.word(at) >> 8;
    }
    assert_eq!(ids, [9, 0x11]);
    assert_ne!(
        space.word(6) & 0x10,
        0,
        "the status register announces capabilities"
    );
}

#[test]
fn a_saved_space_of_another_function_is_refused() {
    let mut own = space();
    let mut other = own.save();
    other.0[2] = 0x41;
    assert_eq!(
        own.restore(&other),
        Err("configuration byte 0x2 is 0x41, not 0x42".to_owned())
    );
    assert!(own.restore(&ConfigState(vec![0; 3])).is_err());
}

proptest! {
    #[test]
    fn guest_writes_change_nothing_that_identifies_the_function(
        writes in prop::collection::vec((0_u16..256, prop::collection::vec(any::<u8>(), 1..=4)), 0..64)
    ) {
        let fresh = space();
        let mut written = space();
        for (register, data) in &writes {
            written.write(*register, data);
        }
        for register in [0x00, 0x08, 0x2C, 0x34, 0x40, 0x48] {
            prop_assert_eq!(dword(&written, register), dword(&fresh, register));
        }
        for bar in written.bars() {
            prop_assert_eq!(bar.start.0 % bar.size_bytes, 0);
        }
        let mut restored = space();
        restored.restore(&written.save()).unwrap();
        prop_assert_eq!(restored.save(), written.save());
    }
}
