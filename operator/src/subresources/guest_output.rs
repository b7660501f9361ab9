//! The way to a guest: which node to ask, and what it answers.

use std::time::Duration;

use bascule_crds::VirtualMachine;
use bascule_ipc::vm::VmState;
use bascule_node_api::command::{Command, Outcome};
use bascule_operator_core::Stream;
use bascule_types::VmUid;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::future::join_all;
use kube::{Api, Client, ResourceExt};

use super::status::Failure;
use crate::node_clients::{NodeClients, NodeConsole, NodeState, has_guest};

/// The UID of a VirtualMachine.
pub(super) async fn uid_of(client: &Client, namespace: &str, name: &str) -> Result<VmUid, Failure> {
    let vms: Api<VirtualMachine> = Api::namespaced(client.clone(), namespace);
    let found = vms.get_metadata_opt(name).await.map_err(|error| {
        tracing::warn!(%error, "a VirtualMachine cannot be read");
        Failure::unavailable("the VirtualMachine cannot be read now")
    })?;
    let missing =
        || Failure::not_found(format!("virtualmachines.bascule.dev \"{name}\" not found"));
    let uid = found.and_then(|vm| vm.uid()).ok_or_else(missing)?;
    uid.parse().map_err(|_| missing())
}

/// Attaches to the console of a VM on the node that runs its guest.
pub(super) async fn console(
    nodes: &NodeClients,
    vm: VmUid,
    from: Option<u64>,
) -> Result<NodeConsole, Failure> {
    let node = home(nodes, vm);
    let node = node.ok_or_else(|| Failure::unavailable("no node runs the guest now"))?;
    nodes
        .console(&node, vm, from)
        .await
        .map_err(|error| Failure::unavailable(format!("{error:#}")))
}

/// The node that runs the guest, as far as the nodes report.
fn home(nodes: &NodeClients, vm: VmUid) -> Option<String> {
    let states = nodes.states();
    let mut guests = states.iter().filter_map(|(node, state)| {
        let guest = state
            .report
            .as_ref()?
            .vms
            .iter()
            .find(|r| has_guest(r, vm))?;
        (state.stream == Stream::Up).then_some((node, &guest.status.state))
    });
    let guests: Vec<_> = guests.by_ref().collect();
    let runs = guests.iter().find(|(_, state)| **state == VmState::Running);
    let found = runs.or_else(|| guests.first());
    found.map(|(node, _)| (*node).clone())
}

/// The last serial output of a VM: that of the running guest, or else the newest that a node has kept.
pub(super) async fn last_output(nodes: &NodeClients, vm: VmUid) -> Result<Vec<u8>, Failure> {
    let asked: Vec<String> = match home(nodes, vm) {
        Some(node) => vec![node],
        None => reachable(nodes),
    };
    let answers = asked.iter().map(|node| kept_output(nodes, node, vm));
    let answers = join_all(answers).await;
    let newest = answers.into_iter().flatten().min_by_key(|(age, _)| *age);
    newest.map(|(_, output)| output).ok_or_else(|| {
        Failure::not_found(
            "no node has serial output of this VirtualMachine: it has not run since \
                            the node that it ran on was booted, or that node does not respond",
        )
    })
}

fn reachable(nodes: &NodeClients) -> Vec<String> {
    let up = |(node, state): (String, NodeState)| (state.stream == Stream::Up).then_some(node);
    nodes.states().into_iter().filter_map(up).collect()
}

/// What one node has, and its age.
async fn kept_output(nodes: &NodeClients, node: &str, vm: VmUid) -> Option<(Duration, Vec<u8>)> {
    match nodes.execute(node, &Command::ReadConsoleLog { vm }).await {
        Ok(Outcome::ConsoleLog { output, age_ms }) => {
            let output = STANDARD.decode(output).ok()?;
            Some((Duration::from_millis(age_ms), output))
        }
        Ok(_) => None,
        Err(error) => {
            tracing::info!(
                node,
                error = format!("{error:#}"),
                "the console log cannot be read"
            );
            None
        }
    }
}
