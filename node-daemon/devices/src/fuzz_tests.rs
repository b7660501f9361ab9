//! The malicious drivers and corrupted states of `fuzzing.rs`, at random.

use bascule_types::WriterState;
use proptest::prelude::*;
use vm_memory::GuestAddress;

use crate::device::Device;
use crate::fuzzing::{
    Corruption, DATA_AT, DriverAction, GOLDEN_MAC, OVERWRITTEN, QUEUES, TABLE_AT, block_device,
    block_queues, block_state, console_device, console_queues, console_state, entropy_queues,
    machine_with_requests, network_device, network_queues, network_state,
};
use crate::pci::PciFunction;
use crate::testing::BAR_AT;

fn actions() -> impl Strategy<Value = Vec<DriverAction>> {
    let queue = || 0..QUEUES;
    let address = prop_oneof![
        4 => Just(DATA_AT),
        2 => Just(TABLE_AT),
        2 => DATA_AT..DATA_AT + 0x1000,
        1 => any::<u64>(),
        1 => Just(0xFF_FFF0_u64),
    ];
    let length = prop_oneof![
        3 => Just(16_u32),
        2 => Just(512),
        1 => Just(1),
        1 => Just(0),
        1 => Just(48),
        1 => Just(1526),
        1 => any::<u32>(),
    ];
    let fields = (
        address,
        length,
        prop_oneof![6 => 0_u16..4, 2 => 4_u16..8, 1 => any::<u16>()],
        0_u16..70,
    );
    prop::collection::vec(
        prop_oneof![
            6 => (queue(), 0_u16..300, fields)
                .prop_map(|(queue, index, fields)| DriverAction::Descriptor { queue, index, fields }),
            4 => (queue(), 0_u16..66).prop_map(|(queue, head)| DriverAction::Offer { queue, head }),
            1 => (queue(), OVERWRITTEN, any::<u16>())
                .prop_map(|(queue, at, value)| DriverAction::Overwrite { queue, at: at & !1, value }),
            2 => (prop::sample::select(vec![0_u32, 1, 4, 8, 11, 77]), prop_oneof![0_u64..300, any::<u64>()])
                .prop_map(|(kind, sector)| DriverAction::Header { kind, sector }),
            3 => queue().prop_map(|queue| DriverAction::Notify { queue }),
            1 => Just(DriverAction::PauseAndResume),
        ],
        1..60,
    )
}

fn corruptions() -> impl Strategy<Value = Vec<Corruption>> {
    let value = prop_oneof![
        4 => any::<u64>().prop_map(Into::into),
        4 => (0_u64..70_000).prop_map(Into::into),
        1 => any::<bool>().prop_map(Into::into),
        1 => Just(serde_json::Value::Null),
        1 => Just(serde_json::json!([])),
        1 => Just(serde_json::json!([{"queue": 0, "head": 7}, {"queue": 1, "head": 0}, {"queue": 9, "head": 9}])),
    ];
    let one = (any::<usize>(), value).prop_map(|(place, value)| Corruption { place, value });
    prop::collection::vec(one, 1..5)
}

#[test]
fn the_states_are_loaded_when_they_are_not_corrupted() {
    let machine = machine_with_requests();
    let (net, _network) = network_device(&machine, GOLDEN_MAC);
    let (console, _host) = console_device(&machine);
    for (mut function, golden) in [
        (
            block_device(&machine, 1 << 20, 2),
            include_str!("../golden/virtio-blk-v1.json"),
        ),
        (net, include_str!("../golden/virtio-net-v1.json")),
        (console, include_str!("../golden/virtio-console-v1.json")),
    ] {
        function.place_bar(0, GuestAddress(BAR_AT));
        assert_eq!(function.pause(), WriterState::Clean);
        function
            .restore(&serde_json::from_str(golden).unwrap())
            .unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn i7_no_state_panics_a_block_device(corruptions in corruptions()) {
        block_state(&corruptions);
    }

    #[test]
    fn i7_no_state_panics_a_network_device(corruptions in corruptions()) {
        network_state(&corruptions);
    }

    #[test]
    fn i7_no_queue_content_stops_a_block_device_for_good(actions in actions()) {
        block_queues(&actions);
    }

    #[test]
    fn i7_no_queue_content_stops_a_network_device_for_good(actions in actions()) {
        network_queues(&actions);
    }

    #[test]
    fn i7_no_queue_content_stops_an_entropy_device_for_good(actions in actions()) {
        entropy_queues(&actions);
    }

    #[test]
    fn i7_no_queue_content_stops_a_console_device_for_good(actions in actions()) {
        console_queues(&actions);
    }

    #[test]
    fn i7_no_state_panics_a_console_device(corruptions in corruptions()) {
        console_state(&corruptions);
    }
}
