//! What Prometheus reads.

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

/// All metrics.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    vms: Family<PhaseLabel, Gauge<i64, AtomicI64>>,
    migrations: Family<MigrationLabel, Counter<u64, AtomicU64>>,
    downtime: Histogram,
    failovers: Family<OutcomeLabel, Counter<u64, AtomicU64>>,
    /// Takeovers that a volume granted.
    pub(crate) takeovers: Counter,
    lease_left: Family<NodeVolumeLabel, Gauge<f64, AtomicU64>>,
    node_stream: Family<NodeLabel, Gauge<i64, AtomicI64>>,
    leading: Gauge<i64, AtomicI64>,
    /// Plans that could not be carried out to their end.
    pub(crate) plan_failures: Counter,
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
        // From a millisecond to half a minute.
        let downtime = Histogram::new(exponential_buckets(0.001, 2.0, 16));
        let mut metrics = Self {
            registry: Registry::with_prefix("bascule"),
            vms: Family::default(),
            migrations: Family::default(),
            downtime,
            failovers: Family::default(),
            takeovers: Counter::default(),
            lease_left: Family::default(),
            node_stream: Family::default(),
            leading: Gauge::default(),
            plan_failures: Counter::default(),
        };
        metrics.register();
        metrics
    }

    fn register(&mut self) {
        let r = &mut self.registry;
        r.register("operator_vms", "VirtualMachines by phase", self.vms.clone());
        r.register(
            "operator_migrations",
            "Migrations that have ended, by mode and outcome",
            self.migrations.clone(),
        );
        r.register(
            "operator_migration_downtime_seconds",
            "How long guests stood still at the end of a migration",
            self.downtime.clone(),
        );
        r.register(
            "operator_failovers",
            "Failover records that have been closed, by outcome",
            self.failovers.clone(),
        );
        r.register(
            "operator_takeovers",
            "Takeovers granted",
            self.takeovers.clone(),
        );
        r.register(
            "operator_volume_lease_left_seconds",
            "How long a node's lease on a volume is still valid, as last reported",
            self.lease_left.clone(),
        );
        r.register(
            "operator_node_stream_up",
            "Whether a node's daemon reports",
            self.node_stream.clone(),
        );
        r.register(
            "operator_leading",
            "Whether this replica leads",
            self.leading.clone(),
        );
        r.register(
            "operator_plan_failures",
            "Plans that could not be carried out to their end",
            self.plan_failures.clone(),
        );
    }

    /// Counts the VirtualMachines afresh.
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

    /// What the nodes last reported.
    pub(crate) fn observe_nodes<'n>(
        &self,
        nodes: impl Iterator<Item = (&'n String, &'n crate::node_clients::NodeState)>,
    ) {
        self.lease_left.clear();
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
                self.lease_left
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

    pub(crate) fn set_leading(&self, leading: bool) {
        self.leading.set(i64::from(leading));
    }

    /// The exposition.
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
