//! Publishes an event on a Node when KVM becomes unavailable on it, or available again.

use std::collections::BTreeMap;
use std::time::Duration;

use bascule_crds::names::reason;
use kube::runtime::events::{Event, EventType};
use kube::{Resource, ResourceExt};

use crate::context::OperatorContext;

/// Runs until the leader's tasks are aborted.
pub(crate) async fn run(context: OperatorContext) {
    let mut before: BTreeMap<String, Option<String>> = BTreeMap::new();
    loop {
        let now: BTreeMap<String, Option<String>> = context
            .nodes
            .states()
            .into_iter()
            .filter_map(|(name, state)| Some((name, state.report?.kvm_error.clone())))
            .collect();
        for (node, event) in changes(&before, &now) {
            publish(&context, &node, &event).await;
        }
        before = now;
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

/// The events for nodes whose KVM state changed. A node that has KVM in its first report gets none.
fn changes(
    before: &BTreeMap<String, Option<String>>,
    now: &BTreeMap<String, Option<String>>,
) -> Vec<(String, Event)> {
    let event = |type_, reason: &str, note: String| Event {
        type_,
        reason: reason.to_owned(),
        note: Some(note),
        action: "Observe".to_owned(),
        secondary: None,
    };
    let changed = now
        .iter()
        .filter(|(node, error)| before.get(*node).unwrap_or(&None) != *error);
    changed
        .map(|(node, error)| {
            let event = match error {
                Some(why) => {
                    let note = format!("virtual machines cannot run on this node: {why}");
                    event(EventType::Warning, reason::KVM_UNAVAILABLE, note)
                }
                None => {
                    let note = "virtual machines can run on this node again".to_owned();
                    event(EventType::Normal, reason::KVM_AVAILABLE, note)
                }
            };
            (node.clone(), event)
        })
        .collect()
}

async fn publish(context: &OperatorContext, node: &str, event: &Event) {
    let object = context
        .stores
        .nodes
        .find(|object| object.name_any() == node);
    let Some(object) = object else { return };
    if event.reason == reason::KVM_UNAVAILABLE {
        tracing::warn!(node, note = event.note, "KVM is unavailable on a node");
    } else {
        tracing::info!(node, note = event.note, "KVM is available on a node again");
    }
    if let Err(error) = context
        .recorder
        .publish(event, &object.object_ref(&()))
        .await
    {
        tracing::debug!(%error, "cannot publish an event");
    }
}

/// Poll interval; not latency-sensitive.
const POLL_INTERVAL: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(error: Option<&str>) -> BTreeMap<String, Option<String>> {
        BTreeMap::from([("n1".to_owned(), error.map(str::to_owned))])
    }

    #[test]
    fn losing_kvm_and_regaining_it_are_one_event_each() {
        let (fine, broken) = (
            nodes(None),
            nodes(Some("/dev/kvm: No such file or directory")),
        );
        assert!(changes(&BTreeMap::new(), &fine).is_empty());
        for earlier in [&BTreeMap::new(), &fine] {
            let events = changes(earlier, &broken);
            assert_eq!(events[0].1.reason, reason::KVM_UNAVAILABLE);
            let note = events[0].1.note.as_deref().unwrap_or_default();
            assert!(note.contains("/dev/kvm"), "{note}");
        }
        assert!(changes(&broken, &broken).is_empty());
        assert_eq!(changes(&broken, &fine)[0].1.reason, reason::KVM_AVAILABLE);
    }
}
