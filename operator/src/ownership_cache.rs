//! The ownership records, disks and fences of every volume, polled through a node that has the volume
//! attached. In each response the volume, not the API, is authoritative about owners and epochs.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bascule_ipc::volume::{PathState, Rows, VolumeStatus};
use bascule_node_api::command::{Command, Outcome};
use bascule_operator_core::Stream;
use tokio::sync::Notify;
use tokio::time::timeout;

use crate::node_clients::{NodeClients, NodeState};

/// The latest response for every volume, by the volume's name. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct OwnershipCache {
    nodes: NodeClients,
    volumes: Arc<Mutex<BTreeMap<String, Entry>>>,
    changed: Arc<Notify>,
}

#[derive(Clone, Debug)]
struct Entry {
    rows: Arc<Rows>,
    /// When the request was sent: the response is at least as recent.
    requested_at: Instant,
}

impl OwnershipCache {
    pub(crate) fn new(nodes: NodeClients, changed: Arc<Notify>) -> Self {
        Self {
            nodes,
            volumes: Arc::default(),
            changed,
        }
    }

    /// The latest response, unless it is older than [`STALE_AFTER`].
    pub(crate) fn get(&self, volume: &str) -> Option<Arc<Rows>> {
        let volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
        let entry = volumes.get(volume)?;
        (entry.requested_at.elapsed() < STALE_AFTER).then(|| Arc::clone(&entry.rows))
    }

    /// Reads one volume now, e.g. after a change. Tries the coordinator first, then the other nodes.
    pub(crate) async fn refresh(&self, volume: &str) {
        let states = self.nodes.states();
        let requested_at = Instant::now();
        for node in candidates(&states, volume) {
            let command = Command::Rows {
                volume: volume.to_owned(),
            };
            match self.nodes.execute(&node, &command).await {
                Ok(Outcome::Rows(rows)) => return self.put(volume, rows, requested_at),
                Ok(other) => {
                    tracing::debug!(volume, node, ?other, "cannot read the ownership records")
                }
                Err(error) => {
                    tracing::debug!(
                        volume,
                        node,
                        error = format!("{error:#}"),
                        "cannot read the ownership records"
                    )
                }
            }
        }
    }

    /// Reads all volumes periodically, and when a node's report shows that an owner may have changed; drops those
    /// that no longer exist. Never returns.
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
            tokio::time::sleep(PAUSE_MIN).await;
            // A drain waits for the operator to learn that the guest has left.
            drop(timeout(POLL - PAUSE_MIN, self.nodes.ownership_moves()).await);
        }
    }

    fn put(&self, volume: &str, rows: Rows, requested_at: Instant) {
        let changed = {
            let mut volumes = self.volumes.lock().unwrap_or_else(PoisonError::into_inner);
            let old = volumes.get(volume);
            // A response from a former coordinator must not replace its successor's, nor an older
            // response a newer one.
            let outdated = old.is_some_and(|old| {
                (old.requested_at.elapsed() < STALE_AFTER
                    && rows.coordinator_epoch < old.rows.coordinator_epoch)
                    || requested_at < old.requested_at
            });
            if outdated {
                return;
            }
            let changed = old.is_none_or(|old| *old.rows != rows);
            volumes.insert(
                volume.to_owned(),
                Entry {
                    rows: Arc::new(rows),
                    requested_at,
                },
            );
            changed
        };
        if changed {
            self.changed.notify_one();
        }
    }
}

/// A volume's status in the latest report of a node.
pub(crate) fn volume_status<'n>(state: &'n NodeState, volume: &str) -> Option<&'n VolumeStatus> {
    let report = state.report.as_ref()?;
    let attached = report.volumes.iter().find(|v| v.name == volume)?;
    attached.status.as_ref().ok()
}

/// Whether the node that reported this status considers itself the coordinator.
pub(crate) fn coordinates(status: &VolumeStatus) -> bool {
    status
        .owner
        .map(|owner| owner.slot)
        .is_some_and(|slot| status.coordinator == Some(slot))
}

/// Nodes with a direct path to the volume, the coordinator first.
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

/// Least interval: bounds the requests while many VMs move.
const PAUSE_MIN: Duration = Duration::from_millis(100);
/// Poll interval: the delay after which a transfer that no report shows is seen.
const POLL: Duration = Duration::from_secs(1);
/// Responses older than this count as unknown.
const STALE_AFTER: Duration = Duration::from_secs(10);
