use super::*;
use crate::testing::RecordingRouter;

const ENABLED: u16 = 1 << 15;

fn msix() -> (Msix, Arc<RecordingRouter>) {
    let router = Arc::new(RecordingRouter::default());
    let msix = Msix::new(router.clone(), 2).unwrap();
    (msix, router)
}

fn program(msix: &mut Msix, vector: u64, address: u64, data: u32) {
    msix.table_write(vector * 16, &address.to_le_bytes());
    msix.table_write(vector * 16 + 8, &data.to_le_bytes());
    msix.table_write(vector * 16 + 12, &0_u32.to_le_bytes());
}

#[test]
fn an_unmasked_vector_is_routed_as_programmed_and_raised() {
    let (mut msix, router) = msix();
    msix.set_control(ENABLED);
    program(&mut msix, 1, 0xFEE0_1000, 0x42);
    msix.signal(1);
    let message = MsiMessage {
        address: 0xFEE0_1000,
        data: 0x42,
    };
    assert_eq!(router.route(1), Some(message));
    assert_eq!(router.raised(1), 1);
    assert_eq!(router.raised(0), 0);
    msix.signal(7);
    msix.signal(0xFFFF);
    assert_eq!(router.raised(0), 0, "vectors that do not exist are ignored");
}

#[test]
fn a_masked_interrupt_waits_in_the_pending_bits() {
    let (mut msix, router) = msix();
    msix.set_control(ENABLED);
    msix.signal(1);
    let mut pending = [0];
    msix.pba_read(0, &mut pending);
    assert_eq!(pending, [0b10]);
    assert_eq!(router.raised(1), 0);
    program(&mut msix, 1, 0xFEE0_0000, 1);
    assert_eq!(router.raised(1), 1);
    msix.pba_read(0, &mut pending);
    assert_eq!(pending, [0]);
}

#[test]
fn the_function_mask_holds_all_vectors_back() {
    let (mut msix, router) = msix();
    program(&mut msix, 0, 0xFEE0_0000, 1);
    msix.set_control(ENABLED | (1 << 14));
    msix.signal(0);
    assert_eq!(router.raised(0), 0);
    msix.set_control(ENABLED);
    assert_eq!(router.raised(0), 1);
}

#[test]
fn a_restored_table_is_routed_anew_and_delivers_what_was_pending() {
    let (mut source, _) = msix();
    program(&mut source, 0, 0xFEE0_0000, 7);
    source.set_control(ENABLED | (1 << 14));
    source.signal(0);
    let state = source.save();

    let (mut destination, router) = msix();
    destination.restore(&state).unwrap();
    assert_eq!(destination.save(), state);
    assert_eq!(router.raised(0), 0);
    destination.set_control(ENABLED);
    assert_eq!(router.raised(0), 1);
    assert_eq!(router.route(0).unwrap().data, 7);

    let mut entry = [0; 16];
    destination.table_read(0, &mut entry);
    assert_eq!(entry[8], 7);
    let mut smaller = Msix::new(router, 1).unwrap();
    assert!(smaller.restore(&state).is_err());
}
