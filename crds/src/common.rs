//! What several kinds share.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A slot and generation on a SharedVolume: one incarnation of a node there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Owner {
    /// The index of the node's heartbeat slot on the volume.
    pub slot: i32,
    /// Rises whenever the node boots, or joins again after its lease lapsed. Text, because it may exceed what
    /// JSON numbers hold exactly.
    pub generation: String,
}

/// Why it is certain that a node will not write to the volume again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ProofKind {
    /// The node's heartbeat has not changed for the safe time, and a hardware watchdog resets it within that time.
    SafeTimeElapsed,
    /// Manual fencing confirmation by an administrator.
    Administrator,
    /// The node.kubernetes.io/out-of-service taint, on a volume that trusts it.
    OutOfServiceTaint,
    /// The node booted again.
    Rebooted,
    /// The owner gave the VM up before, with everything written.
    CleanRelease,
}

/// Puts `new` among `conditions`, and keeps the transition time of one that has not changed its
/// status, as the Kubernetes API conventions ask.
pub fn set_condition(conditions: &mut Vec<Condition>, mut new: Condition) {
    match conditions.iter_mut().find(|old| old.type_ == new.type_) {
        Some(old) => {
            if old.status == new.status {
                new.last_transition_time = Time(old.last_transition_time.0);
            }
            *old = new;
        }
        None => conditions.push(new),
    }
}

/// Whether the condition of type `type_` is there with status True.
#[must_use]
pub fn condition_is(conditions: &[Condition], type_: &str) -> bool {
    conditions
        .iter()
        .any(|c| c.type_ == type_ && c.status == "True")
}

#[cfg(test)]
mod tests {
    use k8s_openapi::jiff::Timestamp;

    use super::*;

    fn ready(status: &str, at: i64) -> Condition {
        Condition {
            type_: "Ready".to_owned(),
            status: status.to_owned(),
            reason: "Running".to_owned(),
            message: String::new(),
            observed_generation: Some(1),
            last_transition_time: Time(Timestamp::from_second(at).unwrap()),
        }
    }

    #[test]
    fn the_transition_time_changes_only_with_the_status() {
        let mut conditions = vec![];
        set_condition(&mut conditions, ready("True", 10));
        set_condition(&mut conditions, ready("True", 20));
        assert_eq!(conditions[0].last_transition_time.0.as_second(), 10);
        assert!(condition_is(&conditions, "Ready"));
        set_condition(&mut conditions, ready("False", 30));
        assert_eq!(conditions[0].last_transition_time.0.as_second(), 30);
        assert_eq!(conditions.len(), 1);
        assert!(!condition_is(&conditions, "Ready"));
    }
}
