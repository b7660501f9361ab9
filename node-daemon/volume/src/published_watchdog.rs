//! What the newest heartbeat record of this node may say about its watchdog. Other nodes read the
//! record, not the memory of this process: while it may name a watchdog, no writer may open that none
//! watches.

use bascule_volume_format::WatchdogKind;

/// Whether the newest record that others may read can name a watchdog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PublishedWatchdog {
    may_name_one: bool,
}

impl PublishedWatchdog {
    /// Nothing is known: an earlier process of this node may have published a watchdog.
    pub const UNKNOWN: Self = Self { may_name_one: true };

    /// A record with this kind is about to be submitted: it may land, whatever is answered.
    #[must_use]
    pub fn submitted(self, kind: WatchdogKind) -> Self {
        Self {
            may_name_one: self.may_name_one || kind != WatchdogKind::None,
        }
    }

    /// A record with this kind is durable, and newer than all before.
    #[must_use]
    pub fn durable(kind: WatchdogKind) -> Self {
        Self {
            may_name_one: kind != WatchdogKind::None,
        }
    }

    /// Whether other nodes may count on a watchdog of this node.
    #[must_use]
    pub fn may_name_one(self) -> bool {
        self.may_name_one
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn i1_only_a_durable_record_without_a_watchdog_takes_back_what_was_published() {
        let (none, hardware) = (WatchdogKind::None, WatchdogKind::Hardware);
        let unknown = PublishedWatchdog::UNKNOWN;
        assert!(unknown.may_name_one());
        assert!(unknown.submitted(none).may_name_one(), "it may be lost");
        let taken_back = PublishedWatchdog::durable(none);
        assert!(!taken_back.may_name_one());
        assert!(!taken_back.submitted(none).may_name_one());
        assert!(taken_back.submitted(hardware).may_name_one(), "it may land");
        assert!(PublishedWatchdog::durable(hardware).may_name_one());
    }
}
