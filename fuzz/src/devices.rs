//! Devices: what a guest's driver and its CPUs do to them, and states that a migration brings.

use arbitrary::{Result, Unstructured};
use bascule_devices::fuzzing::{
    BusAccess, CONSOLE_QUEUES, Corruption, DATA_AT, DriverAction, OVERWRITTEN, QUEUES, TABLE_AT,
    WINDOW_BYTES, block_state, bus, console_state, network_state,
};
use serde_json::{Value, json};

pub(crate) fn block_queues(data: &[u8]) {
    bascule_devices::fuzzing::block_queues(&list(data, |input| action(input, QUEUES)));
}

pub(crate) fn network_queues(data: &[u8]) {
    bascule_devices::fuzzing::network_queues(&list(data, |input| action(input, QUEUES)));
}

pub(crate) fn entropy_queues(data: &[u8]) {
    bascule_devices::fuzzing::entropy_queues(&list(data, |input| action(input, QUEUES)));
}

pub(crate) fn console_queues(data: &[u8]) {
    bascule_devices::fuzzing::console_queues(&list(data, |input| action(input, CONSOLE_QUEUES)));
}

pub(crate) fn pci_bus(data: &[u8]) {
    bus(&list(data, access));
}

pub(crate) fn state(data: &[u8]) {
    let Some((kind, data)) = data.split_first() else {
        return;
    };
    let corruptions = list(data, corruption);
    match kind % 8 {
        7 => console_state(&corruptions),
        kind if kind % 2 == 0 => block_state(&corruptions),
        _ => network_state(&corruptions),
    }
}

/// As many items as the bytes make, up to a limit.
fn list<T>(data: &[u8], item: impl Fn(&mut Unstructured<'_>) -> Result<T>) -> Vec<T> {
    let mut input = Unstructured::new(data);
    let mut items = vec![];
    while !input.is_empty() && items.len() < ITEMS_MAX {
        items.extend(item(&mut input));
    }
    items
}

/// Addresses and lengths are mostly those with which a request is valid, as in the tests of the devices.
fn action(input: &mut Unstructured<'_>, queues: u16) -> Result<DriverAction> {
    let queue = input.int_in_range(0..=queues - 1)?;
    Ok(match input.int_in_range(0..=15)? {
        0..=5 => DriverAction::Descriptor {
            queue,
            index: input.int_in_range(0..=299)?,
            fields: (
                address(input)?,
                length(input)?,
                flags(input)?,
                input.int_in_range(0..=69)?,
            ),
        },
        6..=9 => DriverAction::Offer {
            queue,
            head: input.int_in_range(0..=65)?,
        },
        10 => DriverAction::Overwrite {
            queue,
            at: input.int_in_range(OVERWRITTEN.start..=OVERWRITTEN.end - 2)? & !1,
            value: input.arbitrary()?,
        },
        11 => DriverAction::Header {
            kind: *input.choose(&[0, 1, 4, 8, 11, 13, 77])?,
            sector: input.arbitrary::<u16>()?.into(),
        },
        12 => DriverAction::Header {
            kind: input.arbitrary()?,
            sector: input.arbitrary()?,
        },
        13 | 14 => DriverAction::Notify { queue },
        _ => DriverAction::PauseAndResume,
    })
}

fn address(input: &mut Unstructured<'_>) -> Result<u64> {
    Ok(match input.int_in_range(0..=9)? {
        0..=3 => DATA_AT,
        4 | 5 => TABLE_AT,
        6 | 7 => DATA_AT + u64::from(input.arbitrary::<u16>()?),
        8 => 0xFF_FFF0,
        _ => input.arbitrary()?,
    })
}

fn length(input: &mut Unstructured<'_>) -> Result<u32> {
    let usual = [16, 16, 512, 512, 1, 0, 48, 1526, 4096];
    match input.int_in_range(0..=9_usize)? {
        9 => input.arbitrary(),
        index => Ok(usual[index]),
    }
}

fn flags(input: &mut Unstructured<'_>) -> Result<u16> {
    match input.int_in_range(0..=8)? {
        0..=5 => input.int_in_range(0..=3),
        6 | 7 => input.int_in_range(4..=7),
        _ => input.arbitrary(),
    }
}

fn access(input: &mut Unstructured<'_>) -> Result<BusAccess> {
    let kind = input.int_in_range(0..=11)?;
    let (data, length) = match input.arbitrary()? {
        None => (None, input.arbitrary()?),
        Some(length) => (Some(value(input, length)?), 0),
    };
    Ok(match kind {
        0..=3 => BusAccess::Ecam {
            // Five functions of bus 0, one of which does not exist.
            offset: (input.int_in_range(0..=4_u64)? << 15) | u64::from(input.arbitrary::<u8>()?),
            data,
            length,
        },
        4 => BusAccess::Ecam {
            offset: input.int_in_range(0..=(1 << 28) - 1)?,
            data,
            length,
        },
        5 => BusAccess::Port {
            port: input.int_in_range(0xCF8..=0xCFF)?,
            // A CPU has no wider port access than four bytes.
            data: data.map(|data| data.into_iter().take(4).collect()),
            length,
        },
        6..=9 => BusAccess::Mmio {
            at: input.int_in_range(0..=WINDOW_BYTES - 1)?,
            data,
            length,
        },
        10 => BusAccess::Ram {
            at: input.arbitrary()?,
            value: input.arbitrary()?,
        },
        _ => BusAccess::PauseAndResume,
    })
}

/// One, two, four or eight bytes, as a CPU writes.
fn value(input: &mut Unstructured<'_>, length: u8) -> Result<Vec<u8>> {
    let length = 1 << (length % 4);
    Ok(input.bytes(length)?.to_vec())
}

pub(crate) fn corruption(input: &mut Unstructured<'_>) -> Result<Corruption> {
    let place = input.arbitrary::<u16>()?.into();
    let value = match input.int_in_range(0..=6)? {
        0 | 1 => input.arbitrary::<u64>()?.into(),
        2 | 3 => input.arbitrary::<u16>()?.into(),
        4 => input.arbitrary::<bool>()?.into(),
        5 => Value::Null,
        _ => json!([{"queue": input.arbitrary::<u8>()?, "head": input.arbitrary::<u8>()?}]),
    };
    Ok(Corruption { place, value })
}

/// Actions of one input; a guess at what still runs fast.
const ITEMS_MAX: usize = 64;
