//! The processes of this node that may have outstanding writes on one volume: decides when the
//! watchdog may stop watching the volume's lease.
//!
//! # States
//! ```text
//!             Opened                 Closed{drained: true}
//!   absent ──────────► Open ─────────────────────────────────► absent
//!                       │
//!                       └──Closed{drained: false}──► Unclean ──Settled──► absent
//! ```
//!
//! A writer that was killed, or one of whose writes timed out, is not drained: its writes may still
//! land. It counts as settled only once none of its writes is in flight, by the kernel's own count
//! or after a reboot.

use std::collections::BTreeMap;

use bascule_types::VmUid;

use crate::rules::{Rules, broken};

/// The writers of one volume on this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Writers {
    rules: Rules,
    writers: BTreeMap<VmUid, Writer>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Writer {
    Open,
    Unclean,
}

/// An input of the set of writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum WriterEvent {
    /// A process opens the device for this VM. Enlist the volume with the watchdog first.
    Opened(VmUid),
    /// The process closed its gate or ended.
    Closed {
        /// The process's VM.
        vm: VmUid,
        /// Whether every write that it submitted has completed.
        drained: bool,
    },
    /// No write of this VM's unclean writer is in flight any more.
    Settled(VmUid),
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

    /// The state after `event`.
    #[must_use]
    pub fn next(mut self, event: WriterEvent) -> Self {
        match event {
            WriterEvent::Opened(vm) => {
                self.writers.insert(vm, Writer::Open);
            }
            WriterEvent::Closed { vm, drained } => {
                if drained || broken!(self.rules, WithdrawBeforeDrain) {
                    self.writers.remove(&vm);
                } else if let Some(writer) = self.writers.get_mut(&vm) {
                    *writer = Writer::Unclean;
                }
            }
            WriterEvent::Settled(vm) => {
                if self.writers.get(&vm) == Some(&Writer::Unclean) {
                    self.writers.remove(&vm);
                }
            }
        }
        self
    }

    /// Whether this volume must be enlisted with the watchdog.
    #[must_use]
    pub fn must_be_watched(&self) -> bool {
        !self.writers.is_empty()
    }

    /// Whether this VM may be released: its writer closed the gate and every write has completed.
    #[must_use]
    pub fn is_drained(&self, vm: VmUid) -> bool {
        !self.writers.contains_key(&vm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: VmUid = VmUid::from_bytes([1; 16]);

    fn closed(drained: bool) -> Writers {
        Writers::new(Rules::ENFORCED)
            .next(WriterEvent::Opened(VM))
            .next(WriterEvent::Closed { vm: VM, drained })
    }

    #[test]
    fn a_volume_is_watched_from_the_first_writer_until_the_last_has_drained() {
        let other = VmUid::from_bytes([2; 16]);
        let two = Writers::new(Rules::ENFORCED)
            .next(WriterEvent::Opened(VM))
            .next(WriterEvent::Opened(other));
        assert!(!Writers::new(Rules::ENFORCED).must_be_watched());
        let drained = true;
        let one = two.next(WriterEvent::Closed { vm: VM, drained });
        assert!(one.must_be_watched() && one.is_drained(VM) && !one.is_drained(other));
        let none = one.next(WriterEvent::Closed { vm: other, drained });
        assert!(!none.must_be_watched());
    }

    #[test]
    fn i1_a_killed_writer_keeps_the_volume_watched_until_its_writes_are_settled() {
        let killed = closed(false);
        assert!(killed.must_be_watched() && !killed.is_drained(VM));
        assert!(!killed.next(WriterEvent::Settled(VM)).must_be_watched());
        assert!(!closed(true).must_be_watched());
    }

    #[test]
    fn a_settled_event_does_not_close_an_open_writer() {
        let open = Writers::new(Rules::ENFORCED).next(WriterEvent::Opened(VM));
        assert!(open.next(WriterEvent::Settled(VM)).must_be_watched());
    }
}
