//! Reading and writing the whole state of one vCPU.
#![expect(
    unsafe_code,
    reason = "KVM_SET_XSAVE2 reads a buffer whose length only KVM knows"
)]

use kvm_bindings::{
    CpuId, kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use super::readable::Readable;
use super::shape::StateShape;
use super::{FirstRegisters, msr};
use crate::blob::Blob;
use crate::ioctl;
use crate::kvm::KvmError;

/// Everything about one vCPU, first layout. KVM's structures are kept byte for byte.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct VcpuState {
    pub(crate) cpuid: Vec<Blob<kvm_cpuid_entry2>>,
    pub(crate) mp_state: Blob<kvm_mp_state>,
    pub(crate) regs: Blob<kvm_regs>,
    pub(crate) sregs: Blob<kvm_sregs>,
    /// The XSAVE area, 4096 bytes or more.
    pub(crate) xsave: Blob<[u8]>,
    pub(crate) xcrs: Option<Blob<kvm_xcrs>>,
    pub(crate) debugregs: Blob<kvm_debugregs>,
    pub(crate) lapic: Blob<kvm_lapic_state>,
    pub(crate) msrs: Vec<(u32, u64)>,
    pub(crate) events: Blob<kvm_vcpu_events>,
    /// Rate of the guest's time stamp counter in kHz, where KVM reports it.
    pub(crate) tsc_khz: Option<u32>,
    /// Guest TSC minus host TSC, modulo 2^64, where KVM reports it.
    pub(crate) tsc_offset: Option<u64>,
}

/// Reads `vcpu`, which no thread runs.
///
/// # Ordering
/// The run state comes first, because KVM accepts pending INIT and SIPI there, which changes all
/// else; the events come last, because reading other state may raise some. The MSRs come before the local
/// APIC, as in QEMU (`kvm_arch_get_registers`): the timer of a parked vCPU may expire at any time, and KVM then clears
/// IA32_TSC_DEADLINE and makes the interrupt pending in the local APIC. Read before, the deadline is still set, and the
/// restored timer expires again, which a guest must expect. Read after a local APIC without the interrupt, it
/// is gone, and the guest waits for its timer without end.
pub(crate) fn save(vcpu: &impl Readable, shape: &StateShape) -> Result<VcpuState, KvmError> {
    let mp_state = vcpu.mp_state()?;
    let regs = vcpu.regs()?;
    let sregs = vcpu.sregs()?;
    let xsave = vcpu.xsave(shape)?;
    let xcrs = if shape.has_xcrs {
        Some(Blob::of(&vcpu.xcrs()?))
    } else {
        None
    };
    let debugregs = vcpu.debugregs()?;
    let msrs = vcpu.msrs(&shape.msrs)?;
    let lapic = vcpu.lapic()?;
    let cpuid = vcpu.cpuid()?;
    let events = vcpu.events()?;
    let (tsc_khz, tsc_offset) = vcpu.tsc();
    Ok(VcpuState {
        cpuid: cpuid.iter().map(Blob::of).collect(),
        mp_state: Blob::of(&mp_state),
        regs: Blob::of(&regs),
        sregs: Blob::of(&sregs),
        xsave,
        xcrs,
        debugregs: Blob::of(&debugregs),
        lapic: Blob::of(&lapic),
        msrs,
        events: Blob::of(&events),
        tsc_khz,
        tsc_offset,
    })
}

/// Writes `state` to `vcpu`, which has never run.
///
/// # Ordering
/// DESIGN §5. Registers before events, because setting registers drops pending exceptions; special
/// registers before the local APIC, because they hold its base; the local APIC before the MSRs,
/// because a deadline is only kept by a timer in deadline mode.
pub(crate) fn restore(
    vcpu: &VcpuFd,
    shape: &StateShape,
    state: &VcpuState,
) -> Result<(), KvmError> {
    let entries: Vec<_> = state.cpuid.iter().map(Blob::get).collect();
    let cpuid = CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks {
        what: "room for the CPUID entries",
    })?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(KvmError::ioctl("set CPUID"))?;
    scale_tsc(vcpu, state.tsc_khz);
    write(vcpu, shape, state, &state.msrs)
}

/// Returns `vcpu`, which may have run, to `power_on`, its state before its first instruction.
///
/// What the processor is stays as it is, also where the guest has come from another host: its CPUID, which
/// KVM lets nobody change once a vCPU has run; the MSRs that tell its features; the rate of its time stamp
/// counter. That counter runs on from the creation of the machine, the same for all vCPUs: a value that the
/// guest gave it is gone.
pub(crate) fn reset(
    vcpu: &VcpuFd,
    shape: &StateShape,
    power_on: &VcpuState,
) -> Result<(), KvmError> {
    // KVM accepts a pending INIT and SIPI here, and not in the middle of what follows.
    vcpu.get_mp_state()
        .map_err(KvmError::ioctl("read the run state"))?;
    let msrs: Vec<_> = power_on
        .msrs
        .iter()
        .copied()
        .filter(|(index, _)| msr::is_reset(*index))
        .collect();
    write(vcpu, shape, power_on, &msrs)?;
    if let Some(offset) = power_on.tsc_offset {
        ioctl::set_tsc_offset(vcpu, offset).map_err(KvmError::ioctl("set the TSC offset"))?;
    }
    Ok(())
}

/// Sets where a vCPU begins that was just created or reset.
pub(crate) fn set_first_registers(
    vcpu: &VcpuFd,
    (regs, sregs): &FirstRegisters,
) -> Result<(), KvmError> {
    vcpu.set_sregs(sregs)
        .map_err(KvmError::ioctl("set special registers"))?;
    vcpu.set_regs(regs)
        .map_err(KvmError::ioctl("set registers"))
}

/// Writes all of `state` but its CPUID and its time stamp counter's rate, with `msrs` in place of its own.
fn write(
    vcpu: &VcpuFd,
    shape: &StateShape,
    state: &VcpuState,
    msrs: &[(u32, u64)],
) -> Result<(), KvmError> {
    vcpu.set_mp_state(state.mp_state.get())
        .map_err(KvmError::ioctl("set the run state"))?;
    vcpu.set_regs(&state.regs.get())
        .map_err(KvmError::ioctl("set registers"))?;
    vcpu.set_sregs(&state.sregs.get())
        .map_err(KvmError::ioctl("set special registers"))?;
    write_xsave(vcpu, shape, &state.xsave)?;
    if let (Some(xcrs), true) = (&state.xcrs, shape.has_xcrs) {
        vcpu.set_xcrs(&xcrs.get())
            .map_err(KvmError::ioctl("set extended control registers"))?;
    }
    vcpu.set_debug_regs(&state.debugregs.get())
        .map_err(KvmError::ioctl("set debug registers"))?;
    vcpu.set_lapic(&state.lapic.get())
        .map_err(KvmError::ioctl("set the local APIC"))?;
    msr::write(vcpu, msrs)?;
    vcpu.set_vcpu_events(&state.events.get())
        .map_err(KvmError::ioctl("set events"))
}

/// A guest keeps its TSC rate where the host can scale. Where it cannot, its clock source copes
/// (kvm-clock carries the rate), and a warning is logged.
fn scale_tsc(vcpu: &VcpuFd, khz: Option<u32>) {
    let Some(khz) = khz else {
        return;
    };
    let here = vcpu.get_tsc_khz().ok();
    if here != Some(khz) && vcpu.set_tsc_khz(khz).is_err() {
        tracing::warn!(
            there = khz,
            here,
            "time stamp counter rates differ and cannot be scaled"
        );
    }
}

fn write_xsave(vcpu: &VcpuFd, shape: &StateShape, saved: &Blob<[u8]>) -> Result<(), KvmError> {
    let mut xsave = shape.xsave()?;
    let mut words = saved.bytes().chunks_exact(4).map(|four| {
        four.iter()
            .rev()
            .fold(0_u32, |word, byte| (word << 8) | u32::from(*byte))
    });
    let room = xsave.as_fam_struct_ref().xsave.region.len() + xsave.as_slice().len();
    if words.len() > room {
        return Err(KvmError::Lacks {
            what: "the processor features that the saved guest uses",
        });
    }
    // SAFETY: only words of the fixed area are changed, not the length of what follows.
    let fixed = unsafe { &mut xsave.as_mut_fam_struct().xsave.region };
    for (to, from) in fixed.iter_mut().zip(words.by_ref()) {
        *to = from;
    }
    for (to, from) in xsave.as_mut_slice().iter_mut().zip(words) {
        *to = from;
    }
    // SAFETY: the buffer is at least as long as KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) said on this
    // VM's descriptor (`StateShape::of`), and no dynamic feature was enabled since.
    let result = unsafe { vcpu.set_xsave2(&xsave) };
    result.map_err(KvmError::ioctl("set the XSAVE area"))
}

#[cfg(test)]
mod tests;
