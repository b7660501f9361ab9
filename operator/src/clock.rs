//! The operator's clock: wall-clock time in milliseconds, because plans compare it with timestamps of the
//! API server. No safety rule depends on it: leases and fence proofs are judged on the volumes.

use bascule_operator_core::Moment;
use jiff::Timestamp;

pub(crate) fn now() -> Moment {
    moment(&Timestamp::now())
}

/// A Kubernetes timestamp as the planner's [`Moment`]; times before 1970 become 0.
pub(crate) fn moment(at: &Timestamp) -> Moment {
    Moment(u64::try_from(at.as_millisecond()).unwrap_or(0))
}
