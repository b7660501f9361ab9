//! One cluster for all scenarios of a test program, which run one after the other.

use std::sync::OnceLock;
use std::time::Duration;

use anyhow::Result;
use bascule_lab::kept::keep_from_env;
use bascule_lab::progress::step;
use bascule_lab::{Families, Lab, Tier};

use super::{ClusterVm, Installation, NAMESPACE};
use crate::kvm_or_skip;

/// A cluster that the first scenario brings up. The lab is taken down when the process ends, unless
/// `BASCULE_LAB_KEEP` is set.
#[derive(Debug)]
pub struct SharedCluster {
    tier: Tier,
    /// None for those of the tier.
    families: Option<Families>,
    nodes: u8,
    installation: OnceLock<Installation>,
    resident: OnceLock<ClusterVm<'static>>,
    on_san: OnceLock<ClusterVm<'static>>,
}

impl SharedCluster {
    /// A cluster of `nodes` nodes.
    #[must_use]
    pub const fn new(tier: Tier, nodes: u8) -> Self {
        Self {
            tier,
            families: None,
            nodes,
            installation: OnceLock::new(),
            resident: OnceLock::new(),
            on_san: OnceLock::new(),
        }
    }

    /// A native dual-stack cluster of `nodes` nodes, with IPv4 first.
    #[must_use]
    pub const fn dual_stack(nodes: u8) -> Self {
        Self {
            tier: Tier::Native,
            families: Some(Families::DUAL),
            nodes,
            installation: OnceLock::new(),
            resident: OnceLock::new(),
            on_san: OnceLock::new(),
        }
    }

    /// Runs a scenario on it, with a SharedVolume that every node reaches.
    ///
    /// # Panics
    /// When the cluster does not come up.
    #[expect(
        clippy::expect_used,
        reason = "the only way for a test to fail from a helper"
    )]
    pub fn with(&self, name: &str, scenario: impl FnOnce(&Installation)) {
        if !kvm_or_skip(name) {
            return;
        }
        let cluster = self.get();
        let done = step(&format!("scenario {name}"), || {
            // A panic leaves the record, so that a kept lab is not used again after a failure.
            cluster.lab().set_unfinished(Some(name))?;
            let _cleared = ClearedAfterFailure(cluster.lab());
            scenario(cluster);
            cluster.lab().set_unfinished(None)
        });
        done.expect("a scenario fails by panicking");
    }

    /// Runs a scenario on it with a virtual machine of its own, which is deleted at the end.
    /// `number` makes the guest's address: see [`Installation::vm`].
    ///
    /// # Panics
    /// When the cluster or the virtual machine does not come up, or does not go.
    #[expect(
        clippy::expect_used,
        reason = "the only way for a test to fail from a helper"
    )]
    pub fn with_vm(
        &self,
        name: &str,
        number: u8,
        scenario: impl FnOnce(&Installation, &ClusterVm<'_>),
    ) {
        self.with(name, |cluster| {
            let vm = cluster.vm(name, number).expect("a virtual machine");
            scenario(cluster, &vm);
            vm.delete().expect("its deletion");
        });
    }

    /// Runs a scenario on it with the one virtual machine that all these scenarios share, on the node
    /// where the last one left it. Starting one per scenario would double the duration.
    ///
    /// # Panics
    /// When the cluster or the virtual machine does not come up.
    #[expect(
        clippy::expect_used,
        reason = "the only way for a test to fail from a helper"
    )]
    pub fn with_resident(
        &'static self,
        name: &str,
        scenario: impl FnOnce(&Installation, &ClusterVm<'_>),
    ) {
        self.with(name, |cluster| {
            let vm = self.resident.get_or_init(|| {
                let cluster: &'static Installation = self.get();
                cluster.vm("resident", RESIDENT).expect("a virtual machine")
            });
            vm.wait_ready(READY_LIMIT).expect("the virtual machine");
            scenario(cluster, vm);
        });
    }

    /// Runs a scenario on it with the one virtual machine whose disks are on the lab's SAN, on a SharedVolume
    /// of its own. Emulated tier only.
    ///
    /// # Panics
    /// As [`Self::with_resident`].
    #[expect(
        clippy::expect_used,
        reason = "the only way for a test to fail from a helper"
    )]
    pub fn with_san(
        &'static self,
        name: &str,
        scenario: impl FnOnce(&Installation, &ClusterVm<'_>),
    ) {
        self.with(name, |cluster| {
            let vm = self.on_san.get_or_init(|| {
                let cluster: &'static Installation = self.get();
                cluster.san_volume().expect("a SharedVolume on the SAN");
                let vm = cluster.san_vm("on-san", ON_SAN);
                vm.expect("a virtual machine on it")
            });
            vm.wait_ready(READY_LIMIT).expect("the virtual machine");
            scenario(cluster, vm);
        });
    }

    fn get(&self) -> &Installation {
        self.installation
            .get_or_init(|| self.bring_up().expect("Bascule on a cluster"))
    }

    fn bring_up(&self) -> Result<Installation> {
        let families = self.families.unwrap_or_else(|| self.tier.families());
        let installation = Installation::on(Lab::for_test_on(self.tier, families, self.nodes)?)?;
        installation.volume()?;
        Ok(installation)
    }
}

/// Deletes what a scenario that fails leaves: its virtual machines would count in later scenarios, which would fail as
/// well. A lab that is kept is left as it is.
struct ClearedAfterFailure<'a>(&'a Lab);

impl Drop for ClearedAfterFailure<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() || keep_from_env() {
            return;
        }
        let shared = "--field-selector=metadata.name!=resident,metadata.name!=on-san";
        let delete = ["delete", "vm", "-n", NAMESPACE, shared, "--timeout=60s"];
        if let Err(error) = self.0.kubectl(&delete) {
            println!("the scenario's virtual machines stay: {error:#}");
        }
    }
}

/// Its address is 10.91.0.99.
const RESIDENT: u8 = 99;
const ON_SAN: u8 = 98;
/// It may still be migrating from the previous scenario.
const READY_LIMIT: Duration = Duration::from_secs(240);
