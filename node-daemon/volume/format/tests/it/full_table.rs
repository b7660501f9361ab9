//! A volume whose table has no room for another VM, disk or saved state still lets every VM be taken
//! over, released and deleted, every node be fenced and join again, and every free slot be given out.

use std::collections::BTreeSet;

use bascule_types::{
    AdminConfirmation, Answer, Bytes, Change, DiskRole, Epoch, FenceProof, NodeUid, Owner, Refusal,
    SlotId, Table, VmUid,
};
use bascule_volume_format::{AreaId, FormatRequest, SLOTS_MAX, Superblock};
use proptest::prelude::*;

use crate::fixture::{Cluster, name, node, owner, request};

const PROOF: FenceProof = FenceProof::SafeTimeElapsed {
    watched_ms: 26_000,
    required_ms: 26_000,
};
/// Nodes that hold a slot while the table is filled.
const JOINED: u8 = 40;

/// The smallest table, 376 rows, with the most slots.
fn superblock() -> Superblock {
    let request = FormatRequest {
        slot_count: SLOTS_MAX,
        device_bytes: 1 << 30,
        ..request()
    };
    request.lay_out().unwrap()
}

fn rows_max(superblock: &Superblock) -> u64 {
    let first = AreaId {
        slot: SlotId(0),
        half: 0,
    };
    superblock.area(first).rows_max()
}

fn vm(n: u8) -> VmUid {
    VmUid::from_bytes([n; 16])
}

/// A row that is not for a fence or a slot.
#[derive(Clone, Copy, Debug)]
enum Sort {
    Vm,
    Disk,
    Saved,
}

/// A cluster with a full table: VM n is owned by the node of slot n mod [`JOINED`].
struct Full {
    cluster: Cluster,
    rows_max: u64,
    vms: u8,
}

impl Full {
    fn filled(order: &[Sort]) -> Self {
        let superblock = superblock();
        let mut cluster = Cluster::of(&superblock);
        for n in 3..=JOINED {
            cluster.join(n);
        }
        let rows_max = rows_max(&superblock);
        let mut full = Self {
            cluster,
            rows_max,
            vms: 0,
        };
        full.add(Sort::Vm).unwrap();
        let mut refused = 0;
        for sort in order.iter().cycle() {
            match full.add(*sort) {
                Ok(()) => refused = 0,
                Err(refusal) => {
                    let what = Table::Rows;
                    assert_eq!(refusal, Refusal::TableFull { what });
                    refused += 1;
                }
            }
            if refused == order.len() {
                return full;
            }
        }
        full
    }

    fn owner_of(n: u8) -> (u8, Owner) {
        let slot = n % JOINED;
        (slot + 1, owner(u16::from(slot), 1))
    }

    fn add(&mut self, sort: Sort) -> Result<(), Refusal> {
        let n = self.vms;
        let (asks, from) = Self::owner_of(n.saturating_sub(1));
        match sort {
            Sort::Vm => {
                let (asks, to) = Self::owner_of(n);
                let create = Change::CreateVm {
                    vm: vm(n),
                    name: name(&format!("shop/web-{n}")),
                    spec_digest: [n; 32],
                };
                self.cluster.ask(asks, &create)?;
                let acquire = Change::Acquire {
                    vm: vm(n),
                    expected_epoch: Epoch(0),
                    to,
                };
                self.cluster.ask(asks, &acquire)?;
                self.vms += 1;
            }
            Sort::Disk => {
                let count = self.cluster.metadata.disks().count();
                let create = Change::CreateDisk {
                    vm: vm(n - 1),
                    name: name(&format!("shop/disk-{count}")),
                    size: Bytes::mib(1),
                    role: DiskRole::Data,
                    importing: true,
                };
                self.cluster.ask(asks, &create)?;
            }
            Sort::Saved => {
                let vm = vm(n - 1);
                if self.cluster.metadata.saved(vm).is_some() {
                    return self.add(Sort::Disk);
                }
                let size = Bytes::mib(1);
                let epoch = Epoch(1);
                let reserve = Change::ReserveSavedState {
                    vm,
                    from,
                    epoch,
                    size,
                };
                self.cluster.ask(asks, &reserve)?;
            }
        }
        Ok(())
    }

    /// Grants what must always be granted.
    fn ask(&mut self, asks: u8, change: &Change) -> Answer {
        let answer = self.cluster.ask(asks, change);
        let rows = self.cluster.metadata.row_count();
        assert!(rows <= self.rows_max, "{rows} rows after {change:?}");
        answer.unwrap_or_else(|refusal| panic!("{change:?}: {refusal:?} with {rows} rows"))
    }

    fn silence(&mut self, victim: Owner) {
        self.cluster.seen.alive.remove(&victim);
        self.cluster.seen.proofs.insert(victim, PROOF);
    }

    /// Fences the slot's generation `from`, by a takeover if it owns a VM, and lets it join again.
    fn fence_and_rejoin(&mut self, slot: u8, from: u64) {
        let victim = owner(u16::from(slot), from);
        self.silence(victim);
        let metadata = &self.cluster.metadata;
        let owned = metadata.vms().find(|row| row.owner == Some(victim));
        let owned = owned.cloned();
        let helper = if slot == 0 { 1 } else { 0 };
        let to = self.cluster.metadata.slot(SlotId(helper)).unwrap().owner();
        let asks = u8::try_from(helper).unwrap() + 1;
        let change = match owned {
            Some(row) => Change::TakeOver {
                vm: row.vm,
                from: victim,
                epoch: row.epoch,
                to,
            },
            None => Change::ConfirmFenced {
                victim,
                confirmation: AdminConfirmation::Confirmed,
            },
        };
        self.ask(asks, &change);
        assert!(self.cluster.metadata.fence(victim).is_some());
        let next = owner(u16::from(slot), from + 1);
        self.cluster.seen.alive.insert(next);
        let rejoin = Change::Rejoin {
            node: node(slot + 1),
            from: victim,
            rebooted: false,
        };
        self.ask(slot + 1, &rejoin);
    }

    /// Releases and deletes every VM, and deletes every disk that is not being imported.
    fn empty(&mut self) {
        let rows: Vec<_> = self.cluster.metadata.vms().cloned().collect();
        for row in rows {
            if let Some(from) = row.owner {
                let release = Change::Release {
                    vm: row.vm,
                    from,
                    epoch: row.epoch,
                };
                self.ask(u8::try_from(from.slot.0).unwrap() + 1, &release);
            }
            self.ask(1, &Change::DeleteVm { vm: row.vm });
        }
        let disks: Vec<_> = self.cluster.metadata.disks().cloned().collect();
        for row in disks {
            let importer = row.importer.map_or(0, |importer| importer.slot.0);
            let asks = u8::try_from(importer).unwrap() + 1;
            self.ask(asks, &Change::DeleteDisk { disk: row.disk });
        }
    }
}

fn sorts() -> impl Strategy<Value = Vec<Sort>> {
    let sort = prop_oneof![Just(Sort::Vm), Just(Sort::Disk), Just(Sort::Saved)];
    proptest::collection::vec(sort, 1..12)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 12, ..ProptestConfig::default() })]

    /// Every slot is fenced three times, in any order: more fences than a slot ever keeps.
    #[test]
    fn a_full_table_prevents_no_takeover_fence_rejoin_registration_release_or_deletion(
        order in sorts(),
        slots in Just((0..JOINED).collect::<Vec<u8>>()).prop_shuffle(),
    ) {
        let mut full = Full::filled(&order);
        for generation in 1..=3 {
            for slot in &slots {
                full.fence_and_rejoin(*slot, generation);
            }
        }
        for n in JOINED..64 {
            full.ask(1, &Change::RegisterNode { node: NodeUid::from_bytes([n + 1; 16]) });
        }
        let victims: BTreeSet<SlotId> =
            full.cluster.metadata.fences().map(|fence| fence.victim.slot).collect();
        let fences = full.cluster.metadata.fences().count();
        prop_assert!(fences <= 2 * victims.len(), "{} fences of {} slots", fences, victims.len());
        full.empty();
    }
}
