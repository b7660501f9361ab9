//! The KVM ioctls that kvm-ioctls lacks.
#![expect(unsafe_code, reason = "ioctls take raw pointers")]

use kvm_bindings::{
    KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_clear_dirty_log,
    kvm_clear_dirty_log__bindgen_ty_1, kvm_device_attr,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::errno;
use vmm_sys_util::ioctl::{ioctl_with_mut_ref, ioctl_with_ref};
use vmm_sys_util::{ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xC0, kvm_clear_dirty_log);
ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xE1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xE2, kvm_device_attr);

/// Clears dirty bits of a slot and write-protects those pages again (KVM API, 4.117). `words` has
/// a bit per page from `first_page` on, which is a multiple of 64; `pages` is one too unless the
/// range ends with the slot.
///
/// # Errors
/// As the kernel says; `EINVAL` when `words` is shorter than `pages` needs.
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    pages: u32,
    words: &[u64],
) -> Result<(), errno::Error> {
    if words.len() < usize::try_from(pages.div_ceil(64)).unwrap_or(usize::MAX) {
        return Err(errno::Error::new(libc::EINVAL));
    }
    let mut request = kvm_clear_dirty_log {
        slot,
        num_pages: pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the descriptor is a VM's; the structure is the one that this ioctl reads; the kernel
    // only reads `dirty_bitmap`, and of that one bit per page, which `words` was just checked to hold.
    let result = unsafe { ioctl_with_mut_ref(vm, KVM_CLEAR_DIRTY_LOG(), &mut request) };
    check(result)
}

/// How far this vCPU's time stamp counter is ahead of the host's (KVM vcpu device attributes, 4.1).
///
/// # Errors
/// `ENXIO` or `ENOTTY` where the kernel has no such attribute.
pub(crate) fn tsc_offset(vcpu: &VcpuFd) -> Result<u64, errno::Error> {
    let mut offset = 0_u64;
    tsc_offset_attribute(vcpu, KVM_GET_DEVICE_ATTR(), &mut offset)?;
    Ok(offset)
}

/// Sets what [`tsc_offset`] reads.
///
/// # Errors
/// `ENXIO` or `ENOTTY` where the kernel has no such attribute.
pub(crate) fn set_tsc_offset(vcpu: &VcpuFd, offset: u64) -> Result<(), errno::Error> {
    let mut offset = offset;
    tsc_offset_attribute(vcpu, KVM_SET_DEVICE_ATTR(), &mut offset)
}

fn tsc_offset_attribute(
    vcpu: &VcpuFd,
    request: libc::c_ulong,
    offset: &mut u64,
) -> Result<(), errno::Error> {
    let attribute = kvm_device_attr {
        flags: 0,
        group: KVM_VCPU_TSC_CTRL,
        attr: u64::from(KVM_VCPU_TSC_OFFSET),
        addr: u64::try_from(std::ptr::from_mut(offset).addr()).unwrap_or(0),
    };
    // Make the pointer's provenance available to the kernel, which gets it as an integer.
    let _exposed = std::ptr::from_mut(offset).expose_provenance();
    // SAFETY: the descriptor is a vCPU's; both requests read this structure; the kernel reads or
    // writes the eight bytes at `addr`, which is an exclusively borrowed u64.
    let result = unsafe { ioctl_with_ref(vcpu, request, &attribute) };
    check(result)
}

fn check(result: libc::c_int) -> Result<(), errno::Error> {
    if result < 0 {
        Err(errno::Error::last())
    } else {
        Ok(())
    }
}
