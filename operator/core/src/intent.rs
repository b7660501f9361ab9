//! What is asked of a virtual machine, resolved: names of rows, numbers, durations.

use std::time::Duration;

use bascule_crds::{DrainPolicy, FailurePolicy, RunPolicy};
use bascule_types::{Bytes, DiskRole, RowName, VmUid};

use crate::Moment;

/// A virtual machine as its author wants it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VmIntent {
    /// Its UID.
    pub uid: VmUid,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// `<namespace>/<name>` on the volume.
    pub row: RowName,
    /// The SharedVolume that it lives on.
    pub volume: String,
    /// Whether it should run.
    pub run: RunPolicy,
    /// Since when it is being deleted.
    pub deleting_since: Option<Moment>,
    /// Whether our finalizer is on it.
    pub finalizer: bool,
    /// The digest of what a guest is started with.
    pub digest: SpecDigest,
    /// Its disks, kernel and initrd.
    pub disks: Vec<DiskIntent>,
    /// What happens on a drain.
    pub on_drain: DrainPolicy,
    /// What happens when the node is lost.
    pub on_failure: FailurePolicy,
    /// Limits of moves.
    pub budgets: Budgets,
    /// How often it is started again.
    pub restart: RestartBudget,
}

/// SHA-256 of the part of a spec that a guest is started with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SpecDigest(pub [u8; 32]);

/// A disk that the virtual machine should have on its volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskIntent {
    /// Its name in the spec.
    pub name: String,
    /// The name of its row.
    pub row: RowName,
    /// What lies on it.
    pub role: DiskRole,
    /// How it comes to be.
    pub origin: Origin,
    /// Whether it goes when the virtual machine goes.
    pub delete_with_vm: bool,
}

impl DiskIntent {
    /// The field of the document that asks for it, for messages.
    #[must_use]
    pub fn field(&self) -> String {
        match (self.role, &self.origin) {
            (DiskRole::Kernel, _) => "spec.boot.kernel".to_owned(),
            (DiskRole::Initrd, _) => "spec.boot.initrd".to_owned(),
            (DiskRole::Data, Origin::Existing) => {
                format!("spec.disks[{}].existing.name", self.name)
            }
            (DiskRole::Data, _) => format!("spec.disks[{}]", self.name),
        }
    }
}

/// How a disk comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// New and empty.
    Blank {
        /// Its size.
        size: Bytes,
    },
    /// New, from an image.
    Image {
        /// Its size.
        size: Bytes,
        /// The image.
        source: ImageSource,
    },
    /// A kept disk, which has the row's name.
    Existing,
}

/// Where an image comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ImageSource {
    /// By HTTP.
    Http {
        /// Where.
        url: String,
        /// Its hash, 64 hexadecimal digits.
        sha256: String,
    },
    /// From the administrator's allow-list.
    HostFile {
        /// Its name there.
        name: String,
    },
}

/// How long moves may take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// The blackout of a live migration.
    pub downtime: Duration,
    /// A live migration.
    pub live: Duration,
    /// A quick migration.
    pub quick: Duration,
    /// A shutdown.
    pub shutdown: Duration,
    /// Bytes a second.
    pub bandwidth: Option<u64>,
}

/// How often a guest that ends by itself is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartBudget {
    /// At most this often...
    pub attempts_max: usize,
    /// ...in this window.
    pub window: Duration,
    /// The wait before the second restart in a window; doubles with each further one.
    pub backoff: Duration,
}

impl RestartBudget {
    /// When the next restart may be, given the earlier ones; none while the budget is used up.
    #[must_use]
    pub fn next(&self, restarts: &[Moment], now: Moment) -> Option<Moment> {
        let recent = self.recent(restarts, now);
        let Some(last) = recent.last() else {
            return (self.attempts_max > 0).then_some(now);
        };
        if recent.len() >= self.attempts_max {
            return None;
        }
        // 16 doublings are more than any window.
        let doublings = u32::try_from(recent.len() - 1).unwrap_or(u32::MAX).min(16);
        Some(last.after(self.backoff.saturating_mul(1 << doublings)))
    }

    /// The restarts that still count, oldest first.
    #[must_use]
    pub fn recent(&self, restarts: &[Moment], now: Moment) -> Vec<Moment> {
        let mut recent: Vec<Moment> = restarts
            .iter()
            .copied()
            .filter(|at| now.since(*at) < self.window)
            .collect();
        recent.sort_unstable();
        recent
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BUDGET: RestartBudget = RestartBudget {
        attempts_max: 3,
        window: Duration::from_secs(600),
        backoff: Duration::from_secs(10),
    };

    #[test]
    fn the_first_restart_is_at_once_and_the_wait_then_doubles() {
        let now = Moment(1_000_000);
        assert_eq!(BUDGET.next(&[], now), Some(now));
        assert_eq!(
            BUDGET.next(&[now], now),
            Some(now.after(Duration::from_secs(10)))
        );
        let second = now.after(Duration::from_secs(10));
        assert_eq!(
            BUDGET.next(&[now, second], second),
            Some(second.after(Duration::from_secs(20)))
        );
    }

    #[test]
    fn a_used_up_budget_comes_back_when_the_window_has_passed() {
        let now = Moment(1_000_000);
        let restarts = [now, now, now];
        assert_eq!(BUDGET.next(&restarts, now), None);
        let later = now.after(Duration::from_secs(600));
        assert_eq!(BUDGET.next(&restarts, later), Some(later));
    }

    #[test]
    fn a_budget_of_zero_never_restarts() {
        let none = RestartBudget {
            attempts_max: 0,
            ..BUDGET
        };
        assert_eq!(none.next(&[], Moment(5)), None);
    }
}
