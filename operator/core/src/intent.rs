//! What is asked of a virtual machine, resolved: names of rows, numbers, durations.

use std::fmt;
use std::time::Duration;

use bascule_crds::{DrainPolicy, FailurePolicy, OnError, RunPolicy};
use bascule_types::{Bytes, DiskRole, ImageDigest, RedactedUrl, RowName, SecretKey, VmUid};

use crate::Moment;

/// A VirtualMachine's spec, resolved to names on the volume, numbers and durations.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct VmIntent {
    pub uid: VmUid,
    pub namespace: String,
    pub name: String,
    /// `<namespace>/<name>` on the volume.
    pub row: RowName,
    /// The home volume's name.
    pub volume: String,
    pub run: RunPolicy,
    /// The deletion timestamp.
    pub deleting_since: Option<Moment>,
    pub finalizer: bool,
    pub digest: SpecDigest,
    /// Disks, kernel and initrd.
    pub disks: Vec<DiskIntent>,
    pub on_drain: DrainPolicy,
    pub on_failure: FailurePolicy,
    pub budgets: Budgets,
    pub restart: RestartBudget,
}

/// SHA-256 of the part of a spec that a guest is started with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct SpecDigest(pub [u8; 32]);

/// A disk that the VM must have on its home volume.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct DiskIntent {
    pub name: String,
    /// `<namespace>/<disk>` on the volume.
    pub row: RowName,
    pub role: DiskRole,
    pub origin: Origin,
    /// Whether the disk is deleted with the VM; otherwise it becomes a kept disk.
    pub delete_with_vm: bool,
    /// What a failed read or write does.
    pub on_error: OnError,
}

impl DiskIntent {
    /// The path of the field that declares this disk, for messages.
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

    /// The path of the field with the source of a disk that is filled from an image.
    #[must_use]
    pub fn source_field(&self) -> String {
        let field = self.field();
        match self.role {
            DiskRole::Data => format!("{field}.source"),
            // The field of a boot image is its source.
            DiskRole::Kernel | DiskRole::Initrd => field,
        }
    }
}

/// How a disk comes to be.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Origin {
    /// New and empty.
    Blank { size: Bytes },
    /// New, filled from an image.
    Image { size: Bytes, source: ImageSource },
    /// A kept disk of that name.
    Existing,
}

/// Where an image comes from.
#[derive(Clone, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum ImageSource {
    /// By HTTP.
    Http {
        url: String,
        /// The hash that it must have.
        digest: ImageDigest,
        /// Certificate authorities to trust beside the node's, in PEM.
        ca_bundle: Option<String>,
        /// The Secret with the value of the header Authorization, if the server wants one.
        authorization_from: Option<SecretKey>,
    },
    /// From the administrator's allow-list.
    HostFile { name: String },
}

impl ImageSource {
    /// Whether a Secret has to be read before the image can be fetched.
    #[must_use]
    pub const fn needs_secret(&self) -> bool {
        matches!(
            self,
            Self::Http {
                authorization_from: Some(_),
                ..
            }
        )
    }
}

/// Without user, password and query of a URL: actions are logged.
impl fmt::Debug for ImageSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Http { url, .. } => write!(f, "Http({})", RedactedUrl(url)),
            Self::HostFile { name } => write!(f, "HostFile({name})"),
        }
    }
}

/// Limits of migrations and of a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Budgets {
    /// Maximum blackout of a live migration.
    pub downtime: Duration,
    /// Time limit of a live migration.
    pub live: Duration,
    /// Time limit of a quick migration.
    pub quick: Duration,
    /// Time that a guest has to shut down before it is forced off.
    pub shutdown: Duration,
    /// Bandwidth limit in bytes per second.
    pub bandwidth: Option<u64>,
}

/// How often a guest that ends by itself is started again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct RestartBudget {
    /// Maximum number of restarts within `window`.
    pub attempts_max: usize,
    pub window: Duration,
    /// The wait before the second restart in a window; doubles with each further one.
    pub backoff: Duration,
}

impl RestartBudget {
    /// The earliest time of the next restart, given the earlier ones; none while the budget is used up.
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

    /// The restarts within the window, oldest first.
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
