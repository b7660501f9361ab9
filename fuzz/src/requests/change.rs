//! A change that a node asks for: mostly of the rows that there are.

use arbitrary::Arbitrary;
use bascule_types::{
    AdminConfirmation, AttemptId, Bytes, Change, DiskId, DiskRole, Epoch, Generation, NodeUid,
    Owner, RowName, SlotId, VmRow, VmUid,
};
use bascule_volume_format::Metadata;

use super::NODES;

/// A change of what there is, mostly: numbers choose among the rows.
#[derive(Arbitrary, Debug)]
pub(super) enum Wanted {
    Register,
    Rejoin {
        rebooted: bool,
    },
    CreateVm {
        vm: u8,
    },
    DeleteVm {
        vm: u8,
    },
    Acquire {
        vm: u8,
        epoch: Number,
        to: Who,
    },
    Release {
        vm: u8,
        from: Who,
        epoch: Number,
    },
    Transfer {
        vm: u8,
        from: Who,
        epoch: Number,
        to: Who,
        attempt: u8,
    },
    TakeOver {
        vm: u8,
        from: Who,
        epoch: Number,
        to: Who,
    },
    ConfirmFenced {
        victim: Who,
        tainted: bool,
    },
    CreateDisk {
        vm: u8,
        disk: u8,
        size: Size,
        role: u8,
    },
    FinishImport {
        disk: u8,
        length: Option<Size>,
    },
    AttachDisk {
        disk: u8,
        vm: u8,
    },
    DeleteDisk {
        disk: u8,
    },
    Reserve {
        vm: u8,
        size: Size,
    },
    FinishSaved {
        vm: u8,
        length: Size,
    },
    DropSaved {
        vm: u8,
    },
    /// In JSON.
    Text(String),
}

/// An epoch: that of the row, one near it, or any.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Number {
    OfRow,
    Near(i8),
    Any(u64),
}

/// An owner: that of the row, the present one of a slot, or any.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Who {
    OfRow,
    OfSlot(u8),
    Any { slot: u16, generation: u64 },
}

#[derive(Arbitrary, Clone, Copy, Debug)]
pub(super) enum Size {
    Small(u32),
    Any(u64),
}

/// Chooses among the rows of a volume.
pub(super) struct Choice<'a>(pub(super) &'a Metadata);

impl Choice<'_> {
    /// The change in full; none when there is no such text.
    pub(super) fn change(
        &self,
        wanted: &Wanted,
        node: NodeUid,
        requester: Option<Owner>,
    ) -> Option<Change> {
        Some(match *wanted {
            Wanted::Register => Change::RegisterNode { node },
            Wanted::Rejoin { rebooted } => Change::Rejoin {
                node,
                from: self.0.slot_of(node)?.owner(),
                rebooted,
            },
            Wanted::CreateVm { vm } => Change::CreateVm {
                vm: vm_uid(vm),
                name: row_name(vm),
                spec_digest: [vm; 32],
            },
            Wanted::DeleteVm { vm } => Change::DeleteVm { vm: vm_uid(vm) },
            Wanted::ConfirmFenced { victim, tainted } => Change::ConfirmFenced {
                victim: self.owner(victim, None),
                confirmation: if tainted {
                    AdminConfirmation::OutOfServiceTaint
                } else {
                    AdminConfirmation::Confirmed
                },
            },
            Wanted::Text(ref text) => return serde_json::from_str(text).ok(),
            ref other => {
                let change = self.change_of_ownership(other);
                return change.or_else(|| self.change_of_storage(other, requester));
            }
        })
    }

    fn change_of_ownership(&self, wanted: &Wanted) -> Option<Change> {
        let row = |vm| self.0.vm(vm_uid(vm));
        Some(match *wanted {
            Wanted::Acquire { vm, epoch, to } => Change::Acquire {
                vm: vm_uid(vm),
                expected_epoch: number(epoch, row(vm)),
                to: self.owner(to, row(vm)),
            },
            Wanted::Release { vm, from, epoch } => Change::Release {
                vm: vm_uid(vm),
                from: self.owner(from, row(vm)),
                epoch: number(epoch, row(vm)),
            },
            Wanted::Transfer {
                vm,
                from,
                epoch,
                to,
                attempt,
            } => Change::Transfer {
                vm: vm_uid(vm),
                from: self.owner(from, row(vm)),
                epoch: number(epoch, row(vm)),
                to: self.owner(to, None),
                attempt: AttemptId::from_bytes([attempt % 4; 16]),
            },
            Wanted::TakeOver {
                vm,
                from,
                epoch,
                to,
            } => Change::TakeOver {
                vm: vm_uid(vm),
                from: self.owner(from, row(vm)),
                epoch: number(epoch, row(vm)),
                to: self.owner(to, row(vm)),
            },
            _ => return None,
        })
    }

    fn change_of_storage(&self, wanted: &Wanted, requester: Option<Owner>) -> Option<Change> {
        let row = |vm| self.0.vm(vm_uid(vm));
        let from = |vm| {
            let owner = row(vm).and_then(|row| row.owner).or(requester);
            Some((owner?, number(Number::OfRow, row(vm))))
        };
        let role =
            |role| [DiskRole::Data, DiskRole::Kernel, DiskRole::Initrd][usize::from(role) % 3];
        Some(match *wanted {
            Wanted::CreateDisk {
                vm,
                disk,
                size,
                role: number,
            } => Change::CreateDisk {
                vm: vm_uid(vm),
                name: row_name(disk),
                size: size.bytes(),
                role: role(number),
                importing: true,
            },
            Wanted::FinishImport { disk, length } => Change::FinishImport {
                disk: self.disk(disk),
                length: length.map(Size::bytes),
            },
            Wanted::AttachDisk { disk, vm } => Change::AttachDisk {
                name: row_name(disk),
                vm: vm_uid(vm),
            },
            Wanted::DeleteDisk { disk } => Change::DeleteDisk {
                disk: self.disk(disk),
            },
            Wanted::Reserve { vm, size } => {
                let (from, epoch) = from(vm)?;
                let (vm, size) = (vm_uid(vm), size.bytes());
                Change::ReserveSavedState {
                    vm,
                    from,
                    epoch,
                    size,
                }
            }
            Wanted::FinishSaved { vm, length } => {
                let (from, epoch) = from(vm)?;
                Change::FinishSavedState {
                    vm: vm_uid(vm),
                    from,
                    epoch,
                    length: length.bytes(),
                    crc32c: 7,
                }
            }
            Wanted::DropSaved { vm } => {
                let (from, epoch) = from(vm)?;
                let vm = vm_uid(vm);
                Change::DropSavedState { vm, from, epoch }
            }
            _ => return None,
        })
    }

    fn owner(&self, who: Who, row: Option<&VmRow>) -> Owner {
        let of_slot = |slot| {
            let row = self.0.slot(SlotId(u16::from(slot % NODES)));
            row.map(|row| row.owner())
        };
        let any = |slot, generation| Owner {
            slot: SlotId(slot),
            generation: Generation(generation),
        };
        match who {
            Who::OfRow => row.and_then(|row| row.owner).or_else(|| of_slot(0)),
            Who::OfSlot(slot) => of_slot(slot),
            Who::Any { slot, generation } => Some(any(slot, generation)),
        }
        .unwrap_or_else(|| any(0, 0))
    }

    /// That of the n-th disk, modulo the number of disks.
    fn disk(&self, nth: u8) -> DiskId {
        let count = self.0.disks().count().max(1);
        let row = self.0.disks().nth(usize::from(nth) % count);
        row.map_or_else(|| DiskId::from_bytes([nth; 16]), |row| row.disk)
    }
}

impl Size {
    const fn bytes(self) -> Bytes {
        match self {
            Self::Small(bytes) => Bytes(bytes as u64),
            Self::Any(bytes) => Bytes(bytes),
        }
    }
}

fn number(number: Number, row: Option<&VmRow>) -> Epoch {
    let now = row.map_or(0, |row| row.epoch.0);
    Epoch(match number {
        Number::OfRow => now,
        Number::Near(by) => now.wrapping_add_signed(by.into()),
        Number::Any(epoch) => epoch,
    })
}

fn vm_uid(n: u8) -> VmUid {
    VmUid::from_bytes([0xA0 + n % 4; 16])
}

fn row_name(n: u8) -> RowName {
    let namespace = ["shop", "lab"][usize::from(n / 4) % 2];
    RowName::new(format!("{namespace}/{}", n % 4)).unwrap()
}
