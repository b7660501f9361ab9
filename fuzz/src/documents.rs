//! Documents in JSON and YAML: what users write, and what operator and nodes send each other in gRPC messages.

use std::fmt::Debug;

use bascule_crds::{Failover, SharedVolume, VirtualMachine, VirtualMachineMigration};
use bascule_node_api::command::{Command, Outcome, VmSpec};
use bascule_node_api::report::NodeReport;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::ipc::reads_back;

/// The first byte selects the kind of document, the others are its text.
pub(crate) fn documents(data: &[u8]) {
    let Some((kind, text)) = data.split_first() else {
        return;
    };
    let Ok(text) = std::str::from_utf8(text) else {
        return;
    };
    match kind % 8 {
        0 => virtual_machine(serde_saphyr::from_str(text).ok()),
        1 => virtual_machine(serde_json::from_str(text).ok()),
        2 => is_stable::<SharedVolume>(text),
        3 => is_stable::<VirtualMachineMigration>(text),
        4 => is_stable::<Failover>(text),
        5 => message::<Command>(text),
        6 => message::<NodeReport>(text),
        _ => {
            message::<Outcome>(text);
            message::<VmSpec>(text);
        }
    }
}

/// A document that passes the check passes it again when it was written and read.
fn virtual_machine(document: Option<VirtualMachine>) {
    let Some(document) = document else {
        return;
    };
    let verdict = document.spec.check(&document.metadata);
    let text = serde_json::to_string(&document).unwrap();
    let again: VirtualMachine = serde_json::from_str(&text).unwrap();
    assert_eq!(serde_json::to_string(&again).unwrap(), text);
    let verdict_again = again.spec.check(&again.metadata);
    assert_eq!(format!("{verdict_again:?}"), format!("{verdict:?}"));
}

fn is_stable<T: Serialize + DeserializeOwned>(text: &str) {
    if let Ok(document) = serde_json::from_str::<T>(text) {
        let text = serde_json::to_string(&document).unwrap();
        let again: T = serde_json::from_str(&text).unwrap();
        assert_eq!(serde_json::to_string(&again).unwrap(), text);
    }
}

fn message<T: Serialize + DeserializeOwned + PartialEq + Debug>(text: &str) {
    if let Ok(message) = serde_json::from_str::<T>(text) {
        reads_back(&message);
    }
}
