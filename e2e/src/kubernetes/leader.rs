//! Where the operator's leader runs.

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{ClusterVm, Installation, REPLACED_LIMIT, SYSTEM_NAMESPACE, condition, label_of};

/// Where a scenario's guest runs, as seen from the operator.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beside {
    /// On the leader's node.
    Leader,
    /// On another node.
    Standby,
}

impl Installation {
    /// The node of the operator's leader. Another replica is ready on another node when this returns: after
    /// the loss of a node both may be on the one that was left.
    ///
    /// # Errors
    /// When there is no leader, or no other replica on another node, in time.
    pub fn leader_node(&self) -> Result<String> {
        self.lab.wait_for(
            "a leader and a standby on two nodes",
            REPLACED_LIMIT,
            || {
                let lease = ["lease", LEASE, "-n", SYSTEM_NAMESPACE];
                let lease = self.lab.get(&lease)?;
                let holder = lease["spec"]["holderIdentity"].as_str();
                let holder = holder.context("nobody leads")?;
                let label = label_of("operator");
                let pods = self.lab.get(&["pod", "-n", SYSTEM_NAMESPACE, &label])?;
                let pods = pods["items"].as_array().context("a list of pods")?;
                let is_leader = |pod: &&Value| pod["metadata"]["name"] == holder;
                let leader = pods.iter().find(is_leader).context("the leader is gone")?;
                let node = leader["spec"]["nodeName"].as_str().context("a node")?;
                let others = pods.iter().filter(|pod| !is_leader(pod));
                for other in others {
                    let name = other["metadata"]["name"].as_str().context("a name")?;
                    if other["metadata"]["deletionTimestamp"].is_string() {
                        continue;
                    }
                    if other["spec"]["nodeName"] == node {
                        // The scheduler prefers a node without a replica for the next one.
                        let delete = ["delete", "pod", "-n", SYSTEM_NAMESPACE, name];
                        self.lab
                            .kubectl(&[&delete[..], &["--wait=false"]].concat())?;
                        bail!("{name} is on the leader's node");
                    }
                    condition(other, "Ready")?;
                    return Ok(node.to_owned());
                }
                bail!("there is no standby");
            },
        )
    }
}

impl ClusterVm<'_> {
    /// Moves the guest to the node of the operator's leader, or to another one. Returns its node.
    ///
    /// # Errors
    /// As [`Installation::leader_node`], or when it does not move.
    pub fn place(&self, wanted: Beside) -> Result<String> {
        let leader = self.cluster.leader_node()?;
        if (self.node()? == leader) != (wanted == Beside::Leader) {
            let target = (wanted == Beside::Leader).then_some(leader.as_str());
            self.migrate("Live", target)?;
        }
        let node = self.node()?;
        let present = self.cluster.leader_node()?;
        ensure!(
            present == leader,
            "the leader was on {leader}, now on {present}"
        );
        Ok(node)
    }
}

const LEASE: &str = "bascule-operator";
