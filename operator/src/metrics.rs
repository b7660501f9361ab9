//! Prometheus metrics, all with the prefix `bascule_operator_`.

use std::sync::atomic::{AtomicI64, AtomicU64};

use bascule_crds::{
    MigrationMode, MigrationPhase, Phase, VirtualMachine, VirtualMachineMigrationStatus,
};
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// The registry and every metric in it.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    vms: Family<PhaseLabel, Gauge<i64, AtomicI64>>,
    migrations: Family<MigrationLabel, Counter<u64, AtomicU64>>,
    downtime: Histogram,
    failovers: Family<OutcomeLabel, Counter<u64, AtomicU64>>,
    /// Counts `Change::TakeOver` requests that a volume granted.
    pub(crate) takeovers: Counter,
    /// Counts panics of guests' kernels that a VM's process has told for the first time.
    pub(crate) guest_panics: Counter,
    lease_remaining: Family<NodeVolumeLabel, Gauge<f64, AtomicU64>>,
    node_stream: Family<NodeLabel, Gauge<i64, AtomicI64>>,
    leader: Gauge<i64, AtomicI64>,
    /// Counts reconciliations that ended in an error; a refusal is not one.
    pub(crate) reconcile_errors: Counter,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct PhaseLabel {
    phase: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct MigrationLabel {
    mode: &'static str,
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct OutcomeLabel {
    outcome: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NodeVolumeLabel {
    node: String,
    volume: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct NodeLabel {
    node: String,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        // Buckets from 1 ms to 32.8 s.
        let downtime = Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let mut metrics = Self {
            registry: Registry::with_prefix("bascule"),
            vms: Family::default(),
            migrations: Family::default(),
            downtime,
            failovers: Family::default(),
            takeovers: Counter::default(),
            guest_panics: Counter::default(),
            lease_remaining: Family::default(),
            node_stream: Family::default(),
            leader: Gauge::default(),
            reconcile_errors: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("operator_vms", "VirtualMachines by phase", self.vms.clone());
        r.register(
            "operator_migrations",
            "Finished migrations, by mode and outcome",
            self.migrations.clone(),
        );
        r.register(
            "operator_migration_downtime_seconds",
            "Measured downtime of guests at the switch-over of a migration",
            self.downtime.clone(),
        );
        r.register(
            "operator_failovers",
            "Finished failovers, by outcome",
            self.failovers.clone(),
        );
        r.register(
            "operator_takeovers",
            "Ownership takeovers that a volume granted",
            self.takeovers.clone(),
        );
        r.register(
            "operator_guest_panics",
            "Panics of guests' kernels, as their pvpanic devices told them",
            self.guest_panics.clone(),
        );
        r.register(
            "operator_volume_lease_remaining_seconds",
            "Remaining validity of a node's lease on a volume, as last reported",
            self.lease_remaining.clone(),
        );
        r.register(
            "operator_node_stream_up",
            "1 while the report stream from a node's daemon is up, else 0",
            self.node_stream.clone(),
        );
        r.register(
            "operator_leader",
            "1 while this replica is the leader, else 0",
            self.leader.clone(),
        );
        r.register(
            "operator_reconcile_errors",
            "Reconciliations that ended in an error; refusals are not counted",
            self.reconcile_errors.clone(),
        );
    }

    /// Sets the number of VirtualMachines in each phase.
    pub(crate) fn count_vms<'v>(&self, vms: impl Iterator<Item = &'v VirtualMachine>) {
        let mut counts = [0_i64; Phase::ALL.len()];
        for vm in vms {
            let phase = vm
                .status
                .as_ref()
                .and_then(|s| s.phase)
                .unwrap_or(Phase::Pending);
            if let Some(index) = Phase::ALL.iter().position(|p| *p == phase) {
                counts[index] += 1;
            }
        }
        for (phase, count) in Phase::ALL.iter().zip(counts) {
            self.vms
                .get_or_create(&PhaseLabel {
                    phase: phase.as_str(),
                })
                .set(count);
        }
    }

    /// Sets the gauges per node and volume. Nodes that no longer exist disappear.
    pub(crate) fn observe_nodes<'n>(
        &self,
        nodes: impl Iterator<Item = (&'n String, &'n crate::node_clients::NodeState)>,
    ) {
        self.lease_remaining.clear();
        self.node_stream.clear();
        for (node, state) in nodes {
            let up = state.stream == bascule_operator_core::Stream::Up;
            self.node_stream
                .get_or_create(&NodeLabel { node: node.clone() })
                .set(i64::from(up));
            for volume in state
                .report
                .iter()
                .filter(|_| up)
                .flat_map(|report| &report.volumes)
            {
                let Ok(status) = &volume.status else { continue };
                let label = NodeVolumeLabel {
                    node: node.clone(),
                    volume: volume.name.clone(),
                };
                let left = std::time::Duration::from_millis(status.lease_left_ms);
                self.lease_remaining
                    .get_or_create(&label)
                    .set(left.as_secs_f64());
            }
        }
    }

    pub(crate) fn migration_ended(
        &self,
        mode: MigrationMode,
        status: &VirtualMachineMigrationStatus,
    ) {
        let mode = match mode {
            MigrationMode::Live => "Live",
            MigrationMode::Quick => "Quick",
        };
        let outcome = status.phase.map_or("Failed", MigrationPhase::as_str);
        self.migrations
            .get_or_create(&MigrationLabel { mode, outcome })
            .inc();
        let measured = status
            .progress
            .as_ref()
            .and_then(|p| p.measured_downtime.as_ref());
        if let Some(Ok(downtime)) = measured.map(bascule_crds::Duration::to_std) {
            self.downtime.observe(downtime.as_secs_f64());
        }
    }

    pub(crate) fn failover_ended(&self, succeeded: bool) {
        let outcome = if succeeded { "Succeeded" } else { "Withdrawn" };
        self.failovers
            .get_or_create(&OutcomeLabel { outcome })
            .inc();
    }

    pub(crate) fn set_leader(&self, leader: bool) {
        self.leader.set(i64::from(leader));
    }

    /// All metrics in the OpenMetrics text format.
    pub(crate) fn render(&self) -> Result<String, std::fmt::Error> {
        let mut exposition = String::new();
        text::encode(&mut exposition, &self.registry)?;
        Ok(exposition)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_phase_is_reported_even_at_zero() {
        let metrics = Metrics::new();
        metrics.count_vms(std::iter::empty());
        let text = metrics.render().unwrap();
        for phase in Phase::ALL {
            let line = format!("bascule_operator_vms{{phase=\"{}\"}} 0", phase.as_str());
            assert!(text.contains(&line), "{text}");
        }
    }

    #[test]
    fn an_ended_migration_is_counted_by_mode_and_outcome() {
        let metrics = Metrics::new();
        let status = VirtualMachineMigrationStatus {
            phase: Some(MigrationPhase::Succeeded),
            ..VirtualMachineMigrationStatus::default()
        };
        metrics.migration_ended(MigrationMode::Live, &status);
        let text = metrics.render().unwrap();
        let line = "bascule_operator_migrations_total{mode=\"Live\",outcome=\"Succeeded\"} 1";
        assert!(text.contains(line), "{text}");
    }
}
