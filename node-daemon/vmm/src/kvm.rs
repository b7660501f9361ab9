//! KVM: the capabilities of this host's, and the bare virtual machine with its RAM and interrupt
//! controllers. vCPUs are in `vcpu`.
#![expect(unsafe_code, reason = "memory slots hand host addresses to the kernel")]

use std::sync::Arc;

use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::errno;

use crate::layout;
use crate::memory::GuestMemory;

/// Why KVM cannot run this guest.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum KvmError {
    /// There is no usable `/dev/kvm`.
    #[error("cannot open /dev/kvm: hardware virtualization is off, or this process may not use it")]
    Open(#[source] errno::Error),
    /// The kernel's KVM lacks something without which no guest runs.
    #[error("this host's KVM lacks {what}")]
    Lacks { what: &'static str },
    /// More vCPUs than KVM runs.
    #[error("cpus: {requested} is not between 1 and {max}")]
    Cpus {
        requested: u32,
        /// The most that KVM and this machine's tables allow.
        max: u32,
    },
    /// The thread of a vCPU has panicked.
    #[error("a vCPU's thread is gone")]
    VcpuGone,
    /// An ioctl failed.
    #[error("cannot {action}")]
    Ioctl {
        /// The step that failed.
        action: &'static str,
        /// The kernel's answer.
        #[source]
        source: errno::Error,
    },
}

impl KvmError {
    /// For `map_err`: the ioctl that did `action` failed.
    pub(crate) const fn ioctl(action: &'static str) -> impl Fn(errno::Error) -> Self {
        move |source| Self::Ioctl { action, source }
    }
}

/// The most vCPUs: local APIC ids below 255, so that MADT needs no x2APIC entries.
pub const CPUS_MAX: u32 = 254;

/// Opens `/dev/kvm`.
///
/// # Errors
/// [`KvmError::Open`].
pub fn open() -> Result<Kvm, KvmError> {
    Kvm::new().map_err(KvmError::Open)
}

/// A virtual machine without vCPUs: RAM and in-kernel interrupt controllers.
#[derive(Debug)]
pub(crate) struct BareVm {
    pub(crate) kvm: Kvm,
    pub(crate) vm: Arc<VmFd>,
    pub(crate) has_pit: bool,
}

impl BareVm {
    /// A virtual machine of `kvm` with `memory` as its RAM, for `cpus` vCPUs.
    pub(crate) fn create(kvm: Kvm, memory: &GuestMemory, cpus: u32) -> Result<Self, KvmError> {
        check_host(&kvm, cpus)?;
        let vm = kvm
            .create_vm()
            .map_err(KvmError::ioctl("create a virtual machine"))?;
        // Both matter on Intel processors only, and must come before the first vCPU.
        vm.set_identity_map_address(layout::KVM_IDENTITY_MAP)
            .map_err(KvmError::ioctl("set the identity map address"))?;
        let tss = usize::try_from(layout::KVM_TSS).unwrap_or(usize::MAX);
        vm.set_tss_address(tss)
            .map_err(KvmError::ioctl("set the TSS address"))?;
        for (slot, region) in (0_u32..).zip(memory.iter()) {
            set_memory_slot(&vm, slot, region, 0).map_err(KvmError::ioctl("add guest memory"))?;
        }
        vm.create_irq_chip()
            .map_err(KvmError::ioctl("create the interrupt controllers"))?;
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        // Old guests calibrate by it. A kernel built without it runs every other guest.
        let has_pit = vm.create_pit2(pit).is_ok();
        Ok(Self {
            kvm,
            vm: Arc::new(vm),
            has_pit,
        })
    }
}

/// Tells KVM that `region` is memory slot `slot`, with `KVM_MEM_*` flags.
pub(crate) fn set_memory_slot(
    vm: &VmFd,
    slot: u32,
    region: &GuestRegionMmap<AtomicBitmap>,
    flags: u32,
) -> Result<(), errno::Error> {
    let host_address = region.as_ptr().expose_provenance();
    let slot_region = kvm_userspace_memory_region {
        slot,
        flags,
        guest_phys_addr: region.start_addr().raw_value(),
        memory_size: region.len(),
        userspace_addr: u64::try_from(host_address).map_err(|_| errno::Error::new(libc::EINVAL))?,
    };
    // SAFETY: the range is exactly one mapping of guest RAM. Slots are only ever the regions of a
    // GuestMemory whose Arc the machine holds until after its VM's last descriptor is closed, so
    // the kernel never writes through a mapping that is gone.
    unsafe { vm.set_user_memory_region(slot_region) }
}

/// Checks the capabilities that every guest needs.
fn check_host(kvm: &Kvm, cpus: u32) -> Result<(), KvmError> {
    if kvm.get_api_version() != 12 {
        return Err(KvmError::Lacks {
            what: "API version 12",
        });
    }
    let needed = [
        (Cap::Irqchip, "in-kernel interrupt controllers"),
        (Cap::UserMemory, "user memory regions"),
        (Cap::ImmediateExit, "immediate exit"),
        (Cap::MpState, "vCPU run states"),
        (Cap::ExtCpuid, "CPUID control"),
        (Cap::VcpuEvents, "vCPU events"),
        (Cap::Irqfd, "irqfd"),
        (Cap::Ioeventfd, "ioeventfd"),
    ];
    if let Some((_, what)) = needed.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
        return Err(KvmError::Lacks { what });
    }
    let max = u32::try_from(kvm.get_max_vcpus())
        .unwrap_or(u32::MAX)
        .min(CPUS_MAX);
    if cpus == 0 || cpus > max {
        return Err(KvmError::Cpus {
            requested: cpus,
            max,
        });
    }
    Ok(())
}
