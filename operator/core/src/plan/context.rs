//! The inputs of one plan, which every chapter reads and none changes.

use bascule_ipc::vm::VmState;

use super::step::Ready;
use crate::observed::RowView;
use crate::{Migration, Moment, Observed, Pod, Process, VmIntent};

/// The inputs of one call of [`crate::plan()`]. Each chapter adds its decisions as methods that return a
/// [`Step`](super::step::Step).
pub(super) struct PlanContext<'a> {
    pub(super) intent: &'a VmIntent,
    pub(super) observed: &'a Observed,
    pub(super) now: Moment,
}

impl<'a> PlanContext<'a> {
    pub(super) fn pods(&self) -> &'a [Pod] {
        self.observed.pods.known().map_or(&[], Vec::as_slice)
    }

    pub(super) fn migrations(&self) -> &'a [Migration] {
        self.observed.migrations.known().map_or(&[], Vec::as_slice)
    }

    /// Whether a process on `node` runs the guest, or may.
    pub(super) fn process_lives_on(&self, node: &str) -> bool {
        self.observed.processes.iter().any(|process| {
            process.node == node
                && process.alive
                && !matches!(
                    process.status.state,
                    VmState::Departed | VmState::Stopped(_) | VmState::Incoming
                )
        })
    }

    /// The process on `node` that runs the guest in the row's epoch.
    pub(super) fn process_of(&self, row: &RowView, node: &str) -> Option<&'a Process> {
        self.observed
            .processes
            .iter()
            .filter(|process| process.node == node)
            .filter(|process| {
                // An incoming process learns its new epoch when it runs.
                process.status.epoch == row.epoch
                    || process.status.epoch.next() == row.epoch
                        && process.status.state == VmState::Incoming
            })
            .max_by_key(|process| (process.alive, process.status.epoch))
    }

    /// An action that failed in the last run explains more than the state it left: its reason and
    /// message replace those of `ready`.
    pub(super) fn or_last_error(&self, mut ready: Ready) -> Ready {
        if let Some((reason, message)) = &self.observed.memory.error {
            ready.condition.reason = reason;
            ready.condition.message.clone_from(message);
        }
        ready
    }
}
