//! The parts of a vCPU's state, each read by one ioctl.
#![expect(
    unsafe_code,
    reason = "KVM_GET_XSAVE2 writes a buffer whose length only KVM knows"
)]

use kvm_bindings::{
    kvm_cpuid_entry2, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::VcpuFd;

use super::msr;
use super::shape::StateShape;
use crate::blob::Blob;
use crate::ioctl;
use crate::kvm::KvmError;

/// A parked vCPU, whose state changes between two reads all the same: its timer may expire.
pub(crate) trait Readable {
    fn mp_state(&self) -> Result<kvm_mp_state, KvmError>;
    fn regs(&self) -> Result<kvm_regs, KvmError>;
    fn sregs(&self) -> Result<kvm_sregs, KvmError>;
    fn xsave(&self, shape: &StateShape) -> Result<Blob<[u8]>, KvmError>;
    fn xcrs(&self) -> Result<kvm_xcrs, KvmError>;
    fn debugregs(&self) -> Result<kvm_debugregs, KvmError>;
    fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError>;
    fn lapic(&self) -> Result<kvm_lapic_state, KvmError>;
    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError>;
    fn events(&self) -> Result<kvm_vcpu_events, KvmError>;
    /// Rate in kHz and offset of the time stamp counter, where KVM reports them.
    fn tsc(&self) -> (Option<u32>, Option<u64>);
}

impl Readable for VcpuFd {
    fn mp_state(&self) -> Result<kvm_mp_state, KvmError> {
        let read = self.get_mp_state();
        read.map_err(KvmError::ioctl("read the run state"))
    }

    fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.get_regs().map_err(KvmError::ioctl("read registers"))
    }

    fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        let read = self.get_sregs();
        read.map_err(KvmError::ioctl("read special registers"))
    }

    fn xsave(&self, shape: &StateShape) -> Result<Blob<[u8]>, KvmError> {
        let mut xsave = shape.xsave()?;
        // SAFETY: the buffer is at least as long as KVM_CHECK_EXTENSION(KVM_CAP_XSAVE2) said on this
        // VM's descriptor (`StateShape::of`), and no dynamic feature was enabled since.
        let result = unsafe { self.get_xsave2(&mut xsave) };
        result.map_err(KvmError::ioctl("read the XSAVE area"))?;
        let fixed = xsave.as_fam_struct_ref().xsave.region;
        let words = fixed.iter().chain(xsave.as_slice());
        let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
        Ok(Blob::of_bytes(&bytes))
    }

    fn xcrs(&self) -> Result<kvm_xcrs, KvmError> {
        let read = self.get_xcrs();
        read.map_err(KvmError::ioctl("read extended control registers"))
    }

    fn debugregs(&self) -> Result<kvm_debugregs, KvmError> {
        let read = self.get_debug_regs();
        read.map_err(KvmError::ioctl("read debug registers"))
    }

    fn msrs(&self, indices: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        msr::read(self, indices)
    }

    fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
        let read = self.get_lapic();
        read.map_err(KvmError::ioctl("read the local APIC"))
    }

    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        let cpuid = self.get_cpuid2(kvm_bindings::KVM_MAX_CPUID_ENTRIES);
        let cpuid = cpuid.map_err(KvmError::ioctl("read CPUID"))?;
        Ok(cpuid.as_slice().to_vec())
    }

    fn events(&self) -> Result<kvm_vcpu_events, KvmError> {
        let read = self.get_vcpu_events();
        read.map_err(KvmError::ioctl("read events"))
    }

    fn tsc(&self) -> (Option<u32>, Option<u64>) {
        (self.get_tsc_khz().ok(), ioctl::tsc_offset(self).ok())
    }
}
