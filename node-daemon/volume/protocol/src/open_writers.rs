//! The processes of this node that may have outstanding writes on one volume.
//!
//! Decides when the watchdog may stop watching the volume's lease, and what a VM's next writer waits
//! for.
//!
//! # States
//! ```text
//!            Opened            Closed
//!   absent ─────────► Open ──────────────────────────► absent
//!                      │ Died                            ▲
//!                      └──────► Completing ── Completed ─┘
//!
//!   any but absent ── Failed ──► Unclean        for as long as the node is not reset
//! ```
//!
//! A submitted write ends only by success, by the reset of its initiator plus the settle time, or by
//! the abort of an enforced reservation. The end of its process ends no write: it is `Completing`
//! until the kernel has proved that no request of the process is left. An error ends no write either:
//! a writer with a failed write is `Unclean`, and nothing that it does later changes that.

use std::collections::BTreeMap;

use bascule_types::{VmUid, WriterState};

use bascule_volume_format::{Rules, broken};

/// A process that writes for a VM: a `bascule-vm`, or one of several importers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct WriterId {
    /// The VM.
    pub vm: VmUid,
    /// The process.
    pub pid: u32,
    /// When it started, in clock ticks after boot: tells it from a later one with the same id.
    pub started: u64,
}

/// The writers of one volume on this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Writers {
    rules: Rules,
    writers: BTreeMap<WriterId, Phase>,
}

/// How it is with a writer that has not closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Its process lives.
    Open,
    /// Its process has ended without closing; its writes may still be under way.
    Completing,
    /// One of its writes failed, and may land at any later time.
    Unclean,
}

/// An input of the set of writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriterEvent {
    /// A process opens the device. Enlist the volume with the watchdog first.
    Opened,
    /// The process closed its gate, and every write that it submitted has completed.
    Closed,
    /// The process ended without closing.
    Died,
    /// The kernel has no request of the dead process left.
    Completed,
    /// A write or flush failed, or its outcome is unknown.
    Failed,
}

impl Writers {
    /// No writers.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            writers: BTreeMap::new(),
        }
    }

    /// The next state. An event that a writer's phase does not admit changes nothing.
    #[must_use]
    pub fn next(mut self, writer: WriterId, event: WriterEvent) -> Self {
        let early = broken!(self.rules, WithdrawBeforeDrain);
        let phase = self.writers.get(&writer).copied();
        let after = match (phase, event) {
            (None, WriterEvent::Opened) => Some(Phase::Open),
            (Some(Phase::Open), WriterEvent::Closed) => None,
            (Some(Phase::Open), WriterEvent::Died) if early => None,
            (Some(Phase::Open), WriterEvent::Died) => Some(Phase::Completing),
            (Some(Phase::Completing), WriterEvent::Completed) => None,
            (Some(_), WriterEvent::Failed) => Some(Phase::Unclean),
            (phase, _) => phase,
        };
        match after {
            Some(phase) => self.writers.insert(writer, phase),
            None => self.writers.remove(&writer),
        };
        self
    }

    /// The phase of a writer; none when every write that it submitted has ended.
    #[must_use]
    pub fn phase(&self, writer: WriterId) -> Option<Phase> {
        self.writers.get(&writer).copied()
    }

    /// Every writer that has not closed.
    pub fn iter(&self) -> impl Iterator<Item = (WriterId, Phase)> + '_ {
        self.writers.iter().map(|(writer, phase)| (*writer, *phase))
    }

    /// The writers of one VM.
    pub fn of(&self, vm: VmUid) -> impl Iterator<Item = (WriterId, Phase)> + '_ {
        self.iter().filter(move |(writer, _)| writer.vm == vm)
    }

    /// Whether a writer in this phase has nothing in flight and nothing that failed, if its page shows that
    /// it is `idle` and its writes in this `state`. True of a living writer only while its gate is closed for certain.
    #[must_use]
    pub fn is_quiet(&self, phase: Phase, idle: bool, state: WriterState) -> bool {
        if broken!(self.rules, UncleanCountsAsDrained) {
            return idle && phase != Phase::Completing;
        }
        phase == Phase::Open && idle && state == WriterState::Clean
    }

    /// Whether this volume must be enlisted with the watchdog.
    #[must_use]
    pub fn must_be_watched(&self) -> bool {
        !self.writers.is_empty()
    }

    /// Whether this VM may be released: every writer closed the gate and every write has completed.
    #[must_use]
    pub fn is_drained(&self, vm: VmUid) -> bool {
        self.of(vm).next().is_none()
    }

    /// What `writer` must wait for before it may open: the earlier writers of its VM whose writes are
    /// not proved complete. A write of theirs that landed after one of `writer` would undo it. A
    /// living process counts too, unless `shared`: the VM's disks are being filled, each by one of
    /// several importers.
    #[must_use]
    pub fn before(&self, writer: WriterId, shared: bool) -> Option<(WriterId, Phase)> {
        self.of(writer.vm)
            .find(|(other, phase)| *other != writer && !(shared && *phase == Phase::Open))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmUid = VmUid::from_bytes([1; 16]);
    const FIRST: WriterId = writer(1, 7);
    const NEXT: WriterId = writer(1, 8);
    const OTHER: WriterId = writer(2, 9);

    const fn writer(vm: u8, pid: u32) -> WriterId {
        WriterId {
            vm: VmUid::from_bytes([vm; 16]),
            pid,
            started: 100,
        }
    }

    fn after(events: &[WriterEvent]) -> Writers {
        let open = Writers::new(Rules::ENFORCED).next(FIRST, WriterEvent::Opened);
        let next = |writers: Writers, event: &WriterEvent| writers.next(FIRST, *event);
        events.iter().fold(open, next)
    }

    #[test]
    fn a_volume_is_watched_from_the_first_writer_until_the_last_has_closed() {
        let two = after(&[]).next(OTHER, WriterEvent::Opened);
        assert!(!Writers::new(Rules::ENFORCED).must_be_watched());
        let one = two.next(FIRST, WriterEvent::Closed);
        assert!(one.must_be_watched() && one.is_drained(VM) && !one.is_drained(OTHER.vm));
        assert!(!one.next(OTHER, WriterEvent::Closed).must_be_watched());
    }

    #[test]
    fn i1_a_killed_writer_keeps_the_volume_watched_until_its_writes_are_complete() {
        let killed = after(&[WriterEvent::Died]);
        assert!(killed.must_be_watched() && !killed.is_drained(VM));
        // A dead process closes nothing.
        assert_eq!(killed.clone().next(FIRST, WriterEvent::Closed), killed);
        assert!(!killed.next(FIRST, WriterEvent::Completed).must_be_watched());
    }

    #[test]
    fn i1_nothing_makes_a_writer_clean_after_a_failed_write() {
        use WriterEvent::{Closed, Completed, Died, Failed, Opened};
        for events in [[Failed, Died], [Died, Failed], [Failed, Closed]] {
            let mut unclean = after(&events);
            for event in [Opened, Closed, Died, Completed] {
                unclean = unclean.next(FIRST, event);
                assert_eq!(unclean.phase(FIRST), Some(Phase::Unclean), "{event:?}");
            }
            assert!(unclean.must_be_watched() && !unclean.is_drained(VM));
        }
        // What has ended does not fail any more.
        assert_eq!(after(&[Closed, Failed]).phase(FIRST), None);
    }

    #[test]
    fn a_completed_event_does_not_close_an_open_writer() {
        assert!(after(&[WriterEvent::Completed]).must_be_watched());
    }

    #[test]
    fn i1_a_writer_waits_for_every_earlier_one_of_its_vm() {
        let living = after(&[]);
        assert_eq!(living.before(FIRST, false), None, "opens again");
        assert_eq!(living.before(NEXT, false), Some((FIRST, Phase::Open)));
        assert_eq!(living.before(NEXT, true), None, "another importer");
        assert_eq!(living.before(OTHER, false), None, "another VM");
        for (event, phase) in [
            (WriterEvent::Died, Phase::Completing),
            (WriterEvent::Failed, Phase::Unclean),
        ] {
            for shared in [false, true] {
                let before = after(&[event]).before(NEXT, shared);
                assert_eq!(before, Some((FIRST, phase)));
            }
        }
        let over = after(&[WriterEvent::Died, WriterEvent::Completed]);
        assert_eq!(over.before(NEXT, false), None);
    }
}
