//! The model-specific registers in a vCPU's state: their list, reading and writing.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::{Kvm, VcpuFd};

use crate::kvm::KvmError;

/// IA32_TSC.
pub(crate) const TSC: u32 = 0x10;
/// IA32_MISC_ENABLE.
const MISC_ENABLE: u32 = 0x1A0;
/// Fast string operations.
const MISC_ENABLE_FAST_STRING: u64 = 1;
/// IA32_MTRR_DEF_TYPE.
const MTRR_DEF_TYPE: u32 = 0x2FF;
/// MTRRs on, and everything write-back.
const MTRR_DEF_TYPE_WRITE_BACK: u64 = (1 << 11) | 6;
/// IA32_TSC_DEADLINE.
pub(crate) const TSC_DEADLINE: u32 = 0x6E0;
/// Memory type range registers: KVM's list leaves them out (SDM vol. 3, 12.11).
const MTRRS: [std::ops::RangeInclusive<u32>; 5] = [
    0x200..=0x20F,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26F,
    MTRR_DEF_TYPE..=MTRR_DEF_TYPE,
];
/// What a processor is, in registers that a reset leaves alone: KVM refuses to change most of them once a
/// vCPU has run. Microcode revision, platform information, core capabilities, architectural capabilities,
/// performance capabilities, VMX capabilities, AMD's decoder configuration.
const FEATURES: [std::ops::RangeInclusive<u32>; 6] = [
    0x8B..=0x8B,
    0xCE..=0xCF,
    0x10A..=0x10A,
    0x345..=0x345,
    0x480..=0x493,
    0xC001_1029..=0xC001_1029,
];
/// At most this many at once (KVM's `MAX_IO_MSRS` is 256).
const BATCH: usize = 128;

/// The numbers of all registers that KVM keeps per vCPU, as far as `vcpu` can read them.
pub(crate) fn readable(kvm: &Kvm, vcpu: &VcpuFd) -> Result<Vec<u32>, KvmError> {
    let listed = kvm
        .get_msr_index_list()
        .map_err(KvmError::ioctl("list MSRs"))?;
    let mut wanted: Vec<u32> = listed.as_slice().to_vec();
    wanted.extend(MTRRS.into_iter().flatten());
    wanted.extend([TSC, TSC_DEADLINE]);
    wanted.sort_unstable();
    wanted.dedup();
    wanted.retain(|index| matches!(read(vcpu, &[*index]), Ok(values) if values.len() == 1));
    Ok(wanted)
}

/// Whether a reset returns register `index` to its value at power-on: features stay, and the time stamp
/// counter has an offset of its own.
pub(crate) fn is_reset(index: u32) -> bool {
    index != TSC && !FEATURES.iter().any(|range| range.contains(&index))
}

/// Reads `indices`, in their order.
pub(crate) fn read(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
    let mut values = Vec::with_capacity(indices.len());
    for batch in indices.chunks(BATCH) {
        let entries: Vec<_> = batch.iter().map(|index| entry(*index, 0)).collect();
        let mut msrs = container(&entries)?;
        let read = vcpu
            .get_msrs(&mut msrs)
            .map_err(KvmError::ioctl("read MSRs"))?;
        let filled = msrs.as_slice().iter().take(read);
        values.extend(filled.map(|msr| (msr.index, msr.data)));
    }
    Ok(values)
}

/// Writes `values`, TSC first and TSC_DEADLINE last: a deadline is armed against the clock in force.
/// A register that this host refuses to write, such as a read-only capability, is skipped and
/// logged: the source's kernel may know registers that this one does not.
pub(crate) fn write(vcpu: &VcpuFd, values: &[(u32, u64)]) -> Result<(), KvmError> {
    let mut ordered: Vec<_> = values
        .iter()
        .map(|(index, data)| entry(*index, *data))
        .collect();
    ordered.sort_by_key(|msr| match msr.index {
        TSC => 0,
        TSC_DEADLINE => 2,
        _ => 1,
    });
    let mut rest = ordered.as_slice();
    while !rest.is_empty() {
        let (batch, _) = rest.split_at(rest.len().min(BATCH));
        let msrs = container(batch)?;
        let written = vcpu
            .set_msrs(&msrs)
            .map_err(KvmError::ioctl("write MSRs"))?;
        if let Some(refused) = batch.get(written) {
            let (index, value) = (refused.index, refused.data);
            tracing::debug!(
                index = format_args!("{index:#x}"),
                value,
                "MSR not restored"
            );
        }
        let step = if written < batch.len() {
            written + 1
        } else {
            written
        };
        rest = rest.get(step..).unwrap_or_default();
    }
    Ok(())
}

/// Sets the registers that firmware would have initialized.
pub(crate) fn set_up(vcpu: &VcpuFd) -> Result<(), KvmError> {
    write(
        vcpu,
        &[
            (MISC_ENABLE, MISC_ENABLE_FAST_STRING),
            (MTRR_DEF_TYPE, MTRR_DEF_TYPE_WRITE_BACK),
        ],
    )
}

fn entry(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

fn container(entries: &[kvm_msr_entry]) -> Result<Msrs, KvmError> {
    Msrs::from_entries(entries).map_err(|_| KvmError::Lacks {
        what: "room for the MSRs",
    })
}
