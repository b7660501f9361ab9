//! Command-line arguments.

use std::net::{Ipv6Addr, SocketAddr};
use std::time::Duration;

use bascule_node_api::{HTTP_PORT, JOIN_PORT, SUBRESOURCES_PORT};

/// Bascule's operator: reconciles VirtualMachines and SharedVolumes.
///
/// The chart runs two replicas; the one that holds the Lease bascule-operator reconciles. All of its
/// state is derived from the API, the node daemons and the volumes: a replica may be killed at any time.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "bascule-operator", version)]
pub(crate) struct Args {
    /// Namespace of the operator
    #[arg(long, env = "BASCULE_NAMESPACE", default_value = "bascule-system")]
    pub(crate) namespace: String,
    /// Name of this replica's pod, used as its identity in leader election
    #[arg(long, env = "BASCULE_POD_NAME")]
    pub(crate) pod_name: String,
    /// Listen address of the Join service, at which nodes get their certificates; `[::]` is every
    /// address of both families
    #[arg(long, default_value_t = any_address(JOIN_PORT))]
    pub(crate) join_listen: SocketAddr,
    /// Listen address of /metrics, /healthz and /readyz
    #[arg(long, default_value_t = any_address(HTTP_PORT))]
    pub(crate) http_listen: SocketAddr,
    /// Listen address of the subresources of VirtualMachines (console, log), for the API server
    #[arg(long, default_value_t = any_address(SUBRESOURCES_PORT))]
    pub(crate) subresources_listen: SocketAddr,
    /// Serve the subresources of VirtualMachines, for which there is an APIService
    #[arg(long, env = "BASCULE_SUBRESOURCES", action = clap::ArgAction::Set, default_value_t = true)]
    pub(crate) subresources: bool,
    /// Service account of bascule-node; only its tokens are accepted by Join
    #[arg(
        long,
        env = "BASCULE_NODE_SERVICE_ACCOUNT",
        default_value = "bascule-node"
    )]
    pub(crate) node_service_account: String,
    /// Container image of reservation pods
    #[arg(long, env = "BASCULE_IMAGE")]
    pub(crate) image: String,
    /// Image pull policy of reservation pods
    #[arg(
        long,
        env = "BASCULE_IMAGE_PULL_POLICY",
        default_value = "IfNotPresent"
    )]
    pub(crate) image_pull_policy: String,
    /// CPU overcommit in thousandths: a reservation pod requests cores / (this / 1000) CPUs, so that
    /// 4000 means four vCPUs for each CPU of the node
    #[arg(long, env = "BASCULE_ALLOCATION_RATIO_MILLI", default_value_t = 4000)]
    pub(crate) allocation_ratio_milli: u32,
    /// Lease duration of leader election, in seconds: how long no replica leads when the leader's node is lost. A
    /// leader whose API server does not respond for two thirds of it steps down
    #[arg(
        long,
        env = "BASCULE_LEASE_SECONDS",
        default_value_t = 5,
        value_parser = clap::value_parser!(u16).range(3..=60)
    )]
    pub(crate) lease_seconds: u16,
    /// Log format
    #[arg(long, value_enum, default_value = "text", env = "BASCULE_LOG_FORMAT")]
    pub(crate) log_format: LogFormat,
    /// Log filter: a level (error, warn, info, debug, trace), or comma-separated `target=level` pairs
    #[arg(long, default_value = "info", env = "BASCULE_LOG")]
    pub(crate) log: String,
}

fn any_address(port: u16) -> SocketAddr {
    SocketAddr::new(Ipv6Addr::UNSPECIFIED.into(), port)
}

/// Log format.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// One line of text per record.
    Text,
    /// One JSON object per record.
    Json,
}

impl Args {
    /// How long the Lease of leader election is valid after its last renewal.
    pub(crate) fn lease_duration(&self) -> Duration {
        Duration::from_secs(u64::from(self.lease_seconds))
    }
}
