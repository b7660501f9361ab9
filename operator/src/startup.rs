//! Start-up, and the tasks of a replica.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bascule_crds::names::FIELD_MANAGER;
use bascule_pki::Authority;
use bascule_types::ClusterId;
use k8s_openapi::api::core::v1::{Namespace, Node};
use kube::client::ClientBuilder;
use kube::runtime::events::{Recorder, Reporter};
use kube::runtime::reflector::Store;
use kube::{Api, Client, Config, ResourceExt};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tower::util::MapResponseLayer;

use crate::cli::Args;
use crate::context::OperatorContext;
use crate::controllers::{node_events, record_gc, shared_volumes, virtual_machines};
use crate::enrollment::EnrollmentService;
use crate::leader_election::Election;
use crate::metrics::Metrics;
use crate::node_clients::NodeClients;
use crate::ownership_cache::OwnershipCache;
use crate::stores::Stores;
use crate::{cluster_ca, http, subresources};

/// Runs until SIGTERM or SIGINT, or until a task fails.
pub(crate) fn main(args: &Args) -> Result<()> {
    crate::logging::start(args)?;
    if rustls::crypto::ring::default_provider()
        .install_default()
        .is_err()
    {
        tracing::debug!("a rustls crypto provider is already installed");
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("start the runtime")?;
    runtime.block_on(run(Arc::new(args.clone())))
}

async fn run(args: Arc<Args>) -> Result<()> {
    let metrics = Arc::new(Metrics::new());
    let (ready_tx, ready_rx) = watch::channel(false);
    let mut servers: JoinSet<Result<()>> = JoinSet::new();
    servers.spawn(http::serve(
        args.http_listen,
        Arc::clone(&metrics),
        ready_rx,
    ));
    let mut terminate = signal(SignalKind::terminate()).context("handle SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("handle SIGINT")?;
    let client = client().await.context("configure the Kubernetes client")?;
    let election = Election::new(
        client.clone(),
        &args.namespace,
        &args.pod_name,
        args.lease_duration(),
    );
    let outcome = tokio::select! {
        outcome = serve(args, client, election.clone(), metrics, ready_tx) => outcome,
        Some(ended) = servers.join_next() => ended.context("HTTP")?,
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    };
    // What only the leader does has ended with `serve`.
    election.release().await;
    outcome
}

/// A client that takes the API server's time from each response.
async fn client() -> Result<Client> {
    let config = Config::infer().await?;
    let learning = MapResponseLayer::new(crate::clock::learn);
    Ok(ClientBuilder::try_from(config)?
        .with_layer(&learning)
        .build())
}

async fn serve(
    args: Arc<Args>,
    client: Client,
    election: Election,
    metrics: Arc<Metrics>,
    ready_tx: watch::Sender<bool>,
) -> Result<()> {
    check_version(&client).await?;
    let cluster_id = cluster_id(&client).await?;
    let authority = Arc::new(cluster_ca::load_or_create(&client, &args.namespace).await?);
    let enrollment =
        EnrollmentService::new(client.clone(), Arc::clone(&authority), cluster_id, &args);
    let mut servers: JoinSet<Result<()>> = JoinSet::new();
    servers.spawn(enrollment.serve(args.join_listen));
    let nodes = Nodes::follow(&client, &authority, &mut servers);
    if args.subresources {
        let (args, clients) = (Arc::clone(&args), nodes.clients.clone());
        servers.spawn(subresources::serve(
            args,
            client.clone(),
            authority,
            clients,
        ));
    }
    let (leading_tx, mut leading_rx) = watch::channel(false);
    servers.spawn(async move {
        election.run(leading_tx).await;
        Ok(())
    });
    // A replica that is not the leader is ready too: it serves Join.
    ready_tx.send_replace(true);
    tracing::info!(cluster = %cluster_id, "serving");
    loop {
        tokio::select! {
            changed = leading_rx.wait_for(|leading| *leading) => {
                changed.context("leader election ended")?;
            }
            Some(ended) = servers.join_next() => {
                ended.context("join a server task")??;
                bail!("a server task ended");
            }
        }
        metrics.set_leader(true);
        tokio::select! {
            outcome = lead(&args, &client, &nodes, cluster_id, &metrics) => outcome?,
            lost = leading_rx.wait_for(|leading| !*leading) => {
                lost.context("leader election ended")?;
            }
            Some(ended) = servers.join_next() => {
                ended.context("join a server task")??;
                bail!("a server task ended");
            }
        }
        metrics.set_leader(false);
    }
}

/// What only the leader does. The caller drops this future when the Lease is lost, which ends all
/// tasks in it.
async fn lead(
    args: &Arc<Args>,
    client: &Client,
    nodes: &Nodes,
    cluster_id: ClusterId,
    metrics: &Arc<Metrics>,
) -> Result<()> {
    let Nodes {
        store,
        clients,
        changed,
    } = nodes.clone();
    let mut tasks: JoinSet<()> = JoinSet::new();
    let stores = Stores::start(client, store, &changed, &mut tasks);
    stores.ready().await?;
    let ownership = OwnershipCache::new(clients.clone(), Arc::clone(&changed));
    let reporter = Reporter {
        controller: FIELD_MANAGER.to_owned(),
        instance: Some(args.pod_name.clone()),
    };
    let context = OperatorContext {
        client: client.clone(),
        args: Arc::clone(args),
        cluster_id,
        stores: stores.clone(),
        nodes: clients,
        ownership: ownership.clone(),
        recorder: Recorder::new(client.clone(), reporter),
        metrics: Arc::clone(metrics),
    };
    let volumes = stores.volumes;
    tasks.spawn(ownership.poll(move || {
        volumes
            .state()
            .iter()
            .map(|volume| volume.name_any())
            .collect()
    }));
    tasks.spawn(shared_volumes::run(context.clone()));
    tasks.spawn(record_gc::run(context.clone()));
    tasks.spawn(node_events::run(context.clone()));
    tasks.spawn(virtual_machines::run(context, changed));
    match tasks.join_next().await {
        Some(Err(error)) => Err(error).context("a task of the leader failed"),
        _ => bail!("a task of the leader ended"),
    }
}

/// The nodes, whose daemons every replica follows: a new leader knows at once which of them respond, and need not
/// wait for a connection to a lost one to fail.
#[derive(Clone)]
struct Nodes {
    store: Store<Node>,
    clients: NodeClients,
    /// Notified when a Node object or a node's report has changed.
    changed: Arc<Notify>,
}

impl Nodes {
    fn follow(
        client: &Client,
        authority: &Arc<Authority>,
        servers: &mut JoinSet<Result<()>>,
    ) -> Self {
        let changed = Arc::new(Notify::new());
        let mut tasks: JoinSet<()> = JoinSet::new();
        let store = Stores::watch_nodes(client, &changed, &mut tasks);
        let clients = NodeClients::new(Arc::clone(authority), Arc::clone(&changed));
        tasks.spawn(follow_nodes(clients.clone(), store.clone()));
        servers.spawn(async move {
            match tasks.join_next().await {
                Some(Err(error)) => Err(error).context("a task that follows the nodes failed"),
                _ => bail!("a task that follows the nodes ended"),
            }
        });
        Self {
            store,
            clients,
            changed,
        }
    }
}

/// Keeps one client for each Node object that has an internal address.
async fn follow_nodes(nodes: NodeClients, store: Store<Node>) {
    loop {
        let known: BTreeMap<String, (IpAddr, String)> = store
            .state()
            .iter()
            .filter_map(|node| Some((node.name_any(), (address(node)?, node.uid()?))))
            .collect();
        nodes.follow(&known);
        tokio::time::sleep(NODES_CHECK).await;
    }
}

fn address(node: &Node) -> Option<IpAddr> {
    let addresses = node.status.as_ref()?.addresses.as_ref()?;
    let internal = addresses
        .iter()
        .find(|address| address.type_ == "InternalIP")?;
    internal.address.parse().ok()
}

/// Refuses Kubernetes versions whose TokenReview does not say which node a token is bound to.
async fn check_version(client: &Client) -> Result<()> {
    let version = client
        .apiserver_version()
        .await
        .context("read the version of the API server")?;
    let number = |text: &str| -> u32 {
        let digits: String = text.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().unwrap_or(0)
    };
    let (major, minor) = (number(&version.major), number(&version.minor));
    if (major, minor) < KUBERNETES_MIN {
        bail!(
            "Bascule needs Kubernetes {}.{} or newer, because older ones do not say which node a \
             token belongs to; this is {}",
            KUBERNETES_MIN.0,
            KUBERNETES_MIN.1,
            version.git_version
        );
    }
    Ok(())
}

/// The UID of namespace kube-system identifies the cluster; each volume is bound to one cluster.
async fn cluster_id(client: &Client) -> Result<ClusterId> {
    let namespaces: Api<Namespace> = Api::all(client.clone());
    let namespace = namespaces
        .get("kube-system")
        .await
        .context("read namespace kube-system")?;
    namespace
        .uid()
        .unwrap_or_default()
        .parse()
        .context("parse the UID of namespace kube-system")
}

/// The first version with node-bound tokens enabled (KEP-4193).
const KUBERNETES_MIN: (u32, u32) = (1, 33);
/// Interval at which the Node store is compared with the clients.
const NODES_CHECK: Duration = Duration::from_secs(1);
