//! The watcher's side of all leases: what this node's own reads of the heartbeat slots prove about
//! the other nodes. (sanlock: host id monitoring.)
//!
//! # States
//! ```text
//!   per slot:            value differs (any field, also a step back)
//!              ┌───────────────────────────────────────────────┐
//!              ▼                                               │
//!   read ──► Shown{since = completion of the read} ──read issued at i, same value──► no heartbeat
//!                                                                                    for i − since
//! ```
//!
//! # Rules
//! - **R4** The interval starts at the *completion* of the read that first showed the value: the
//!   value may have been written at any moment before.
//! - **R5** The interval ends at the *issue* of the last read that still showed the value: a later
//!   write was not seen.
//! - A generation that the journal names counts as a value of its own from the moment when this
//!   node learned of it until a record of it is seen.
//! - W, the watchdog time and the settle time are those of the victim's own record, or of a newer
//!   generation's record in the same slot: both generations are the same node, and a reset ends
//!   both.
//!
//! Only this node's clock is used. [`crate::fence`] decides what the evidence proves.

use std::collections::BTreeMap;
use std::time::Duration;

use bascule_types::{BootTime, Generation, MissingProof, NodeUid, Owner, SlotId};
use bascule_volume_format::{HeartbeatRecord, Timings, WatchdogKind};

use bascule_volume_format::{Rules, broken};

/// The observations of every heartbeat slot by this node.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Watcher {
    rules: Rules,
    slots: BTreeMap<SlotId, Watch>,
}

/// The part of a heartbeat record that a watcher compares and uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct HeartbeatSeen {
    /// The node that wrote the record.
    pub node: NodeUid,
    /// The slot and generation of the record.
    pub owner: Owner,
    /// Rises with each renewal.
    pub sequence: u64,
    /// What resets the node if it cannot renew its lease.
    pub watchdog: WatchdogKind,
    /// Whether the node has detached.
    pub detached: bool,
    /// The times by which the node's lease and watchdog work.
    pub timings: Timings,
}

/// An input of the watcher.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum WatchEvent {
    /// All slots were read.
    Read {
        /// The boot time before the first read was issued.
        issued_at: BootTime,
        /// The boot time after the last read completed.
        completed_at: BootTime,
        /// For each assigned slot the newest record by (generation, sequence), if one can be parsed.
        slots: Vec<(SlotId, Option<HeartbeatSeen>)>,
    },
    /// This node learned, by granting it or from the journal, that a slot is in this generation.
    Granted {
        now: BootTime,
        /// The slot and its generation.
        owner: Owner,
    },
}

/// The relation of a victim's generation to its slot's newest one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Standing {
    /// The slot shows a record of this generation.
    Shown,
    /// The generation was granted and no record of it was ever seen.
    GrantedOnly,
    /// The slot is in a newer generation.
    Superseded,
    /// The slot was not read yet, or is in an older generation.
    Unknown,
}

/// What this node's own reads prove about one slot and generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Evidence {
    /// The slot and generation in question.
    pub victim: Owner,
    /// Whether `victim` is the slot's present generation.
    pub standing: Standing,
    /// The slot's newest record: of the generation before when `standing` is
    /// [`Standing::GrantedOnly`], of a later one when it is [`Standing::Superseded`].
    pub record: Option<HeartbeatSeen>,
    /// How long the slot has shown no new heartbeat, by R4 and R5.
    pub unchanged_for: Duration,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Watch {
    shown: Option<HeartbeatSeen>,
    granted: Option<Generation>,
    since: BootTime,
    /// The issue of the last read that showed the same.
    confirmed: Option<BootTime>,
}

impl Watcher {
    /// A watcher without observations.
    #[must_use]
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            slots: BTreeMap::new(),
        }
    }

    /// The state after `event`.
    #[must_use]
    pub fn next(mut self, event: WatchEvent) -> Self {
        match event {
            WatchEvent::Read {
                issued_at,
                completed_at,
                slots,
            } => {
                for (slot, record) in slots {
                    self.saw(slot, record, issued_at, completed_at);
                }
            }
            WatchEvent::Granted { now, owner } => self.learned(owner, now),
        }
        self
    }

    fn saw(
        &mut self,
        slot: SlotId,
        record: Option<HeartbeatSeen>,
        issued_at: BootTime,
        completed_at: BootTime,
    ) {
        let since = if broken!(self.rules, IntervalFromIssue) {
            issued_at
        } else {
            completed_at
        };
        let seen_until = if broken!(self.rules, ConfirmedAtCompletion) {
            completed_at
        } else {
            issued_at
        };
        let fresh = Watch {
            shown: record,
            granted: None,
            since,
            confirmed: None,
        };
        let watch = self.slots.entry(slot).or_insert(fresh);
        if watch.shown == record {
            watch.confirmed = watch.confirmed.max(Some(seen_until));
        } else {
            let granted = watch.granted;
            *watch = Watch { granted, ..fresh };
        }
    }

    fn learned(&mut self, owner: Owner, now: BootTime) {
        let watch = self.slots.entry(owner.slot).or_insert(Watch {
            shown: None,
            granted: None,
            since: now,
            confirmed: None,
        });
        let shown = watch.shown.map(|record| record.owner.generation);
        let known = shown.max(watch.granted);
        if Some(owner.generation) > known {
            watch.granted = Some(owner.generation);
            watch.since = watch.since.max(now);
            watch.confirmed = None;
        }
    }

    /// The evidence about `victim`.
    #[must_use]
    pub fn evidence(&self, victim: Owner) -> Evidence {
        let unknown = Evidence {
            victim,
            standing: Standing::Unknown,
            record: None,
            unchanged_for: Duration::ZERO,
        };
        let Some(watch) = self.slots.get(&victim.slot) else {
            return unknown;
        };
        let shown = watch.shown.map(|record| record.owner.generation);
        let standing = match shown.max(watch.granted) {
            Some(present) if present > victim.generation => Standing::Superseded,
            Some(present) if present < victim.generation => Standing::Unknown,
            Some(_) if shown == Some(victim.generation) => Standing::Shown,
            Some(_) => Standing::GrantedOnly,
            None => Standing::Unknown,
        };
        let unchanged_for = match standing {
            Standing::Unknown => Duration::ZERO,
            Standing::Shown | Standing::GrantedOnly | Standing::Superseded => watch.unchanged_for(),
        };
        Evidence {
            standing,
            record: watch.shown,
            unchanged_for,
            ..unknown
        }
    }

    /// Whether `owner`'s heartbeat rose within its W: sufficient to make it the owner of a VM. If its
    /// lease has lapsed nevertheless, its own gate stays closed.
    #[must_use]
    pub fn is_alive(&self, owner: Owner, now: BootTime) -> bool {
        self.slots.get(&owner.slot).is_some_and(|watch| {
            watch.shown.is_some_and(|record| {
                record.owner == owner
                    && !record.detached
                    && watch.granted.is_none_or(|g| g <= owner.generation)
                    && now.since(watch.since) < record.timings.watch
            })
        })
    }

    /// Whether `owner` may still hold its lease, as far as this node's reads show: no more than its L has
    /// passed since its newest heartbeat was first seen, or no read was issued near the end of that L.
    /// Nothing that is safe only after the lease may follow from `false`: it makes no allowance for a
    /// difference of the clocks, nor for a renewal since the last read. W does both.
    #[must_use]
    pub fn may_hold_lease(&self, owner: Owner, now: BootTime) -> bool {
        self.is_alive(owner, now)
            && self.slots.get(&owner.slot).is_some_and(|watch| {
                let Some(Timings { lease, poll, .. }) = watch.shown.map(|record| record.timings)
                else {
                    return false;
                };
                let looked = watch.unchanged_for() + poll >= lease;
                now.since(watch.since) < lease || !looked
            })
    }

    /// Whether the lease of `victim` has certainly ended. `watch` is the volume's W, for a slot that shows no
    /// record; `now` does not matter: what was not looked at is not over.
    ///
    /// # Errors
    /// [`MissingProof::Alive`] or [`MissingProof::SafeTime`].
    pub fn check_lease_over(
        &self,
        victim: Owner,
        watch: Duration,
        now: BootTime,
    ) -> Result<(), MissingProof> {
        if broken!(self.rules, UnseenCountsAsOver) && !self.is_alive(victim, now) {
            return Ok(());
        }
        self.evidence(victim).check_lease_over(watch)
    }

    /// The newest record of every slot that shows one.
    pub fn records(&self) -> impl Iterator<Item = &HeartbeatSeen> {
        self.slots.values().filter_map(|watch| watch.shown.as_ref())
    }
}

impl Watch {
    /// How long the slot has shown the same, by R4 and R5.
    fn unchanged_for(&self) -> Duration {
        self.confirmed
            .map_or(Duration::ZERO, |confirmed| confirmed.since(self.since))
    }
}

impl Evidence {
    /// Whether the victim's lease has certainly ended: no further write passes its gate. A process that
    /// was frozen after its check may still submit one write.
    #[must_use]
    pub fn lease_is_over(&self) -> bool {
        self.record
            .is_some_and(|record| self.check_lease_over(record.timings.watch).is_ok())
    }

    /// The same with what is missing. `watch` is the volume's W, for a slot that shows no record.
    ///
    /// # Errors
    /// [`MissingProof::Alive`] or [`MissingProof::SafeTime`].
    pub fn check_lease_over(&self, watch: Duration) -> Result<(), MissingProof> {
        let timings = self.record.map(|record| record.timings);
        let required = timings.map_or(watch, |timings| timings.watch);
        let lease = timings.map_or(Duration::ZERO, |timings| timings.lease);
        match self.standing {
            Standing::Unknown => Err(MissingProof::Alive),
            _ if self.unchanged_for >= required => Ok(()),
            _ if self.unchanged_for < lease => Err(MissingProof::Alive),
            _ => Err(MissingProof::SafeTime {
                watched_ms: whole_ms(self.unchanged_for),
                required_ms: whole_ms(required),
            }),
        }
    }
}

impl From<&HeartbeatRecord> for HeartbeatSeen {
    fn from(record: &HeartbeatRecord) -> Self {
        Self {
            node: record.node,
            owner: record.owner,
            sequence: record.sequence,
            watchdog: record.watchdog,
            detached: record.detached,
            timings: record.timings,
        }
    }
}

/// In whole milliseconds.
pub(crate) fn whole_ms(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
