//! A virtual machine's process: kernels and texts of users, saved states of peers, and what a guest's agent says.

use arbitrary::{Arbitrary, Unstructured};
use bascule_ipc::vm::{CloudInit, GuestInfo};
use bascule_vmm::{MachineState, fuzzing};
use serde_json::{Value, json};

use crate::devices::corruption;

/// Six bytes say how long the command line is, which comes next, and what initrd there is; the others are the kernel.
pub(crate) fn kernels(data: &[u8]) {
    let Some(([line, with_initrd, a, b, c, lacks], rest)) = data.split_first_chunk() else {
        return;
    };
    let (line, kernel) = rest.split_at(rest.len().min(usize::from(*line)));
    let length = u64::from(u32::from_le_bytes([*a, *b, *c, 0])) % INITRD_BYTES_MAX;
    let initrd = (length, length.saturating_sub(u64::from(*lacks)));
    let initrd = (with_initrd % 2 == 1).then_some(initrd);
    fuzzing::kernel(kernel, &String::from_utf8_lossy(line), initrd);
}

/// The first byte says whether the others are a state, or what is changed in one.
pub(crate) fn state(data: &[u8]) {
    let Some((is_text, data)) = data.split_first() else {
        return;
    };
    let text = if is_text % 4 == 0 {
        data.to_vec()
    } else {
        let mut state = whole_state();
        let mut input = Unstructured::new(data);
        for _ in 0..CHANGES_MAX {
            if input.is_empty() {
                break;
            }
            change(&mut state, &mut input);
        }
        state.to_string().into_bytes()
    };
    let Ok(state) = MachineState::decode(&text) else {
        return;
    };
    let again = MachineState::decode(&state.encode().unwrap()).unwrap();
    assert_eq!(again, state);
    fuzzing::restore_devices(&state);
}

/// A valid state with each part that one may have.
fn whole_state() -> Value {
    let mut state: Value = serde_json::from_str(fuzzing::MACHINE_STATE).unwrap();
    state["pm_timer_ns"] = json!(77);
    state["rtc"] =
        json!({"index": 9, "ahead_us": -3_600_000_000_i64, "bytes": "BwcH".repeat(42) + "Bwc="});
    state["console"] = json!({"position": 1_000_000, "recent": "bG9naW46IA=="});
    state["panics"] = json!({"count": 1, "present": "Panicked"});
    state
}

/// Replaces a value of the state by another one, or by bytes in base64.
fn change(state: &mut Value, input: &mut Unstructured<'_>) {
    let Ok(mut changed) = corruption(input) else {
        return;
    };
    if changed.value.is_null()
        && let Ok(length) = input.int_in_range(0..=255_usize)
    {
        changed.value = Value::String("Bwc/".repeat(length));
    }
    let mut found = vec![];
    leaves(state, &mut found);
    let place = changed.place % found.len();
    *found.swap_remove(place) = changed.value;
}

fn leaves<'a>(state: &'a mut Value, found: &mut Vec<&'a mut Value>) {
    match state {
        Value::Object(fields) => fields.values_mut().for_each(|field| leaves(field, found)),
        Value::Array(items) => items.iter_mut().for_each(|item| leaves(item, found)),
        leaf => found.push(leaf),
    }
}

/// The first byte says where the answers to a second poll begin, and whether synchronizations are answered at all.
pub(crate) fn agent(data: &[u8]) {
    let Some((split, data)) = data.split_first() else {
        return;
    };
    if data.len() > SAID_BYTES_MAX {
        return;
    }
    let (first, second) = data.split_at(data.len() * usize::from(*split) / 256);
    let said = match split % 16 {
        0 => data.to_vec(),
        _ => [SYNCHRONIZED[0], first, b"\n", SYNCHRONIZED[1], second].concat(),
    };
    let macs = [[0x52, 0x54, 0, 0xAA, 0, 1], [2; 6]];
    for info in fuzzing::agent_answers(&said, &macs, 2)
        .into_iter()
        .flatten()
    {
        is_bounded(&info);
        let found: Vec<_> = info.interfaces.iter().map(|own| own.mac).collect();
        // Empty when the agent refuses to name them.
        assert!(found.is_empty() || found == macs, "{found:?}");
    }
}

/// Within what a status may be: small, and without characters that a terminal obeys.
fn is_bounded(info: &GuestInfo) {
    assert_eq!(&info.clone().bounded(), info);
    let (version, name, os) = (&info.agent_version, &info.host_name, &info.os);
    for text in [
        version,
        name,
        &os.id,
        &os.version,
        &os.pretty_name,
        &os.kernel,
    ] {
        assert!(!text.chars().any(char::is_control), "{text:?}");
    }
    let bytes = serde_json::to_string(info).unwrap().len();
    assert!(bytes <= INFO_BYTES_MAX, "{bytes} bytes");
}

#[derive(Arbitrary, Debug)]
struct Texts {
    name: String,
    user_data: String,
    /// How often the user data is repeated.
    times: u8,
    network_config: Option<String>,
    ssh_authorized_keys: Vec<String>,
}

pub(crate) fn cloud_init(data: &[u8]) {
    let Ok(texts) = Texts::arbitrary(&mut Unstructured::new(data)) else {
        return;
    };
    let most = USER_DATA_BYTES_MAX / texts.user_data.len().max(1);
    let times = 1 + usize::from(texts.times).pow(2).min(most);
    let contents = CloudInit {
        user_data: texts.user_data.repeat(times),
        network_config: texts.network_config,
        ssh_authorized_keys: texts.ssh_authorized_keys,
    };
    fuzzing::cloud_init_disk(&texts.name, &contents);
}

/// A little more than fits beside the least RAM's kernel.
const INITRD_BYTES_MAX: u64 = 9 << 20;
const CHANGES_MAX: usize = 8;
/// The answers to the client's first two synchronizations.
const SYNCHRONIZED: [&[u8]; 2] = [b"\xFF{\"return\": 1}\n", b"\xFF{\"return\": 2}\n"];
/// What a socket holds (net.core.wmem_default, 208 KiB), so that one thread can be both ends.
const SAID_BYTES_MAX: usize = 64 << 10;
/// Six texts of 253 characters with up to 12 bytes each in JSON, and two interfaces of 16 addresses.
const INFO_BYTES_MAX: usize = 24 << 10;
/// More than fits.
const USER_DATA_BYTES_MAX: usize = 3 << 20;
