//! A reservation that is to leave while its guest runs: drain, eviction, taint, preemption.
//!
//! The pod's grace period is the sum of the three budgets and a margin, so that each stage has its
//! time: live migration (several tries, because a target may die), quick migration, shutdown.

use bascule_crds::names::reason;

use super::context::PlanContext;
use super::step::Step;
use crate::MigrationPhase;
use crate::{Action, DrainPolicy, Migration, MigrationMode, Moment, Phase, Pod};

impl PlanContext<'_> {
    /// No migration is under way. Begins the next stage.
    pub(super) fn evacuate(&self, node: &str, pod: &Pod, since: Moment) -> Step {
        let elapsed = self.now.since(since);
        let budgets = self.intent.budgets;
        let tried: Vec<&Migration> = self
            .migrations()
            .iter()
            .filter(|m| m.drain && m.name.contains(&drain_prefix(&self.intent.name, pod)))
            .collect();
        let count = |mode| tried.iter().filter(|m| m.mode == mode).count();
        let live_ruled_out = tried.iter().any(|m| {
            m.mode == MigrationMode::Live
                && m.phase == MigrationPhase::Failed
                && matches!(
                    m.reason.as_deref(),
                    Some(reason::TIMED_OUT | reason::NOT_CONVERGING)
                )
        });
        let live_tries = count(MigrationMode::Live);
        let quick_tries = count(MigrationMode::Quick);
        let live = self.intent.on_drain == DrainPolicy::LiveMigrate
            && elapsed < budgets.live
            && live_tries < LIVE_TRIES_MAX
            && quick_tries == 0
            && !live_ruled_out;
        let quick = self.intent.on_drain != DrainPolicy::Shutdown
            && elapsed < budgets.live + budgets.quick
            && quick_tries < QUICK_TRIES_MAX;
        let (mode, word, ordinal) = if live {
            (MigrationMode::Live, "live", live_tries)
        } else if quick {
            (MigrationMode::Quick, "quick", quick_tries)
        } else {
            return self.shut_down(node);
        };
        let message = format!("leaving {node}");
        let mut step = Step::ready(Phase::Running, true, reason::MIGRATING, message);
        let name = format!("{}{word}-{ordinal}", drain_prefix(&self.intent.name, pod));
        step.push(Action::CreateMigration { name, mode });
        step.requeued_soon()
    }
}

/// The prefix of the names of the migrations that the eviction of a pod causes: operators
/// that see the same pod choose the same names and so create one migration.
fn drain_prefix(vm: &str, pod: &Pod) -> String {
    let short: String = pod
        .uid
        .chars()
        .filter(char::is_ascii_hexdigit)
        .take(8)
        .collect();
    format!("{vm}-drain-{short}-")
}

/// A second and third attempt cover targets that fail meanwhile.
const LIVE_TRIES_MAX: usize = 3;
/// A quick migration pauses the guest each time.
const QUICK_TRIES_MAX: usize = 1;
