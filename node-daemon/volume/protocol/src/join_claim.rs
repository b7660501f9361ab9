//! With which claim a `bascule-volume` asks for the next generation.
//!
//! ```text
//!   own slot blank ─────────────────────────────────► First
//!   this kernel started less than `settle` ago ─────► Wait: writes of the boot before may land
//!   newest own record of this boot ─────────────────► SameBoot: rows are kept
//!   of another boot ────────────────────────────────► Rebooted: rows are released
//! ```
//!
//! The wait does not depend on the record: the first heartbeat of this boot may have replaced the
//! last one of the boot before, and the coordinator goes by the boot that the slot's *row* names.
//! An empty run directory proves nothing either: the processes of this boot may live on.

use std::time::Duration;

use bascule_types::{BootTime, NodeUid, Owner};

use crate::rules::{Rules, broken};

/// What the own slot shows at the start of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnSlot {
    /// Who wrote the newest record.
    pub node: NodeUid,
    /// Under which slot and generation.
    pub owner: Owner,
    /// In which boot.
    pub boot: [u8; 16],
}

/// What to ask of the coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum JoinClaim {
    /// This node has never written its slot.
    First,
    /// Processes of `from` may be running: the rows that are not fenced go over.
    SameBoot {
        /// The last generation.
        from: Owner,
    },
    /// No process and no write of `from` exists any more: its rows are released.
    Rebooted {
        /// The last generation.
        from: Owner,
    },
    /// Ask later: writes of the boot before may still land.
    Wait {
        /// From this moment on.
        until: BootTime,
    },
}

/// The claim to make at `now` (this boot's clock, which starts at 0 after the reset).
#[must_use]
pub fn join_claim(
    rules: Rules,
    now: BootTime,
    boot: [u8; 16],
    me: NodeUid,
    slot: Option<OwnSlot>,
    settle: Duration,
) -> JoinClaim {
    let Some(slot) = slot.filter(|slot| slot.node == me) else {
        return JoinClaim::First;
    };
    let settled_at = BootTime(0).after(settle);
    if now < settled_at && !broken!(rules, RebootClaimedBeforeSettle) {
        JoinClaim::Wait { until: settled_at }
    } else if slot.boot == boot {
        JoinClaim::SameBoot { from: slot.owner }
    } else {
        JoinClaim::Rebooted { from: slot.owner }
    }
}

#[cfg(test)]
mod tests {
    use bascule_types::{Generation, SlotId};

    use super::*;

    const ME: NodeUid = NodeUid::from_bytes([1; 16]);
    const SETTLE: Duration = Duration::from_secs(4);

    fn slot(node: NodeUid, boot: u8) -> OwnSlot {
        OwnSlot {
            node,
            owner: Owner {
                slot: SlotId(2),
                generation: Generation(5),
            },
            boot: [boot; 16],
        }
    }

    fn claim(now: u64, slot: Option<OwnSlot>) -> JoinClaim {
        let now = BootTime(0).after(Duration::from_secs(now));
        join_claim(Rules::ENFORCED, now, [9; 16], ME, slot, SETTLE)
    }

    #[test]
    fn a_blank_slot_and_a_slot_of_an_earlier_node_are_joined_for_the_first_time() {
        assert_eq!(claim(1, None), JoinClaim::First);
        let other = NodeUid::from_bytes([2; 16]);
        assert_eq!(claim(1, Some(slot(other, 9))), JoinClaim::First);
    }

    #[test]
    fn within_a_boot_the_rows_are_kept_even_if_the_run_directory_was_lost() {
        let from = slot(ME, 9).owner;
        assert_eq!(claim(4, Some(slot(ME, 9))), JoinClaim::SameBoot { from });
    }

    #[test]
    fn i1_a_reboot_is_claimed_only_after_the_old_boots_writes_have_settled() {
        let from = slot(ME, 8).owner;
        let until = BootTime(0).after(SETTLE);
        assert_eq!(claim(3, Some(slot(ME, 8))), JoinClaim::Wait { until });
        // A process that crashed right after this boot's first heartbeat left a record of it.
        assert_eq!(claim(3, Some(slot(ME, 9))), JoinClaim::Wait { until });
        assert_eq!(claim(4, Some(slot(ME, 8))), JoinClaim::Rebooted { from });
    }
}
