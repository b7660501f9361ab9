//! The operator's clock: wall-clock time in milliseconds, the resolution of Kubernetes timestamps and
//! better. Only intervals on this one clock are ever compared.

use bascule_operator_core::Moment;
use jiff::Timestamp;

/// The present, for a plan.
pub(crate) fn now() -> Moment {
    moment(&Timestamp::now())
}

/// A Kubernetes timestamp as the planner's [`Moment`]; times before 1970 become 0.
pub(crate) fn moment(at: &Timestamp) -> Moment {
    Moment(u64::try_from(at.as_millisecond()).unwrap_or(0))
}
