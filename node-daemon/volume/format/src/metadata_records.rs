//! The records of the metadata: what the journal and a checkpoint are made of.
//!
//! A record is physical: it says what a row is, not what was asked, so that replay decides nothing.
//! Two records alter many rows at once ([`MetaRecord::Rejoin`], [`MetaRecord::DeleteVm`]); they say
//! so in one block, because one block is atomic.
//!
//! # Body of a record (440 bytes at most)
//! ```text
//! u8 type, then
//!  1 slot    slot u16, node 16, generation u64, boot 16
//!  2 vm      vm 16, name text191, owner, epoch u64, attempt flag+16, spec digest 32
//!  3 disk    disk 16, name text191, vm flag+16, size u64, role u8, importing u8, importer, runs
//!  4 saved   vm 16, epoch u64, complete flag + length u64 + crc32c u32, runs
//!  5 fence   victim, proof u8, watched_ms u64, required_ms u64
//!  6 rejoin  from, to, boot 16, keep u8
//!  7 no vm   vm 16     (its disks become kept disks, its saved state is freed)
//!  8 no disk disk 16
//!  9 no saved vm 16
//! 10 no fence victim
//! owner = flag u8, slot u16, generation u64
//! runs  = count u8, then per run: first MiB u32, length in MiB u32   (at most 24 runs)
//! ```

use bascule_types::{
    AdminConfirmation, AttemptId, Bytes, DiskId, DiskRole, DiskRow, Epoch, ExtentRun, FenceProof,
    FenceRow, Generation, Lba, NodeUid, Owner, RowName, SavedStateRow, SavedStateSum, SlotId,
    VmRow, VmUid,
};

use crate::FormatError;
use crate::envelope::{BodyReader, BodyWriter};

/// The most runs of extents that one row has room for.
pub const RUNS_MAX: usize = 24;

/// A heartbeat slot's holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SlotRow {
    /// The slot.
    pub slot: SlotId,
    /// The node.
    pub node: NodeUid,
    /// The generation that last joined; 0 before the first.
    pub generation: Generation,
    /// The kernel's boot id in which it joined.
    pub boot: [u8; 16],
}

/// One step of the metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaRecord {
    /// This slot is so.
    Slot(SlotRow),
    /// This VM is so.
    Vm(VmRow),
    /// This disk is so.
    Disk(DiskRow),
    /// This saved state is so.
    Saved(SavedStateRow),
    /// This owner is fenced.
    Fence(FenceRow),
    /// A slot's generation rises.
    Rejoin {
        /// The last one.
        from: Owner,
        /// The new one, of the same slot.
        to: Owner,
        /// The new one's boot id.
        boot: [u8; 16],
        /// Whether `from`'s rows go over to `to`; they are released otherwise.
        keep: bool,
    },
    /// The VM is gone; its disks are kept disks, its saved state is free.
    DeleteVm(VmUid),
    /// The disk is gone and its extents are free.
    DeleteDisk(DiskId),
    /// The saved state is gone and its extents are free.
    DeleteSaved(VmUid),
    /// The fence record is of no more use.
    DeleteFence(Owner),
}

impl MetaRecord {
    /// Writes the record.
    pub fn encode(&self, body: &mut BodyWriter<'_>) {
        match self {
            Self::Slot(row) => encode_slot(row, body),
            Self::Vm(row) => encode_vm(row, body),
            Self::Disk(row) => encode_disk(row, body),
            Self::Saved(row) => encode_saved(row, body),
            Self::Fence(row) => encode_fence(row, body),
            Self::Rejoin {
                from,
                to,
                boot,
                keep,
            } => {
                body.u8(6);
                encode_owner(Some(*from), body);
                encode_owner(Some(*to), body);
                body.bytes(boot);
                body.u8(u8::from(*keep));
            }
            Self::DeleteVm(vm) => encode_gone(7, vm.to_bytes(), body),
            Self::DeleteDisk(disk) => encode_gone(8, disk.to_bytes(), body),
            Self::DeleteSaved(vm) => encode_gone(9, vm.to_bytes(), body),
            Self::DeleteFence(victim) => {
                body.u8(10);
                encode_owner(Some(*victim), body);
            }
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`FormatError::Field`].
    pub fn parse(body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        match body.u8() {
            1 => Ok(Self::Slot(SlotRow {
                slot: SlotId(body.u16()),
                node: NodeUid::from_bytes(body.array()),
                generation: Generation(body.u64()),
                boot: body.array(),
            })),
            2 => parse_vm(body).map(Self::Vm),
            3 => parse_disk(body).map(Self::Disk),
            4 => parse_saved(body).map(Self::Saved),
            5 => parse_fence(body).map(Self::Fence),
            6 => Ok(Self::Rejoin {
                from: parse_some_owner(body)?,
                to: parse_some_owner(body)?,
                boot: body.array(),
                keep: body.flag("keep")?,
            }),
            7 => Ok(Self::DeleteVm(VmUid::from_bytes(body.array()))),
            8 => Ok(Self::DeleteDisk(DiskId::from_bytes(body.array()))),
            9 => Ok(Self::DeleteSaved(VmUid::from_bytes(body.array()))),
            10 => parse_some_owner(body).map(Self::DeleteFence),
            _ => Err(FormatError::Field("record type")),
        }
    }
}

fn encode_gone(code: u8, id: [u8; 16], body: &mut BodyWriter<'_>) {
    body.u8(code);
    body.bytes(&id);
}

fn encode_slot(row: &SlotRow, body: &mut BodyWriter<'_>) {
    body.u8(1);
    body.u16(row.slot.0);
    body.bytes(&row.node.to_bytes());
    body.u64(row.generation.0);
    body.bytes(&row.boot);
}

fn encode_vm(row: &VmRow, body: &mut BodyWriter<'_>) {
    body.u8(2);
    body.bytes(&row.vm.to_bytes());
    body.text(row.name.as_str(), RowName::BYTES_MAX);
    encode_owner(row.owner, body);
    body.u64(row.epoch.0);
    encode_id(row.attempt.map(AttemptId::to_bytes), body);
    body.bytes(&row.spec_digest);
}

fn parse_vm(body: &mut BodyReader<'_>) -> Result<VmRow, FormatError> {
    Ok(VmRow {
        vm: VmUid::from_bytes(body.array()),
        name: parse_name(body)?,
        owner: parse_owner(body)?,
        epoch: Epoch(body.u64()),
        attempt: parse_id(body)?.map(AttemptId::from_bytes),
        spec_digest: body.array(),
    })
}

fn encode_disk(row: &DiskRow, body: &mut BodyWriter<'_>) {
    body.u8(3);
    body.bytes(&row.disk.to_bytes());
    body.text(row.name.as_str(), RowName::BYTES_MAX);
    encode_id(row.vm.map(VmUid::to_bytes), body);
    body.u64(row.size.0);
    body.u8(match row.role {
        DiskRole::Data => 0,
        DiskRole::Kernel => 1,
        DiskRole::Initrd => 2,
    });
    body.u8(u8::from(row.importing));
    encode_owner(row.importer, body);
    encode_runs(&row.extents, body);
}

fn parse_disk(body: &mut BodyReader<'_>) -> Result<DiskRow, FormatError> {
    Ok(DiskRow {
        disk: DiskId::from_bytes(body.array()),
        name: parse_name(body)?,
        vm: parse_id(body)?.map(VmUid::from_bytes),
        size: Bytes(body.u64()),
        role: match body.u8() {
            0 => DiskRole::Data,
            1 => DiskRole::Kernel,
            2 => DiskRole::Initrd,
            _ => return Err(FormatError::Field("disk role")),
        },
        importing: body.flag("importing")?,
        importer: parse_owner(body)?,
        extents: parse_runs(body)?,
    })
}

fn encode_saved(row: &SavedStateRow, body: &mut BodyWriter<'_>) {
    body.u8(4);
    body.bytes(&row.vm.to_bytes());
    body.u64(row.epoch.0);
    body.u8(u8::from(row.complete.is_some()));
    body.u64(row.complete.map_or(0, |sum| sum.length.0));
    body.u32(row.complete.map_or(0, |sum| sum.crc32c));
    encode_runs(&row.extents, body);
}

fn parse_saved(body: &mut BodyReader<'_>) -> Result<SavedStateRow, FormatError> {
    let vm = VmUid::from_bytes(body.array());
    let epoch = Epoch(body.u64());
    let complete = body.flag("complete")?;
    let sum = SavedStateSum {
        length: Bytes(body.u64()),
        crc32c: body.u32(),
    };
    Ok(SavedStateRow {
        vm,
        epoch,
        extents: parse_runs(body)?,
        complete: complete.then_some(sum),
    })
}

fn encode_fence(row: &FenceRow, body: &mut BodyWriter<'_>) {
    body.u8(5);
    encode_owner(Some(row.victim), body);
    let (code, watched_ms, required_ms) = match row.proof {
        FenceProof::SafeTimeElapsed {
            watched_ms,
            required_ms,
        } => (1, watched_ms, required_ms),
        FenceProof::Administrator(AdminConfirmation::Confirmed) => (2, 0, 0),
        FenceProof::Administrator(AdminConfirmation::OutOfServiceTaint) => (3, 0, 0),
        FenceProof::Rebooted => (4, 0, 0),
    };
    body.u8(code);
    body.u64(watched_ms);
    body.u64(required_ms);
}

fn parse_fence(body: &mut BodyReader<'_>) -> Result<FenceRow, FormatError> {
    let victim = parse_some_owner(body)?;
    let (code, watched_ms, required_ms) = (body.u8(), body.u64(), body.u64());
    let proof = match code {
        1 => FenceProof::SafeTimeElapsed {
            watched_ms,
            required_ms,
        },
        2 => FenceProof::Administrator(AdminConfirmation::Confirmed),
        3 => FenceProof::Administrator(AdminConfirmation::OutOfServiceTaint),
        4 => FenceProof::Rebooted,
        _ => return Err(FormatError::Field("fence proof")),
    };
    Ok(FenceRow { victim, proof })
}

fn encode_owner(owner: Option<Owner>, body: &mut BodyWriter<'_>) {
    body.u8(u8::from(owner.is_some()));
    body.u16(owner.map_or(0, |owner| owner.slot.0));
    body.u64(owner.map_or(0, |owner| owner.generation.0));
}

fn parse_owner(body: &mut BodyReader<'_>) -> Result<Option<Owner>, FormatError> {
    let some = body.flag("owner")?;
    let owner = Owner {
        slot: SlotId(body.u16()),
        generation: Generation(body.u64()),
    };
    Ok(some.then_some(owner))
}

fn parse_some_owner(body: &mut BodyReader<'_>) -> Result<Owner, FormatError> {
    parse_owner(body)?.ok_or(FormatError::Field("owner"))
}

fn encode_id(id: Option<[u8; 16]>, body: &mut BodyWriter<'_>) {
    body.u8(u8::from(id.is_some()));
    body.bytes(&id.unwrap_or_default());
}

fn parse_id(body: &mut BodyReader<'_>) -> Result<Option<[u8; 16]>, FormatError> {
    let some = body.flag("id")?;
    let id = body.array();
    Ok(some.then_some(id))
}

fn parse_name(body: &mut BodyReader<'_>) -> Result<RowName, FormatError> {
    let text = body.text::<{ RowName::BYTES_MAX }>("name")?;
    RowName::new(text).map_err(|_| FormatError::Field("name"))
}

/// Extents are whole MiB, so that 24 runs fit beside the longest name.
fn encode_runs(runs: &[ExtentRun], body: &mut BodyWriter<'_>) {
    body.u8(u8::try_from(runs.len()).unwrap_or(u8::MAX));
    for run in runs {
        body.u32(u32::try_from(run.start.0 / LBAS_PER_MIB).unwrap_or(u32::MAX));
        body.u32(u32::try_from(run.length.0 >> MIB_SHIFT).unwrap_or(u32::MAX));
    }
}

fn parse_runs(body: &mut BodyReader<'_>) -> Result<Vec<ExtentRun>, FormatError> {
    let count = usize::from(body.u8());
    if count > RUNS_MAX {
        return Err(FormatError::Field("extents"));
    }
    let mut runs = Vec::new();
    for _ in 0..count {
        let (start, length) = (body.u32(), body.u32());
        if length == 0 {
            return Err(FormatError::Field("extents"));
        }
        runs.push(ExtentRun {
            start: Lba(u64::from(start) * LBAS_PER_MIB),
            length: Bytes::mib(length),
        });
    }
    Ok(runs)
}

const LBAS_PER_MIB: u64 = 256;
const MIB_SHIFT: u32 = 20;
