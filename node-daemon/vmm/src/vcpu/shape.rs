//! What a vCPU's state has under this kernel.

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use vmm_sys_util::fam::FamStruct;

use super::msr;
use crate::kvm::KvmError;

/// Sizes and capabilities needed to read a vCPU's state, determined once per machine.
#[derive(Clone, Debug)]
pub(crate) struct StateShape {
    pub(crate) msrs: Vec<u32>,
    /// Length of the XSAVE area in bytes.
    pub(crate) xsave_bytes: usize,
    pub(crate) has_xcrs: bool,
}

impl StateShape {
    /// The shape of `vcpu`'s state under this kernel.
    pub(crate) fn of(kvm: &kvm_ioctls::Kvm, vm: &VmFd, vcpu: &VcpuFd) -> Result<Self, KvmError> {
        let offered = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        Ok(Self {
            msrs: msr::readable(kvm, vcpu)?,
            xsave_bytes: offered.max(size_of::<kvm_xsave>()),
            has_xcrs: vm.check_extension(Cap::Xcrs),
        })
    }

    /// An empty XSAVE area.
    pub(super) fn xsave(&self) -> Result<Xsave, KvmError> {
        let beyond = self.xsave_bytes - size_of::<kvm_xsave>();
        Xsave::new(beyond.div_ceil(size_of::<<kvm_bindings::kvm_xsave2 as FamStruct>::Entry>()))
            .map_err(|_| KvmError::Lacks {
                what: "room for the XSAVE area",
            })
    }
}
