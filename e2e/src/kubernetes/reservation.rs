//! The reservation pod of a virtual machine.

use anyhow::{Context, Result, bail};
use jiff::Timestamp;
use serde_json::Value;

use super::objects::ready_since;
use super::{ClusterVm, NAMESPACE};

impl ClusterVm<'_> {
    /// UID of its reservation pod.
    ///
    /// # Errors
    /// When there are several, or none that stays.
    pub fn reservation(&self) -> Result<String> {
        let pod = self.reservation_pod()?;
        let uid = pod["metadata"]["uid"].as_str();
        Ok(uid.context("a pod without a UID")?.to_owned())
    }

    /// Since when its reservation pod is ready, if it is.
    ///
    /// # Errors
    /// As [`Self::reservation`].
    pub fn reservation_ready(&self) -> Result<Option<Timestamp>> {
        Ok(ready_since(&self.reservation_pod()?))
    }

    fn reservation_pod(&self) -> Result<Value> {
        let label = format!("-l{LABEL_VM}={}", self.name);
        let pods = self.cluster.lab.get(&["pod", "-n", NAMESPACE, &label])?;
        let pods = pods["items"].as_array().context("a list of pods")?;
        let [pod] = pods.as_slice() else {
            bail!("{} has {} reservations", self.name, pods.len())
        };
        if pod["metadata"]["deletionTimestamp"].is_string() {
            bail!("the reservation of {} is leaving", self.name)
        }
        Ok(pod.clone())
    }
}

/// The label of everything that belongs to a VirtualMachine.
const LABEL_VM: &str = "bascule.dev/virtual-machine";
