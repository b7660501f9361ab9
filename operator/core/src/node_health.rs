//! Whether a node is healthy, per volume, from independent signals.

use crate::{Fact, Stream};

/// The health of a node as far as one volume is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodeHealth {
    /// The daemon responds, and the heartbeat continues or is not known.
    Healthy,
    /// The daemon responds and the heartbeat has stopped: the guests' disk writes stall.
    StorageLost,
    /// The heartbeat continues and the daemon does not respond: the guests run.
    Isolated,
    /// Neither is seen. A takeover needs a fence proof in addition.
    Suspect,
    /// One of the signals is not known.
    Undetermined,
}

/// Combines the two signals. The kubelet's Node condition is shown and has no influence: guests do not
/// need a kubelet.
#[must_use]
pub const fn node_health(stream: Stream, heartbeat: &Fact<bool>) -> NodeHealth {
    match (stream, heartbeat) {
        (Stream::Up, Fact::Known(false)) => NodeHealth::StorageLost,
        (Stream::Up, _) => NodeHealth::Healthy,
        (Stream::Down { .. }, Fact::Known(true)) => NodeHealth::Isolated,
        (Stream::Down { .. }, Fact::Known(false)) => NodeHealth::Suspect,
        (Stream::Down { .. } | Stream::Unknown, _) => NodeHealth::Undetermined,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Moment;

    #[test]
    fn only_a_node_without_reports_and_heartbeat_is_suspect() {
        let down = Stream::Down { since: Moment(0) };
        for (stream, heartbeat, expected) in [
            (Stream::Up, Fact::Known(true), NodeHealth::Healthy),
            (Stream::Up, Fact::Known(false), NodeHealth::StorageLost),
            (Stream::Up, Fact::Unknown, NodeHealth::Healthy),
            (down, Fact::Known(true), NodeHealth::Isolated),
            (down, Fact::Known(false), NodeHealth::Suspect),
            (down, Fact::Unknown, NodeHealth::Undetermined),
            (down, Fact::Absent, NodeHealth::Undetermined),
            (
                Stream::Unknown,
                Fact::Known(false),
                NodeHealth::Undetermined,
            ),
            (Stream::Unknown, Fact::Known(true), NodeHealth::Undetermined),
        ] {
            assert_eq!(
                node_health(stream, &heartbeat),
                expected,
                "{stream:?} {heartbeat:?}"
            );
        }
    }
}
