//! What the volumes say: their rows, through whichever daemon answers.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bascule_ipc::volume::{PathState, Rows, VolumeStatus};
use bascule_node_api::command::{Command, Outcome};
use bascule_operator_core::Stream;
use tokio::sync::Notify;

use crate::node_clients::{NodeClients, NodeState};

/// The rows of every volume.
#[derive(Clone, Debug)]
pub(crate) struct OwnershipCache {
    nodes: NodeClients,
    volumes: Arc<Mutex<BTreeMap<String, Known>>>,
    changed: Arc<Notify>,
}

#[derive(Clone, Debug)]
struct Known {
    rows: Arc<Rows>,
    at: Instant,
}

impl OwnershipCache {
    pub(crate) fn new(nodes: NodeClients, changed: Arc<Notify>) -> Self {
        Self {
            nodes,
            volumes: Arc::default(),
            changed,
        }
    }

    /// The rows of a volume, unless they were not heard of lately.
    pub(crate) fn get(&self, volume: &str) -> Option<Arc<Rows>> {
        let volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let known = volumes.get(volume)?;
        (known.at.elapsed() < STALE_AFTER).then(|| Arc::clone(&known.rows))
    }

    /// Asks again: after a change, or because something in a report hints at one.
    pub(crate) async fn refresh(&self, volume: &str) {
        let states = self.nodes.states();
        let asked = Instant::now();
        for node in candidates(&states, volume) {
            let command = Command::Rows {
                volume: volume.to_owned(),
            };
            match self.nodes.execute(&node, &command).await {
                Ok(Outcome::Rows(rows)) => return self.put(volume, rows, asked),
                Ok(other) => tracing::debug!(volume, node, ?other, "no rows"),
                Err(error) => {
                    tracing::debug!(volume, node, error = format!("{error:#}"), "no rows")
                }
            }
        }
    }

    /// Asks for ever.
    pub(crate) async fn poll(self, names: impl Fn() -> Vec<String>) {
        loop {
            let names = names();
            self.volumes
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|name, _| names.contains(name));
            let refreshes = names.into_iter().map(|name| {
                let cache = self.clone();
                async move { cache.refresh(&name).await }
            });
            futures::future::join_all(refreshes).await;
            tokio::time::sleep(POLL).await;
        }
    }

    fn put(&self, volume: &str, rows: Rows, at: Instant) {
        let changed = {
            let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            let old = volumes.get(volume);
            // A deposed coordinator's answer must not hide its successor's; nor an older answer a
            // newer one.
            let outdated = old.is_some_and(|old| {
                (old.at.elapsed() < STALE_AFTER
                    && rows.coordinator_epoch < old.rows.coordinator_epoch)
                    || at < old.at
            });
            if outdated {
                return;
            }
            let changed = old.is_none_or(|old| *old.rows != rows);
            volumes.insert(
                volume.to_owned(),
                Known {
                    rows: Arc::new(rows),
                    at,
                },
            );
            changed
        };
        if changed {
            self.changed.notify_one();
        }
    }
}

/// The volume's status on a node that answers.
pub(crate) fn volume_status<'n>(state: &'n NodeState, volume: &str) -> Option<&'n VolumeStatus> {
    let report = state.report.as_ref()?;
    let attached = report.volumes.iter().find(|v| v.name == volume)?;
    attached.status.as_ref().ok()
}

/// Whether this node is the coordinator, as it sees it.
pub(crate) fn coordinates(status: &VolumeStatus) -> bool {
    status
        .owner
        .map(|owner| owner.slot)
        .is_some_and(|slot| status.coordinator == Some(slot))
}

/// The nodes to ask, the coordinator first.
fn candidates(states: &BTreeMap<String, NodeState>, volume: &str) -> Vec<String> {
    let mut nodes: Vec<(bool, &String)> = states
        .iter()
        .filter(|(_, state)| state.stream == Stream::Up)
        .filter_map(|(name, state)| Some((name, volume_status(state, volume)?)))
        .filter(|(_, status)| status.path == PathState::Direct && status.owner.is_some())
        .map(|(name, status)| (!coordinates(status), name))
        .collect();
    nodes.sort();
    nodes.into_iter().map(|(_, name)| name.clone()).collect()
}

/// What changes a row without a report that hints at it shows after this.
const POLL: Duration = Duration::from_secs(1);
/// Rows older than this are not known any more.
const STALE_AFTER: Duration = Duration::from_secs(10);
