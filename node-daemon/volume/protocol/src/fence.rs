//! The proof that a failed owner will not write again.
//!
//! # States
//! ```text
//!                        ┌─ fencing Watchdog; hardware watchdog (or an allowed software one);
//!   victim, evidence ────┤  no heartbeat for the safe time of its own record ───► SafeTimeElapsed
//!                        └─ anything else ──────────────────────────────────────► MissingProof
//! ```
//!
//! The coordinator verifies this proof from its own reads; the operator's opinion about a node is
//! not evidence. The other ways to move a VM need no reads: a clean release leaves the VM without
//! owner, and a manual fencing confirmation is a journaled change, bound to one slot and
//! generation. Every proof is journaled before the VM gets a new owner.

use std::time::Duration;

use bascule_types::{FenceProof, MissingProof};
use bascule_volume_format::{Fencing, FencingPolicy, Timings, WatchdogKind};

use crate::watcher::{Evidence, HeartbeatSeen, Standing, whole_ms};
use bascule_volume_format::{Rules, broken};

/// A volume's fencing mode and policy, from its superblock.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FencePolicy {
    /// The mode. [`Fencing::PersistentReservation`] is not implemented and proves nothing.
    pub mode: Fencing,
    /// Further proofs that the administrator allowed.
    pub allowed: FencingPolicy,
    /// All rules, except in a test that breaks one.
    pub rules: Rules,
}

/// The proof that `evidence.victim` will not write again, to be journaled before a VM of the victim
/// gets a new owner.
///
/// # Errors
/// What is missing for a proof.
pub fn verify(policy: FencePolicy, evidence: &Evidence) -> Result<FenceProof, MissingProof> {
    let watchdog_mode =
        policy.mode == Fencing::Watchdog || broken!(policy.rules, LeaseOnlyWithoutConfirmation);
    if !watchdog_mode {
        return Err(MissingProof::AdminConfirmation);
    }
    let Some(record) = evidence.record else {
        // The slot has no record: whether the node has a watchdog is unknown.
        return Err(MissingProof::AdminConfirmation);
    };
    if evidence.standing == Standing::Unknown {
        return Err(MissingProof::Alive);
    }
    if !watchdog_counts(policy, record) {
        return Err(MissingProof::NoWatchdog);
    }
    let required = safe_time(policy.rules, &record.timings);
    let watched = evidence.unchanged_for;
    if watched >= required {
        Ok(FenceProof::SafeTimeElapsed {
            watched_ms: whole_ms(watched),
            required_ms: whole_ms(required),
        })
    } else if watched < record.timings.lease {
        Err(MissingProof::Alive)
    } else {
        Err(MissingProof::SafeTime {
            watched_ms: whole_ms(watched),
            required_ms: whole_ms(required),
        })
    }
}

fn watchdog_counts(policy: FencePolicy, record: HeartbeatSeen) -> bool {
    match record.watchdog {
        WatchdogKind::Hardware => true,
        WatchdogKind::Software => {
            policy.allowed.software_watchdog || broken!(policy.rules, SoftwareWatchdogCounts)
        }
        WatchdogKind::None => broken!(policy.rules, LeaseOnlyWithoutConfirmation),
    }
}

/// The safe time by the victim's own record.
fn safe_time(rules: Rules, timings: &Timings) -> Duration {
    if broken!(rules, TakeOverWithoutFence) {
        return timings.watch;
    }
    if broken!(rules, SafeTimeWithoutSettle) {
        return timings.watch + timings.watchdog;
    }
    timings.safe_time()
}

#[cfg(test)]
mod tests;
