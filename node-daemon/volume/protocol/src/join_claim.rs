//! What a starting `bascule-volume` may claim about its previous generation when it requests the next
//! one (`Change::Rejoin`).
//!
//! # States
//! ```text
//!   the slot has no record of this node ────────────► First
//!   this kernel started less than `settle` ago ─────► Wait: writes of the previous boot may land
//!   the newest record is of this boot ──────────────► SameBoot: VMs are kept
//!   it is of another boot ──────────────────────────► Rebooted: VMs are released
//! ```
//!
//! The wait does not depend on the record: the first heartbeat of this boot may have replaced the
//! last one of the previous boot, and the coordinator goes by the boot id in the slot's *row*. An
//! empty run directory is no evidence of a reboot: processes of this boot may still run.

use std::time::Duration;

use bascule_types::{BootTime, NodeUid, Owner};

use bascule_volume_format::{Rules, broken};

/// The newest record in this node's slot at the start of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct OwnSlot {
    /// The node that wrote the record.
    pub node: NodeUid,
    /// The slot and generation of the record.
    pub owner: Owner,
    /// The boot id of the kernel under which it was written.
    pub boot: [u8; 16],
}

/// The claim of a `Change::Rejoin`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum JoinClaim {
    /// This node has no record in its slot.
    First,
    /// Processes of `from` may be running: its VMs go over to the new generation unless it was fenced.
    SameBoot { from: Owner },
    /// No process and no outstanding write of `from` exists any more: its VMs are released.
    Rebooted { from: Owner },
    /// No claim yet: writes of the previous boot may still land.
    Wait {
        /// The end of the wait, by this boot's clock.
        until: BootTime,
    },
}

/// The claim to make at `now`, by this boot's clock, which starts at 0 after the reset.
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
    fn a_slot_without_a_record_of_this_node_is_joined_for_the_first_time() {
        assert_eq!(claim(1, None), JoinClaim::First);
        let other = NodeUid::from_bytes([2; 16]);
        assert_eq!(claim(1, Some(slot(other, 9))), JoinClaim::First);
    }

    #[test]
    fn within_a_boot_the_vms_are_kept_even_if_the_run_directory_was_lost() {
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
