//! The command line.

use std::net::SocketAddr;
use std::time::Duration;

/// Bascule's operator: keeps VirtualMachines where they should be.
///
/// The chart starts two of these; the one that holds the Lease acts. Everything that it decides is
/// derived from the API, the daemons and the volumes, so it may be killed at any time.
#[derive(Clone, Debug, clap::Parser)]
#[command(name = "bascule-operator", version)]
pub(crate) struct Args {
    /// The namespace that the operator lives in
    #[arg(long, env = "BASCULE_NAMESPACE", default_value = "bascule-system")]
    pub(crate) namespace: String,
    /// The name of this replica, its pod's
    #[arg(long, env = "BASCULE_POD_NAME")]
    pub(crate) pod_name: String,
    /// Where the Join service listens
    #[arg(long, default_value = "0.0.0.0:7409")]
    pub(crate) join_listen: SocketAddr,
    /// Where /metrics, /healthz and /readyz are served
    #[arg(long, default_value = "0.0.0.0:7408")]
    pub(crate) http_listen: SocketAddr,
    /// The service account that nodes join with
    #[arg(
        long,
        env = "BASCULE_NODE_SERVICE_ACCOUNT",
        default_value = "bascule-node"
    )]
    pub(crate) node_service_account: String,
    /// The image of reservation pods
    #[arg(long, env = "BASCULE_IMAGE")]
    pub(crate) image: String,
    /// The pull policy of that image
    #[arg(
        long,
        env = "BASCULE_IMAGE_PULL_POLICY",
        default_value = "IfNotPresent"
    )]
    pub(crate) image_pull_policy: String,
    /// How many guest CPUs share one CPU of a node: a reservation asks for cores / this. In
    /// thousandths, so that 1500 means 1.5
    #[arg(long, env = "BASCULE_ALLOCATION_RATIO_MILLI", default_value_t = 4000)]
    pub(crate) allocation_ratio_milli: u32,
    /// How long a leader's Lease is valid without renewal, in seconds
    #[arg(long, default_value_t = 15)]
    pub(crate) lease_seconds: u16,
    /// How log lines look
    #[arg(long, value_enum, default_value = "text", env = "BASCULE_LOG_FORMAT")]
    pub(crate) log_format: LogFormat,
    /// What is logged: a level, or `target=level` pairs
    #[arg(long, default_value = "info", env = "BASCULE_LOG")]
    pub(crate) log: String,
}

/// How log lines look.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
pub(crate) enum LogFormat {
    /// For people.
    Text,
    /// For machines.
    Json,
}

impl Args {
    /// How long a leader's Lease is valid without renewal.
    pub(crate) fn lease_duration(&self) -> Duration {
        Duration::from_secs(u64::from(self.lease_seconds))
    }
}
