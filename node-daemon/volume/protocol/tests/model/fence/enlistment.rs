//! Node A's `bascule-volume` and `bascule-watchdog`: whether the lease of the volume is watched.

use bascule_types::BootTime;
use bascule_volume_format::WatchdogKind;
use bascule_volume_protocol::{Mutation, WatchdogCall, WriterActivity, WriterEvent, WriterPhase};

use super::{Action, FenceModel, GUEST, Guest, Node, NodeState, State, VOLUME};

impl FenceModel {
    /// A step that has to do with whether the lease is watched.
    pub(super) fn on_watch(&self, state: &mut State, action: Action) {
        let (now, is_writing) = (state.moment(), state.is_writing());
        let may_name_one = state.named != WatchdogKind::None;
        let NodeState::Up(node) = &mut state.a else {
            return;
        };
        match action {
            Action::Refreshes => {
                // The kernel has no request that failed.
                let failed = node.writers.phase(GUEST) == Some(WriterPhase::Unclean);
                self.refreshes(node, now, may_name_one, is_writing && !failed);
            }
            Action::WatchdogFallsSilent => node.is_silent = true,
            _ => node.writers = node.writers.clone().next(GUEST, WriterEvent::Failed),
        }
    }

    /// `bascule-volume` asks `bascule-watchdog` to watch the volume, or not to, as the writers need it.
    pub(super) fn refreshes(
        &self,
        node: &mut Node,
        now: BootTime,
        may_name_one: bool,
        is_writing: bool,
    ) {
        let valid = |expiry: BootTime| now < expiry;
        let shown = node.page.map(|held| held.expiry);
        let lease_until = node.holder.lease().map(|held| held.expiry);
        let is_counted = match node.writers.phase(GUEST) {
            Some(WriterPhase::Completing) => true,
            Some(WriterPhase::Unclean) => !self.rules.breaks(Mutation::UncleanCountsAsDrained),
            Some(WriterPhase::Open) | None => false,
        };
        let activity = WriterActivity {
            any: node.writers.must_be_watched(),
            drained: !is_writing && !is_counted && !matches!(node.guest, Guest::Checked(_)),
            closed: !shown.is_some_and(valid),
            lease_until: lease_until.filter(|expiry| valid(*expiry)),
        };
        let (decided, call) = node.enlistment.clone().decide(&activity);
        let granted = match call {
            _ if node.is_silent => false,
            WatchdogCall::Withdraw => {
                node.enlisted = node.enlisted.clone().withdraw(VOLUME);
                true
            }
            WatchdogCall::Enlist { lease_until } => {
                let is_known = node.enlisted.volumes().next().is_some();
                let granted = is_known || shown.max(lease_until).is_some_and(valid);
                if granted {
                    node.enlisted = node.enlisted.clone().enlist(VOLUME);
                }
                granted
            }
        };
        let answer = granted.then(|| self.kind());
        node.enlistment = decided.answered(call, answer).published(may_name_one);
        node.publish();
    }
}
