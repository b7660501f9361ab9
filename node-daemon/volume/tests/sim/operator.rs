//! What the operator and the node daemons do with VMs, as far as ownership goes: start what has no owner,
//! take over what a lost node owns, start a guest whose process ended in a new epoch, move some.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bascule_ipc::volume::{Request, Response};
use bascule_types::{
    Answer, Bytes, Change, DiskRole, Epoch, Owner, Ownership, Refusal, RowName, Table, VmRow, VmUid,
};

use crate::guest::Guest;
use crate::oracles::RowOracle;
use crate::profile::Wishes;
use crate::scheduler::{Group, nanos};
use crate::world::{Guests, NODES, World};

pub(crate) const VMS: u8 = 2;

/// A guest writes several times a second.
const STANDS_STILL: Duration = Duration::from_secs(4);
/// A process id of the operator's requests on a node: that of its daemon.
pub(crate) const DAEMON: u32 = 1;

pub(crate) struct Operator {
    pub(crate) world: Arc<World>,
    /// The guests' processes as last started.
    pub(crate) guests: Guests,
    /// How much each VM had written when it last went on, and when that was.
    progress: BTreeMap<u8, (u64, u64)>,
    rows: RowOracle,
    wishes: Wishes,
}

pub(crate) fn vm(n: u8) -> VmUid {
    VmUid::from_bytes([0x10 + n; 16])
}

impl Operator {
    pub(crate) fn new(world: &Arc<World>) -> Self {
        Self {
            world: Arc::clone(world),
            guests: Guests::new(),
            progress: BTreeMap::new(),
            rows: RowOracle::default(),
            wishes: world.faults.profile.wishes,
        }
    }

    /// Whether the VM has written nothing for a while: a bold operator takes it over then. The volume's
    /// coordinator decides whether it may.
    fn stands_still(&mut self, n: u8) -> bool {
        let now = self.world.scheduler.now();
        let writes = self.world.oracle().writes.get(&u64::from(n)).copied();
        let writes = writes.unwrap_or(0);
        let (last, since) = self.progress.entry(n).or_insert((writes, now));
        if *last != writes {
            (*last, *since) = (writes, now);
        }
        now - *since > nanos(STANDS_STILL)
    }

    /// The last check waits for every VM.
    pub(crate) fn takes_over_at_once(&mut self) {
        self.wishes.dawdles = false;
        self.wishes.patient = false;
    }

    /// Creates the VMs and their disks, through node 0, without faults.
    pub(crate) fn set_up(&mut self) {
        for n in 0..VMS {
            let name = |what: &str| RowName::new(format!("shop/{what}-{n}")).expect("a name");
            let create = Change::CreateVm {
                vm: vm(n),
                name: name("web"),
                spec_digest: [n; 32],
            };
            let disk = Change::CreateDisk {
                vm: vm(n),
                name: name("data"),
                size: Bytes::mib(1),
                role: DiskRole::Data,
                importing: false,
            };
            for change in [create, disk] {
                while !matches!(self.change(0, &change), Some(Response::Granted(_))) {
                    self.world.scheduler.sleep(Duration::from_secs(1));
                }
            }
        }
        if self.wishes.fills_table {
            self.fill_table();
        }
    }

    /// Creates VMs that never run, until there is no room for another row.
    fn fill_table(&mut self) {
        for n in 0..u128::MAX {
            let create = Change::CreateVm {
                vm: VmUid::from_bytes((n + (1 << 64)).to_be_bytes()),
                name: RowName::new(format!("shop/idle-{n}")).expect("a name"),
                spec_digest: [0; 32],
            };
            if let Some(Response::Refused(refusal)) = self.change(0, &create) {
                let full = matches!(refusal, Refusal::TableFull { what: Table::Rows });
                assert!(full, "{refusal}");
                return;
            }
        }
    }

    /// One look at everything.
    pub(crate) fn step(&mut self) {
        let asked = self.world.some_node();
        let Some((Response::Rows(rows), _)) = self.world.call_volume(asked, DAEMON, &Request::Rows)
        else {
            return;
        };
        self.rows.seen(&rows);
        for n in 0..VMS {
            if let Some(row) = rows.vms.iter().find(|row| row.vm == vm(n)) {
                self.drive(n, row);
            }
        }
    }

    fn drive(&mut self, n: u8, row: &VmRow) {
        let home = row.owner.and_then(|owner| self.node_of(owner));
        let runs = self.guests.get(&n).copied();
        let runs = runs.filter(|(node, pid)| self.world.lives(*node, *pid));
        let stands_still = self.stands_still(n);
        let bold = self.world.scheduler.once_in(self.wishes.takes_over_once_in);
        if stands_still && bold && self.take_over(n, row) {
            return;
        }
        match (row.owner, home, runs) {
            (None, ..) => self.acquire(n, row),
            (Some(owner), Some(node), None) => {
                // A guest whose process ended starts in a new epoch.
                let release = Change::Release {
                    vm: row.vm,
                    from: owner,
                    epoch: row.epoch,
                };
                self.change(node, &release);
            }
            // So does whoever restarts a guest that hangs.
            (Some(_), Some(node), Some((on, pid)))
                if on == node
                    && stands_still
                    && !self.wishes.patient
                    && self.world.scheduler.once_in(3) =>
            {
                self.world.kill_process(on, pid);
            }
            (Some(owner), Some(node), Some((on, pid))) if on == node => {
                if self.world.scheduler.once_in(self.wishes.move_once_in) {
                    self.migrate(n, row, owner, node, pid);
                }
            }
            // It lost the VM, or its node is gone.
            (Some(_), _, Some((on, pid))) => {
                if home.is_some() {
                    self.world.kill_process(on, pid);
                } else {
                    self.take_over(n, row);
                }
            }
            (Some(_), None, None) => {
                self.take_over(n, row);
            }
        }
    }

    /// The node that has this slot and generation now.
    fn node_of(&self, owner: Owner) -> Option<u8> {
        (0..NODES).find(|node| self.owner_of(*node) == Some(owner))
    }

    fn owner_of(&self, node: u8) -> Option<Owner> {
        let volume = self.world.nodes()[usize::from(node)].volume.clone()?;
        volume.state().joined
    }

    fn acquire(&mut self, n: u8, row: &VmRow) {
        let node = self.world.some_node();
        let Some(to) = self.owner_of(node) else {
            return;
        };
        let change = Change::Acquire {
            vm: row.vm,
            expected_epoch: row.epoch,
            to,
        };
        self.start_if_granted(n, node, &change);
    }

    /// Whether it was granted.
    fn take_over(&mut self, n: u8, row: &VmRow) -> bool {
        if self.wishes.dawdles && n > 0 && !self.world.scheduler.once_in(40) {
            return false;
        }
        let Some(from) = row.owner else { return false };
        let others = (0..NODES).filter_map(|node| Some((node, self.owner_of(node)?)));
        let others: Vec<_> = others.filter(|(_, to)| to.slot != from.slot).collect();
        let chosen = self.world.scheduler.below(others.len() as u64);
        let chosen = usize::try_from(chosen).ok().and_then(|n| others.get(n));
        let Some((node, to)) = chosen.copied() else {
            return false;
        };
        let change = Change::TakeOver {
            vm: row.vm,
            from,
            epoch: row.epoch,
            to,
        };
        self.start_if_granted(n, node, &change)
    }

    fn migrate(&mut self, n: u8, row: &VmRow, from: Owner, node: u8, pid: u32) {
        let target = self.world.some_node();
        let Some(to) = self.owner_of(target) else {
            return;
        };
        if target == node {
            return;
        }
        // The guest stops first; what it has submitted completes in the kernel.
        self.world.kill_process(node, pid);
        let saved = self.wishes.saves && self.save(node, row, from);
        let release = Change::Release {
            vm: row.vm,
            from,
            epoch: row.epoch,
        };
        if self.insist(node, &release) {
            let acquire = Change::Acquire {
                vm: row.vm,
                expected_epoch: row.epoch,
                to,
            };
            if self.start_if_granted(n, target, &acquire) && saved {
                self.restore(target, row, to);
            }
        }
    }

    /// Repeats a request for as long as the node finds out that a process has ended, and its writes complete.
    fn insist(&mut self, node: u8, change: &Change) -> bool {
        for _ in 0..6 {
            match self.change(node, change) {
                Some(Response::Granted(_)) => return true,
                Some(Response::Unavailable { .. }) => {}
                _ => return false,
            }
            self.world.scheduler.sleep(Duration::from_secs(1));
        }
        false
    }

    /// Saves the memory of a stopped guest on the volume, sometimes after an attempt that was cancelled.
    /// Whether that is certain.
    fn save(&mut self, node: u8, row: &VmRow, from: Owner) -> bool {
        let (vm, epoch) = (row.vm, row.epoch);
        let reserve = Change::ReserveSavedState {
            vm,
            from,
            epoch,
            size: Bytes::mib(1),
        };
        let drop = Change::DropSavedState { vm, from, epoch };
        let finish = Change::FinishSavedState {
            vm,
            from,
            epoch,
            length: Bytes(1000),
            crc32c: 7,
        };
        if self.world.scheduler.once_in(2) {
            self.change(node, &reserve);
            self.change(node, &drop);
        }
        self.change(node, &reserve);
        let finished = self.change(node, &finish);
        matches!(finished, Some(Response::Granted(Answer::SavedState(_))))
    }

    /// The next owner finds what was saved, at any later time, and then drops it.
    fn restore(&mut self, node: u8, before: &VmRow, owner: Owner) {
        let pause = self.world.scheduler.below(10_000);
        self.world.scheduler.sleep(Duration::from_millis(pause));
        let rows = self.world.call_volume(node, DAEMON, &Request::Rows);
        let Some((Response::Rows(rows), _)) = rows else {
            return;
        };
        let (vm, epoch) = (before.vm, before.epoch.next());
        let kept = |row: &&VmRow| row.vm == vm && row.epoch == epoch && row.owner == Some(owner);
        if rows.vms.iter().find(kept).is_some() {
            let saved = rows.saved.iter().find(|saved| saved.vm == vm);
            assert!(
                saved.is_some_and(|saved| saved.complete.is_some()),
                "I3: {saved:?} is left of the memory that was saved in epoch {}",
                before.epoch
            );
            let from = owner;
            self.change(node, &Change::DropSavedState { vm, from, epoch });
        }
    }

    /// Whether it was granted.
    fn start_if_granted(&mut self, n: u8, node: u8, change: &Change) -> bool {
        let Some(Response::Granted(Answer::Row(row))) = self.change(node, change) else {
            return false;
        };
        let Some(owner) = row.owner else { return false };
        self.start(n, node, owner, row.epoch);
        true
    }

    fn start(&mut self, n: u8, node: u8, owner: Owner, epoch: Epoch) {
        if !self.world.nodes()[usize::from(node)].is_up {
            return;
        }
        let pid = self.world.start_process(node);
        self.guests.insert(n, (node, pid));
        let guest = Guest {
            world: Arc::clone(&self.world),
            node,
            pid,
            vm: vm(n),
            number: u64::from(n),
            ownership: Ownership { owner, epoch },
        };
        let world = Arc::clone(&self.world);
        let group = Group { node, process: pid };
        self.world.scheduler.spawn(group, "guest", move || {
            guest.run();
            world.nodes()[usize::from(node)].forget(pid);
        });
    }

    fn change(&mut self, node: u8, change: &Change) -> Option<Response> {
        let request = Request::Change(change.clone());
        let answered = self.world.call_volume(node, DAEMON, &request);
        let (response, _) = answered?;
        if let Response::Granted(Answer::Row(row)) = &response {
            self.rows.granted(row);
        }
        Some(response)
    }
}
