//! What the leader's controllers share. It lives as long as this replica leads.

use std::sync::Arc;

use bascule_types::ClusterId;
use kube::Client;
use kube::runtime::events::Recorder;

use crate::cli::Args;
use crate::metrics::Metrics;
use crate::node_clients::NodeClients;
use crate::ownership_cache::OwnershipCache;
use crate::stores::Stores;

/// Handles only: a clone refers to the same caches, clients and counters.
#[derive(Clone)]
pub(crate) struct OperatorContext {
    pub(crate) client: Client,
    pub(crate) args: Arc<Args>,
    /// The UID of namespace kube-system; every volume is bound to one cluster.
    pub(crate) cluster_id: ClusterId,
    pub(crate) stores: Stores,
    pub(crate) nodes: NodeClients,
    pub(crate) ownership: OwnershipCache,
    pub(crate) recorder: Recorder,
    pub(crate) metrics: Arc<Metrics>,
}
