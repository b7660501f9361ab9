//! Nodes that cannot run guests: an event on the Node, where people look when a node misbehaves.

use std::collections::BTreeMap;
use std::time::Duration;

use bascule_crds::names::reason;
use kube::runtime::events::{Event, EventType};
use kube::{Resource, ResourceExt};

use crate::context::OperatorContext;

/// Goes round for ever.
pub(crate) async fn run(context: OperatorContext) {
    let mut told: BTreeMap<String, Option<String>> = BTreeMap::new();
    loop {
        let now: BTreeMap<String, Option<String>> = context
            .nodes
            .states()
            .into_iter()
            .filter_map(|(name, state)| Some((name, state.report?.kvm_error.clone())))
            .collect();
        for (node, event) in news(&told, &now) {
            publish(&context, &node, &event).await;
        }
        told = now;
        tokio::time::sleep(ROUND).await;
    }
}

/// What changed. A node that was fine from the beginning is no news.
fn news(
    told: &BTreeMap<String, Option<String>>,
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
        .filter(|(node, error)| told.get(*node).unwrap_or(&None) != *error);
    changed
        .map(|(node, error)| {
            let event = match error {
                Some(why) => {
                    let note = format!("no virtual machine can run here: {why}");
                    event(EventType::Warning, reason::KVM_UNAVAILABLE, note)
                }
                None => {
                    let note = "virtual machines can run here again".to_owned();
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
        tracing::warn!(node, note = event.note, "a node cannot run guests");
    } else {
        tracing::info!(node, note = event.note, "a node can run guests again");
    }
    if let Err(error) = context
        .recorder
        .publish(event, &object.object_ref(&()))
        .await
    {
        tracing::debug!(%error, "event lost");
    }
}

/// Somebody has to notice, not to hurry.
const ROUND: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(error: Option<&str>) -> BTreeMap<String, Option<String>> {
        BTreeMap::from([("n1".to_owned(), error.map(str::to_owned))])
    }

    #[test]
    fn a_node_without_kvm_is_news_once_and_so_is_its_return() {
        let (fine, broken) = (
            nodes(None),
            nodes(Some("/dev/kvm: No such file or directory")),
        );
        assert!(news(&BTreeMap::new(), &fine).is_empty());
        for before in [&BTreeMap::new(), &fine] {
            let said = news(before, &broken);
            assert_eq!(said[0].1.reason, reason::KVM_UNAVAILABLE);
            let note = said[0].1.note.as_deref().unwrap_or_default();
            assert!(note.contains("/dev/kvm"), "{note}");
        }
        assert!(news(&broken, &broken).is_empty());
        assert_eq!(news(&broken, &fine)[0].1.reason, reason::KVM_AVAILABLE);
    }
}
