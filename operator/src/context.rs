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

#[cfg(test)]
mod tests {
    use bascule_pki::Authority;
    use clap::Parser;
    use kube::runtime::events::Reporter;
    use kube::runtime::reflector;
    use tokio::sync::Notify;

    use super::*;
    use crate::mac_index::MacIndex;

    impl OperatorContext {
        /// With the API server that `client` reaches, and without objects and nodes.
        pub(crate) fn test(client: Client) -> Self {
            let changed = Arc::new(Notify::new());
            let (authority, _) = Authority::create("test").unwrap();
            let nodes = NodeClients::new(Arc::new(authority), Arc::clone(&changed));
            let reporter = Reporter {
                controller: "test".to_owned(),
                instance: None,
            };
            Self {
                client: client.clone(),
                args: Arc::new(Args::parse_from(["o", "--pod-name", "o-0", "--image", "i"])),
                cluster_id: ClusterId::from_bytes([1; 16]),
                stores: Stores {
                    vms: reflector::store().0,
                    macs: MacIndex::default(),
                    volumes: reflector::store().0,
                    migrations: reflector::store().0,
                    failovers: reflector::store().0,
                    pods: reflector::store().0,
                    nodes: reflector::store().0,
                },
                nodes: nodes.clone(),
                ownership: OwnershipCache::new(nodes, changed),
                recorder: Recorder::new(client, reporter),
                metrics: Arc::new(Metrics::new()),
            }
        }
    }
}
