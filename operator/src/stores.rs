//! Local copies of API objects, kept current by watches (reflectors).

use std::fmt::Debug;
use std::hash::Hash;
use std::sync::Arc;

use anyhow::{Context, Result};
use bascule_crds::names::{LABEL_ROLE, ROLE_RESERVATION};
use bascule_crds::{Failover, SharedVolume, VirtualMachine, VirtualMachineMigration};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::runtime::reflector::{self, Store};
use kube::runtime::{WatchStreamExt, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::sync::Notify;
use tokio::task::JoinSet;

use crate::mac_index::MacIndex;

/// One store for each kind that plans depend on.
#[derive(Clone, Debug)]
pub(crate) struct Stores {
    pub(crate) vms: Store<VirtualMachine>,
    /// The MAC addresses of `vms`.
    pub(crate) macs: MacIndex,
    pub(crate) volumes: Store<SharedVolume>,
    pub(crate) migrations: Store<VirtualMachineMigration>,
    pub(crate) failovers: Store<Failover>,
    pub(crate) pods: Store<Pod>,
    pub(crate) nodes: Store<Node>,
}

impl Stores {
    /// Spawns the watches into `tasks`, all but that of `nodes`. `changed` is notified at every watch event.
    pub(crate) fn start(
        client: &Client,
        nodes: Store<Node>,
        changed: &Arc<Notify>,
        tasks: &mut JoinSet<()>,
    ) -> Self {
        let reservations =
            watcher::Config::default().labels(&format!("{LABEL_ROLE}={ROLE_RESERVATION}"));
        let all = watcher::Config::default;
        let macs = MacIndex::default();
        let index = macs.clone();
        let vms = Api::all(client.clone());
        Self {
            vms: watch_with(vms, all(), changed, tasks, move |event| index.apply(event)),
            macs,
            volumes: watch(Api::all(client.clone()), all(), changed, tasks),
            migrations: watch(Api::all(client.clone()), all(), changed, tasks),
            failovers: watch(Api::all(client.clone()), all(), changed, tasks),
            pods: watch(Api::all(client.clone()), reservations, changed, tasks),
            nodes,
        }
    }

    /// The Node objects, which every replica follows.
    pub(crate) fn watch_nodes(
        client: &Client,
        changed: &Arc<Notify>,
        tasks: &mut JoinSet<()>,
    ) -> Store<Node> {
        let all = watcher::Config::default();
        watch(Api::all(client.clone()), all, changed, tasks)
    }

    /// Waits for the initial list of every kind. Before that, a missing object does not mean that it
    /// does not exist.
    pub(crate) async fn ready(&self) -> Result<()> {
        self.vms
            .wait_until_ready()
            .await
            .context("list VirtualMachines")?;
        self.volumes
            .wait_until_ready()
            .await
            .context("list SharedVolumes")?;
        self.migrations
            .wait_until_ready()
            .await
            .context("list VirtualMachineMigrations")?;
        self.failovers
            .wait_until_ready()
            .await
            .context("list Failovers")?;
        self.pods
            .wait_until_ready()
            .await
            .context("list reservation pods")?;
        self.nodes.wait_until_ready().await.context("list Nodes")
    }
}

fn watch<K>(
    api: Api<K>,
    config: watcher::Config,
    changed: &Arc<Notify>,
    tasks: &mut JoinSet<()>,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone + Default,
{
    watch_with(api, config, changed, tasks, |_| ())
}

/// `follow` sees each event before `changed` is notified.
fn watch_with<K>(
    api: Api<K>,
    config: watcher::Config,
    changed: &Arc<Notify>,
    tasks: &mut JoinSet<()>,
    follow: impl Fn(&watcher::Event<K>) + Send + 'static,
) -> Store<K>
where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + Sync + 'static,
    K::DynamicType: Eq + Hash + Clone + Default,
{
    let (reader, writer) = reflector::store();
    let changed = Arc::clone(changed);
    let stream = watcher(api, config).default_backoff().reflect(writer);
    tasks.spawn(async move {
        let mut stream = std::pin::pin!(stream);
        while let Some(event) = stream.next().await {
            match event {
                Ok(event) => {
                    follow(&event);
                    changed.notify_one();
                }
                // The watcher restarts by itself, with exponential backoff.
                Err(error) => {
                    tracing::warn!(kind = %K::kind(&()), %error, "watch interrupted");
                }
            }
        }
    });
    reader
}
