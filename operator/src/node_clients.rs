//! One gRPC client for each node daemon: a stream of reports, and commands.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bascule_ipc::vm::{MigrationPhase, VmState};
use bascule_node_api::command::{Command, Outcome};
use bascule_node_api::proto;
use bascule_node_api::proto::node_client::NodeClient;
use bascule_node_api::proto::{ConsoleInput, ConsoleOutput};
use bascule_node_api::report::{NodeReport, VmReport};
use bascule_node_api::{NODE_PORT, NODE_TLS_NAME, VERSION, VERSION_MIN, agree, connect};
use bascule_operator_core::Stream;
use bascule_pki::Authority;
use bascule_types::{Epoch, VmUid};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;
use tonic::transport::{Certificate, Channel, ClientTlsConfig, Endpoint, Identity};

use crate::clock::now;
use crate::identity::OwnIdentity;

/// The clients of all nodes, by node name. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct NodeClients {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    identity: OwnIdentity,
    entries: Mutex<HashMap<String, Entry>>,
    changed: Arc<Notify>,
    /// Notified when a report shows that a VM may have another owner.
    ownership_moves: Notify,
}

#[derive(Debug)]
struct Entry {
    address: IpAddr,
    uid: String,
    task: JoinHandle<()>,
    state: NodeState,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What a node's daemon last reported, and whether it still reports.
#[derive(Clone, Debug, Default)]
pub(crate) struct NodeState {
    /// Whether the report stream is up.
    pub(crate) stream: Stream,
    /// The last report; kept when the stream ends.
    pub(crate) report: Option<Arc<NodeReport>>,
    /// For commands; present while the stream is up.
    channel: Option<Channel>,
    /// Why the stream is down.
    pub(crate) error: Option<String>,
}

/// A console of a VM, open at its node. It is closed when this is dropped.
#[derive(Debug)]
pub(crate) struct NodeConsole {
    pub(crate) input_tx: mpsc::Sender<ConsoleInput>,
    /// The first message has the position only.
    pub(crate) output: Streaming<ConsoleOutput>,
}

/// Whether the process has the guest, which may be paused.
pub(crate) fn has_guest(report: &VmReport, vm: VmUid) -> bool {
    let state = &report.status.state;
    report.alive
        && report.status.uid == vm
        && matches!(state, VmState::Running | VmState::Paused | VmState::InDoubt)
}

impl NodeClients {
    pub(crate) fn new(authority: Arc<Authority>, changed: Arc<Notify>) -> Self {
        let shared = Shared {
            identity: OwnIdentity::new(authority, vec![]),
            entries: Mutex::new(HashMap::new()),
            changed,
            ownership_moves: Notify::new(),
        };
        Self {
            shared: Arc::new(shared),
        }
    }

    /// Keeps one client for each of `nodes` (name to address and UID) and drops all others.
    pub(crate) fn follow(&self, nodes: &BTreeMap<String, (IpAddr, String)>) {
        let mut entries = self
            .shared
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        entries.retain(|name, entry| {
            nodes
                .get(name)
                .is_some_and(|(a, uid)| *a == entry.address && *uid == entry.uid)
        });
        for (name, (address, uid)) in nodes {
            entries.entry(name.clone()).or_insert_with(|| {
                let shared = Arc::clone(&self.shared);
                let task = tokio::spawn(follow_node(shared, name.clone(), *address, uid.clone()));
                Entry {
                    address: *address,
                    uid: uid.clone(),
                    task,
                    state: NodeState::default(),
                }
            });
        }
    }

    /// A node whose report stream is up and which reports a process of which `is_it` holds.
    pub(crate) fn reporting(&self, is_it: impl Fn(&VmReport) -> bool) -> Option<String> {
        let reports_it = |state: &NodeState| {
            let report = state.report.as_ref().filter(|_| state.stream == Stream::Up);
            report.is_some_and(|report| report.vms.iter().any(&is_it))
        };
        let mut states = self.states().into_iter();
        states.find_map(|(node, state)| reports_it(&state).then_some(node))
    }

    /// A snapshot of every node's state.
    pub(crate) fn states(&self) -> BTreeMap<String, NodeState> {
        let entries = self
            .shared
            .entries
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        entries
            .iter()
            .map(|(name, entry)| (name.clone(), entry.state.clone()))
            .collect()
    }

    /// Returns when a node's report has shown that a VM may have another owner: the nodes of a migration transfer
    /// the ownership themselves.
    pub(crate) async fn ownership_moves(&self) {
        self.shared.ownership_moves.notified().await;
    }

    /// Has a node's daemon execute a command. Fails at once while its report stream is down.
    pub(crate) async fn execute(&self, node: &str, command: &Command) -> Result<Outcome> {
        let channel = {
            let entries = self
                .shared
                .entries
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            let state = entries.get(node).map(|entry| &entry.state);
            state.and_then(|state| state.channel.clone())
        };
        let channel = channel.ok_or_else(|| anyhow!("bascule-node on {node} is not connected"))?;
        let json = serde_json::to_string(command).context("serialize the command")?;
        let request = proto::Command {
            version: VERSION,
            version_min: VERSION_MIN,
            json,
        };
        let mut client = NodeClient::new(channel);
        let response = tokio::time::timeout(COMMAND_LIMIT, client.execute(request))
            .await
            .map_err(|_| {
                anyhow!("bascule-node on {node} did not respond within {COMMAND_LIMIT:?}")
            })?
            .map_err(|status| anyhow!("bascule-node on {node}: {}", status.message()))?;
        serde_json::from_str(&response.into_inner().json).context("parse the outcome")
    }

    /// Opens the console of a VM that runs on a node, from position `from` on. On a connection of its own, because a
    /// client that does not read takes up the window of all streams of a connection, also of the one that has the reports.
    pub(crate) async fn console(
        &self,
        node: &str,
        vm: VmUid,
        from: Option<u64>,
    ) -> Result<NodeConsole> {
        let address = {
            let entries = self
                .shared
                .entries
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            entries.get(node).map(|entry| entry.address)
        };
        let address = address.with_context(|| format!("there is no node {node}"))?;
        let channel = self.shared.connect(address).await?;
        let (input_tx, input_rx) = mpsc::channel(CONSOLE_QUEUE);
        let first = ConsoleInput {
            version: VERSION,
            version_min: VERSION_MIN,
            vm: vm.to_string(),
            from,
            data: Vec::new(),
        };
        input_tx.send(first).await.context("name the VM")?;
        let mut client = NodeClient::new(channel);
        let opened = client.console(ReceiverStream::new(input_rx));
        let opened = tokio::time::timeout(CONSOLE_LIMIT, opened)
            .await
            .map_err(|_| anyhow!("bascule-node on {node} does not respond"))?
            .map_err(|status| anyhow!("{}", status.message()))?;
        Ok(NodeConsole {
            input_tx,
            output: opened.into_inner(),
        })
    }
}

impl Shared {
    fn update(&self, name: &str, change: impl FnOnce(&mut NodeState) -> bool) {
        let changed = {
            let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries
                .get_mut(name)
                .is_some_and(|entry| change(&mut entry.state))
        };
        if changed {
            self.changed.notify_one();
        }
    }

    /// Connects to the daemon at `address`.
    async fn connect(&self, address: IpAddr) -> Result<Channel> {
        let address = SocketAddr::new(address, NODE_PORT);
        let endpoint = Endpoint::from_shared(format!("https://{address}"))
            .context("the node's address")?
            .tls_config(self.tls()?)
            .context("set up TLS")?
            .http2_keep_alive_interval(REPORT_TIMEOUT)
            .keep_alive_timeout(REPORT_TIMEOUT);
        connect(&endpoint, CONNECT_LIMIT).await.context("connect")
    }

    /// Mutual TLS: the operator's certificate, and the name that a node's certificate must have.
    fn tls(&self) -> Result<ClientTlsConfig> {
        let own = self.identity.get()?;
        let authority = self.identity.authority().certificate_pem();
        Ok(ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(authority))
            .identity(Identity::from_pem(&own.certificate_pem, &own.key_pem))
            .domain_name(NODE_TLS_NAME))
    }
}

/// Keeps a report stream to one node, reconnecting until the task is aborted.
async fn follow_node(shared: Arc<Shared>, name: String, address: IpAddr, uid: String) {
    let mut failures: u32 = 0;
    loop {
        let error = match watch(&shared, &name, address, &uid, &mut failures).await {
            Ok(()) => anyhow!("the node ended the stream"),
            Err(error) => error,
        };
        failures = failures.saturating_add(1);
        let message = format!("{error:#}");
        shared.update(&name, |state| {
            let was_up = state.stream == Stream::Up;
            if was_up {
                tracing::warn!(
                    node = name,
                    error = message,
                    "the report stream of a node ended"
                );
            }
            if !matches!(state.stream, Stream::Down { .. }) {
                state.stream = Stream::Down { since: now() };
            }
            state.channel = None;
            state.error = Some(message);
            was_up || failures == 1
        });
        if failures.is_multiple_of(CERTIFICATE_SUSPECT_AFTER) {
            // The operator's own certificate may be invalid, e.g. after a clock jump: issue a new one.
            shared.identity.forget();
        }
        tokio::time::sleep(RECONNECT).await;
    }
}

async fn watch(
    shared: &Arc<Shared>,
    name: &str,
    address: IpAddr,
    uid: &str,
    failures: &mut u32,
) -> Result<()> {
    let channel = shared.connect(address).await?;
    let request = proto::WatchRequest {
        version: VERSION,
        version_min: VERSION_MIN,
    };
    let mut client = NodeClient::new(channel.clone()).max_decoding_message_size(REPORT_BYTES_MAX);
    let mut stream = tokio::time::timeout(REPORT_TIMEOUT, client.watch(request))
        .await
        .context("the node does not respond")?
        .map_err(|status| anyhow!("{}", status.message()))?
        .into_inner();
    loop {
        // The node daemon reports at least once a second; without a report its stream counts as down.
        let next = tokio::time::timeout(REPORT_TIMEOUT, stream.message())
            .await
            .map_err(|_| anyhow!("no report for {REPORT_TIMEOUT:?}"))?
            .map_err(|status| anyhow!("{}", status.message()))?;
        let Some(envelope) = next else { return Ok(()) };
        if agree(envelope.version, envelope.version).is_none() {
            bail!(
                "the node reports in protocol version {}, which this operator does not support",
                envelope.version
            );
        }
        let report: NodeReport = serde_json::from_str(&envelope.json).context("parse a report")?;
        if report.node.to_string() != uid {
            bail!(wrong_identity(name, &report.name));
        }
        *failures = 0;
        shared.update(name, |state| {
            let was_up = state.stream == Stream::Up;
            let same = was_up
                && state
                    .report
                    .as_deref()
                    .is_some_and(|old| same_but_for_clocks(old, &report));
            let before = state.report.as_deref();
            if before.is_some_and(|old| ownership_of_vms(old) != ownership_of_vms(&report)) {
                shared.ownership_moves.notify_one();
            }
            state.stream = Stream::Up;
            state.channel.get_or_insert_with(|| channel.clone());
            state.error = None;
            state.report = Some(Arc::new(report));
            if !was_up {
                tracing::info!(node = name, "the report stream of a node is up");
            }
            !same
        });
    }
}

/// What of a report changes when a VM begins, passes or ends the transfer of its ownership.
fn ownership_of_vms(report: &NodeReport) -> Vec<(VmUid, Epoch, &VmState, Option<MigrationPhase>)> {
    let vms = report.vms.iter().map(|vm| &vm.status);
    vms.map(|vm| {
        let phase = vm.migration.as_ref().map(|migration| migration.phase);
        (vm.uid, vm.epoch, &vm.state, phase)
    })
    .collect()
}

fn wrong_identity(name: &str, reported: &str) -> String {
    if reported == name {
        format!(
            "bascule-node on {name} has the identity of an earlier node of that name: it joins again once \
             the kubelet has renewed its token, within minutes; restart its pod to hasten that"
        )
    } else {
        format!("the daemon at the address of {name} has the identity of node {reported}")
    }
}

/// Whether the reports are equal but for the values that change in every report (remaining lease,
/// heartbeat age, memory overhead), which must not trigger reconciliation.
fn same_but_for_clocks(old: &NodeReport, new: &NodeReport) -> bool {
    let still = |report: &NodeReport| {
        let mut report = report.clone();
        for volume in &mut report.volumes {
            if let Ok(status) = &mut volume.status {
                status.lease_left_ms = 0;
                for peer in &mut status.peers {
                    peer.no_heartbeat_ms = 0;
                }
            }
        }
        for vm in &mut report.vms {
            vm.overhead = None;
        }
        report
    };
    still(old) == still(new)
}

/// TCP connect and TLS handshake; a busy node takes a moment for the latter (guess).
const CONNECT_LIMIT: Duration = Duration::from_secs(3);
/// Three missed reports.
const REPORT_TIMEOUT: Duration = Duration::from_secs(3);
/// Pause between connection attempts; short, so that a restarted daemon is back within a second.
const RECONNECT: Duration = Duration::from_millis(500);
/// A daemon responds once the command was executed or refused; attaching a volume may wait for a
/// lease to expire.
const COMMAND_LIMIT: Duration = Duration::from_secs(45);
/// A VM process answers within milliseconds unless it hangs.
const CONSOLE_LIMIT: Duration = Duration::from_secs(10);
/// Messages of typed input that wait for the network.
const CONSOLE_QUEUE: usize = 4;
/// 10,000 VMs at 1 KiB each is 10 MiB; the rest is reserve.
const REPORT_BYTES_MAX: usize = 64 << 20;
/// Failed connection attempts, about a minute, after which the operator renews its certificate.
const CERTIFICATE_SUSPECT_AFTER: u32 = 60;

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Otherwise a drain waits for the next poll of the volume.
    #[test]
    fn a_transfer_of_ownership_is_told_from_progress() {
        let report = |state: &str, epoch: u64, phase: &str, bytes: u64| -> NodeReport {
            let migration = json!({
                "attempt": "6fa459ea-ee8a-4ca4-894e-db77e160355e", "phase": phase, "rounds": 1,
                "bytes": bytes, "remaining": 0, "downtime_ms_predicted": null, "downtime_ms": null,
                "total_ms": bytes, "timings": [], "failure": null,
            });
            let status = json!({
                "uid": "16fd2706-8baf-433b-82eb-8c7fada847da", "release": "1", "pid": 1,
                "state": state, "owner": null, "epoch": epoch, "listening": null,
                "migration": migration, "io_stalled": false, "addresses": [],
            });
            let vm = json!({
                "name": "shop/web", "volume": "gold", "status": status, "alive": true,
                "overhead": null,
            });
            serde_json::from_value(json!({
                "node": "886313e1-3b8a-4372-9b90-0c9aee199e5d", "name": "n1", "release": "1",
                "boot_id": "", "kvm_error": null, "volumes": [], "vms": [vm], "imports": [],
            }))
            .unwrap()
        };
        let copying = report("Running", 5, "PreCopy", 10);
        let same = |other: &NodeReport| ownership_of_vms(&copying) == ownership_of_vms(other);
        assert!(same(&report("Running", 5, "PreCopy", 20)));
        assert!(!same(&report("Running", 5, "Committing", 10)));
        assert!(!same(&report("Departed", 5, "Completed", 10)));
        assert!(!same(&report("Running", 6, "PreCopy", 10)));
    }

    #[test]
    fn a_daemon_of_an_earlier_node_of_that_name_is_told_from_one_of_another_node() {
        let anew = wrong_identity("n1", "n1");
        assert!(anew.contains("earlier node") && anew.contains("restart its pod"));
        assert!(wrong_identity("n1", "n2").ends_with("the identity of node n2"));
    }
}
