//! The records of the metadata: what checkpoint rows and journal records carry.
//!
//! A record is physical: it holds a row's new contents, not the request that led to them, so that
//! replay makes no decisions. Two records change many rows at once ([`MetaRecord::Rejoin`],
//! [`MetaRecord::DeleteVm`]); they fit one block, and so take effect atomically.
//!
//! # Byte table
//! ```text
//! offset size  field
//!      0    1  type
//!      1    1  version of this type's payload, 1
//!      2    2  length of the payload in bytes, at most 439
//!      4       payload
//! ```
//! A reader refuses a type or a version that it does not know, and a payload that is longer or shorter
//! than its fields. It never passes a record over: the next checkpoint would drop what it describes.
//!
//! Offsets of the fields count from the start of the payload.
//!
//! ```text
//! type             offset size  field
//!  1 slot               0    2  slot
//!                       2   16  node uid
//!                      18    8  generation that last joined, 0 before the first
//!                      26   16  boot id in which it joined
//!  2 vm                 0   16  vm uid
//!                      16  192  name
//!                     208   11  owner
//!                     219    8  epoch
//!                     227   17  migration attempt
//!                     244   32  spec digest
//!  3 disk               0   16  disk id
//!                      16  192  name
//!                     208   17  vm uid
//!                     225    8  size in bytes
//!                     233    1  role: 0 data, 1 kernel, 2 initrd
//!                     234    1  1 = importing
//!                     235   11  importer (an owner)
//!                     246       runs
//!  4 saved state        0   16  vm uid
//!                      16    8  epoch
//!                      24    1  1 = complete
//!                      25    8  length in bytes, 0 unless complete
//!                      33    4  CRC32C, 0 unless complete
//!                      37       runs
//!  5 fence              0   11  victim (an owner)
//!                      11    1  proof: 1 safe time, 2 confirmed, 3 out-of-service taint, 4 rebooted
//!                      12    8  time watched in ms, 0 unless the proof is 1
//!                      20    8  time required in ms, 0 unless the proof is 1
//!  6 rejoin             0   11  from (an owner)
//!                      11   11  to (an owner)
//!                      22   16  boot id of `to`
//!                      38    1  1 = `from`'s rows go over to `to`
//!  7 delete vm          0   16  vm uid (its disks become kept disks, its saved state is freed)
//!  8 delete disk        0   16  disk id
//!  9 delete saved       0   16  vm uid
//! 10 delete fence       0   11  victim (an owner)
//! 11 features           0    8  features that are raised from now on, besides those of before
//!
//! owner    11 bytes: 1 present (0 or 1), 2 slot, 8 generation
//! id       17 bytes: 1 present (0 or 1), 16 id                    (vm uid of a disk, attempt)
//! name    192 bytes: 1 length, 191 visible ASCII, zero to the end
//! runs     1 + 8n bytes, n at most 24: 1 count n, then per run 4 first MiB of the volume, 4 MiB
//! ```

use bascule_types::{
    AdminConfirmation, AttemptId, Bytes, DiskId, DiskRole, DiskRow, Epoch, ExtentRun, FenceProof,
    FenceRow, Generation, Lba, NodeUid, Owner, RowName, SavedStateRow, SavedStateSum, SlotId,
    VmRow, VmUid,
};

use crate::envelope::{BodyReader, BodyWriter, FormatError, check_version};
use crate::features::Features;

/// The version of every type's payload.
const VERSION: u8 = 1;
/// The longest payload: a disk's, with the most runs.
const PAYLOAD_MAX: usize = 439;

/// The most extent runs of one row: what fits beside the longest name.
pub const RUNS_MAX: usize = 24;

/// A heartbeat slot's holder.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct SlotRow {
    pub slot: SlotId,
    /// The node to which the slot is assigned.
    pub node: NodeUid,
    /// The generation that last joined; 0 before the first.
    pub generation: Generation,
    /// The kernel's boot id in which that generation joined; zero before the first.
    pub boot: [u8; 16],
}

impl SlotRow {
    /// The slot in the generation that last joined.
    #[must_use]
    pub const fn owner(&self) -> Owner {
        Owner {
            slot: self.slot,
            generation: self.generation,
        }
    }
}

/// One change to the rows. The first five insert a row, or replace it as a whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MetaRecord {
    /// A heartbeat slot's row.
    Slot(SlotRow),
    /// A VM's row.
    Vm(VmRow),
    /// A disk's row.
    Disk(DiskRow),
    /// The row of a VM's saved state.
    Saved(SavedStateRow),
    /// The fence record of an owner.
    Fence(FenceRow),
    /// A slot's generation rises.
    Rejoin {
        /// The slot in its last generation.
        from: Owner,
        /// The same slot in its new generation.
        to: Owner,
        /// The kernel's boot id under which `to` joins.
        boot: [u8; 16],
        /// Whether the VMs and imports of `from` go over to `to`; they are released otherwise.
        keep: bool,
    },
    /// Deletes a VM's row; its disks become kept disks, its saved state is freed.
    DeleteVm(VmUid),
    /// Deletes a disk and frees its extents.
    DeleteDisk(DiskId),
    /// Deletes a saved state and frees its extents.
    DeleteSaved(VmUid),
    /// Deletes a fence record whose victim no row names any more.
    DeleteFence(Owner),
    /// Raises features, which stay raised.
    Features(Features),
}

impl MetaRecord {
    /// Writes type, version, length and payload.
    ///
    /// # Panics
    /// When `body` has less room than the record needs, which is an error in the caller's layout.
    pub fn encode(&self, body: &mut BodyWriter<'_>) {
        let mut payload = [0; PAYLOAD_MAX];
        let mut fields = BodyWriter::new(&mut payload);
        self.encode_payload(&mut fields);
        let length = PAYLOAD_MAX - fields.room();
        body.u8(self.code());
        body.u8(VERSION);
        body.u16(u16::try_from(length).unwrap_or(u16::MAX));
        body.bytes(&payload[..length]);
    }

    const fn code(&self) -> u8 {
        match self {
            Self::Slot(_) => 1,
            Self::Vm(_) => 2,
            Self::Disk(_) => 3,
            Self::Saved(_) => 4,
            Self::Fence(_) => 5,
            Self::Rejoin { .. } => 6,
            Self::DeleteVm(_) => 7,
            Self::DeleteDisk(_) => 8,
            Self::DeleteSaved(_) => 9,
            Self::DeleteFence(_) => 10,
            Self::Features(_) => 11,
        }
    }

    fn encode_payload(&self, body: &mut BodyWriter<'_>) {
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
                encode_owner(Some(*from), body);
                encode_owner(Some(*to), body);
                body.bytes(boot);
                body.u8(u8::from(*keep));
            }
            Self::DeleteVm(vm) | Self::DeleteSaved(vm) => body.bytes(&vm.to_bytes()),
            Self::DeleteDisk(disk) => body.bytes(&disk.to_bytes()),
            Self::DeleteFence(victim) => encode_owner(Some(*victim), body),
            Self::Features(features) => body.u64(features.bits()),
        }
    }

    /// Reads a record.
    ///
    /// # Errors
    /// [`FormatError::Field`] for an unknown type, an undefined value, or a payload of another length than
    /// its fields; [`FormatError::Newer`] or [`FormatError::Older`] for another version.
    pub fn parse(body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        const LENGTH: FormatError = FormatError::Field("record length");
        let (code, version, length) = (body.u8(), body.u8(), body.u16());
        check_version(version.into(), VERSION.into())?;
        let mut payload = body.take(length.into()).ok_or(LENGTH)?;
        let record = Self::parse_payload(code, &mut payload)?;
        if payload.is_exhausted() {
            Ok(record)
        } else {
            Err(LENGTH)
        }
    }

    fn parse_payload(code: u8, body: &mut BodyReader<'_>) -> Result<Self, FormatError> {
        match code {
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
            11 => Ok(Self::Features(Features::from_bits(body.u64()))),
            _ => Err(FormatError::Field("record type")),
        }
    }
}

fn encode_slot(row: &SlotRow, body: &mut BodyWriter<'_>) {
    body.u16(row.slot.0);
    body.bytes(&row.node.to_bytes());
    body.u64(row.generation.0);
    body.bytes(&row.boot);
}

fn encode_vm(row: &VmRow, body: &mut BodyWriter<'_>) {
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

/// Runs are encoded in MiB, so that 24 of them fit beside the longest name.
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
