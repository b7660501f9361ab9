//! Panics of the guest's kernel. What they do is decided by the guest's process, with or without an operator; here they
//! are told.

use bascule_crds::names::reason;
use bascule_ipc::vm::Panic;

use super::context::PlanContext;
use super::step::{Ready, ReportChange, Step};
use crate::{Phase, Process};

impl PlanContext<'_> {
    /// Reports the panics that the process of a running guest counts, with one event for what is news.
    pub(super) fn panics(&self, node: &str, process: &Process) -> Step {
        let mut step = Step::new();
        let panics = process.status.panics;
        let new = new_panics(self.observed.memory.panics.unwrap_or(0), panics.count);
        step.change(ReportChange::Panics(panics.count, new));
        if new > 0 {
            let then = match panics.present {
                Some(Panic::Panicked) => "",
                Some(Panic::CrashLoaded) => {
                    "; its crash kernel saves the memory and then resets it"
                }
                None => "; its machine was reset",
            };
            let message = format!("the kernel of the guest on {node} has panicked{then}");
            step.event(reason::GUEST_PANICKED, true, message);
        }
        step
    }

    /// The Ready condition of a guest that has panicked and was not reset since.
    pub(super) fn panicked(&self, node: &str, process: &Process) -> Option<Ready> {
        let name = &self.intent.name;
        let log = format!("kubectl bascule logs {name} has its last words");
        let message = match (process.status.panics.present?, &process.status.resets.waits) {
            (Panic::Panicked, Some(waits)) => format!("the guest on {node} waits {waits}; {log}"),
            (Panic::Panicked, None) => {
                format!("the kernel of the guest on {node} has panicked; {log}")
            }
            (Panic::CrashLoaded, _) => format!(
                "the kernel of the guest on {node} has panicked; its crash kernel saves the memory and then \
                 resets it; {log}"
            ),
        };
        let reason = reason::GUEST_PANICKED;
        Some(Ready::new(Phase::Running, false, reason, message))
    }
}

/// How many of `count` panics are news where `known` are reported. A guest that was started since counts anew.
fn new_panics(known: u32, count: u32) -> u32 {
    count.checked_sub(known).unwrap_or(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_panic_is_news_once_and_those_of_another_start_are_news() {
        for (known, count, new) in [
            (0, 0, 0),
            (0, 1, 1),
            (1, 1, 0),
            (1, 4, 3),
            (4, 1, 1),
            (4, 0, 0),
            (0, u32::MAX, u32::MAX),
        ] {
            assert_eq!(new_panics(known, count), new, "{count} after {known}");
        }
    }
}
