//! Which node owns the virtual machine, and which nodes could.

use bascule_ipc::volume::PathState;
use bascule_types::Owner;

use super::context::PlanContext;
use crate::observed::{NodeView, RowView};
use crate::{Fact, NodeHealth, Stream, node_health};

/// Where a virtual machine is, as its row says.
pub(super) enum Place {
    /// No node owns it.
    Nowhere,
    /// A node owns it.
    On {
        /// The node's name.
        node: String,
        /// The owner: the node's slot and generation.
        owner: Owner,
        /// Its health as far as this volume is concerned.
        health: NodeHealth,
    },
    /// It is owned by a slot that no node is known to hold.
    UnknownHolder {
        /// That slot and generation.
        owner: Owner,
    },
}

impl PlanContext<'_> {
    pub(super) fn place(&self, row: &RowView) -> Place {
        let Some(owner) = row.owner else {
            return Place::Nowhere;
        };
        let by_own_report =
            self.observed.nodes.iter().find(|(_, node)| {
                node.access.known().and_then(|access| access.owner) == Some(owner)
            });
        if let Some((name, node)) = by_own_report {
            let health = self.health_of(node, owner);
            return Place::On {
                node: name.clone(),
                owner,
                health,
            };
        }
        let peers = self
            .observed
            .volume
            .known()
            .map_or(&[][..], |volume| &volume.peers);
        let Some(peer) = peers.iter().find(|peer| peer.owner.slot == owner.slot) else {
            return Place::UnknownHolder { owner };
        };
        let named = self
            .observed
            .nodes
            .iter()
            .find(|(_, node)| node.uid == Some(peer.node));
        let (name, stream) = named.map_or_else(
            // Its Node object is gone; the volume remembers it.
            || (peer.node.to_string(), Stream::Down { since: self.now }),
            |(name, node)| (name.clone(), node.stream),
        );
        // A slot's new generation takes over the ownerships of the one before, unless that one was
        // fenced: then the VM waits for a takeover.
        let fenced = row.fences.iter().any(|fence| fence.victim == owner);
        let health = if fenced {
            NodeHealth::Suspect
        } else if peer.owner.generation == owner.generation {
            node_health(stream, &Fact::Known(peer.alive))
        } else {
            NodeHealth::Undetermined
        };
        Place::On {
            node: name,
            owner,
            health,
        }
    }

    fn health_of(&self, node: &NodeView, owner: Owner) -> NodeHealth {
        let peers = self
            .observed
            .volume
            .known()
            .map_or(&[][..], |volume| &volume.peers);
        let heartbeat = peers
            .iter()
            .find(|peer| peer.owner == owner)
            .map_or(Fact::Unknown, |peer| Fact::Known(peer.alive));
        node_health(node.stream, &heartbeat)
    }

    /// The node through which changes of the volume's metadata are requested: the coordinator if it
    /// is reachable, else any node with a direct path.
    pub(super) fn route(&self) -> Option<String> {
        let reachable = |node: &NodeView| {
            node.stream == Stream::Up
                && node
                    .access
                    .known()
                    .is_some_and(|a| a.path == PathState::Direct)
        };
        let coordinator = |node: &NodeView| node.access.known().is_some_and(|a| a.coordinator);
        let mut nodes = self
            .observed
            .nodes
            .iter()
            .filter(|(_, node)| reachable(node));
        nodes
            .clone()
            .find(|(_, node)| coordinator(node))
            .or_else(|| nodes.next())
            .map(|(name, _)| name.clone())
    }

    /// The node's slot and generation, if a guest could be started there now; else why not.
    pub(super) fn can_host(&self, name: &str) -> Result<Owner, String> {
        let Some(node) = self.observed.nodes.get(name) else {
            return Err(format!("node {name} runs no bascule-node"));
        };
        if node.stream != Stream::Up {
            return Err(format!("bascule-node on {name} does not answer"));
        }
        if let Some(error) = &node.kvm_error {
            return Err(format!("node {name} cannot run guests: {error}"));
        }
        let volume = &self.intent.volume;
        match &node.access {
            Fact::Known(access) if access.path == PathState::Direct => access
                .owner
                .ok_or_else(|| format!("node {name} is joining volume {volume}")),
            Fact::Known(access) => {
                let why = access.reason.as_deref().unwrap_or("no reason given");
                Err(format!("node {name} does not reach volume {volume}: {why}"))
            }
            Fact::Unknown => Err(format!(
                "bascule-volume on {name} does not say how it reaches volume {volume}"
            )),
            Fact::Absent => Err(format!("volume {volume} is not attached on node {name}")),
        }
    }

    /// Whether what keeps a guest from being started there may pass by itself: a node that is busy is
    /// unresponsive for some seconds, or loses its lease and takes another.
    pub(super) fn may_recover(&self, name: &str) -> bool {
        self.observed.nodes.get(name).is_some_and(|node| {
            node.stream != Stream::Up || (node.kvm_error.is_none() && node.access != Fact::Absent)
        })
    }

    /// Why nodes that answer do not reach the volume.
    pub(super) fn path_complaints(&self) -> Vec<String> {
        let nodes = self.observed.nodes.iter();
        let answering = nodes.filter(|(_, node)| node.stream == Stream::Up);
        answering
            .filter_map(|(name, node)| {
                let access = node.access.known()?;
                let why = access.reason.as_deref().unwrap_or("no reason given");
                (access.path != PathState::Direct).then(|| format!("{name}: {why}"))
            })
            .take(COMPLAINTS_MAX)
            .collect()
    }

    /// The known nodes on which a guest could not be started now.
    pub(super) fn unsuitable_nodes(&self) -> Vec<String> {
        self.observed
            .nodes
            .keys()
            .filter(|name| self.can_host(name).is_err())
            .cloned()
            .collect()
    }
}

/// Keeps a condition's message readable on a large cluster.
pub(super) const COMPLAINTS_MAX: usize = 5;
