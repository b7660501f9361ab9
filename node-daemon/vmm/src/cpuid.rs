//! The guest's CPUID: the host's as KVM offers it, with the topology
//! and identity of each vCPU filled in, and without hardware virtualization: a guest that runs guests
//! has state in the processor that is neither saved nor migrated.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};

use crate::kvm::KvmError;

/// Leaf 1, ECX: VMX (SDM vol. 2, CPUID).
const VMX: u32 = 1 << 5;
/// Leaf 0x8000_0001, ECX: SVM (APM vol. 3, E.4.2).
const SVM: u32 = 1 << 2;
/// Leaf 1, ECX: the local APIC timer takes a deadline in TSC ticks (SDM vol. 2, CPUID).
const TSC_DEADLINE: u32 = 1 << 24;
/// Leaf 1, ECX: running under a hypervisor.
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: more than one logical processor in the package.
const HTT: u32 = 1 << 28;
/// Leaf 4, EAX 31..14: processor counts, as KVM copies them from the host.
const CACHE_COUNTS: u32 = 0xFFFF_C000;
/// Leaf 0x8000_0001, ECX: the topology extension leaves are there (APM vol. 3, E.4.2).
const AMD_TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
/// Leaf 0x8000_0001, ECX: `CmpLegacy`, core multi-processing.
const AMD_CMP_LEGACY: u32 = 1 << 1;
/// KVM leaf 0x4000_0001, EAX: asynchronous page faults, which need the source's memory management
/// state to survive a migration and gain nothing without swapping.
const KVM_ASYNC_PF: u32 = (1 << 4) | (1 << 10) | (1 << 14);
/// Levels of leaf 0xB (SDM vol. 2, CPUID): threads, then cores.
const LEVEL_TYPE_THREAD: u32 = 1 << 8;
const LEVEL_TYPE_CORE: u32 = 2 << 8;

/// CPUID common to all vCPUs of a machine.
#[derive(Clone, Debug)]
pub(crate) struct CpuModel {
    entries: Vec<kvm_cpuid_entry2>,
    cpus: u32,
}

impl CpuModel {
    /// This host's processor as far as KVM can virtualize it: one package with `cpus` cores, one thread
    /// per core.
    pub(crate) fn host(kvm: &Kvm, cpus: u32) -> Result<Self, KvmError> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::ioctl("read the supported CPUID"))?;
        let deadline = kvm.check_extension(Cap::TscDeadlineTimer);
        let entries = supported
            .as_slice()
            .iter()
            .map(|entry| common(*entry, deadline))
            .collect();
        Ok(Self { entries, cpus })
    }

    /// The CPUID of vCPU `index`, whose APIC id is its index.
    pub(crate) fn of_vcpu(&self, index: u32) -> Result<CpuId, KvmError> {
        let mut entries: Vec<_> = self.entries.clone();
        for entry in &mut entries {
            identify(entry, index, self.cpus);
        }
        if entries.iter().all(|entry| entry.function != 0xB) && self.has_leaf(0xB) {
            entries.extend(topology_leaves(index, self.cpus));
        }
        CpuId::from_entries(&entries).map_err(|_| KvmError::Lacks {
            what: "room for the CPUID entries",
        })
    }

    /// Whether the highest basic leaf reaches `leaf`.
    fn has_leaf(&self, leaf: u32) -> bool {
        let zero = self.entries.iter().find(|entry| entry.function == 0);
        zero.is_some_and(|entry| entry.eax >= leaf)
    }
}

fn common(mut entry: kvm_cpuid_entry2, deadline: bool) -> kvm_cpuid_entry2 {
    match entry.function {
        1 => {
            entry.ecx = (entry.ecx | HYPERVISOR) & !VMX;
            if deadline {
                entry.ecx |= TSC_DEADLINE;
            }
        }
        0x8000_0001 => entry.ecx &= !SVM,
        // SVM's revision and features (APM vol. 3, E.4.9).
        0x8000_000A => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        0x4000_0001 => entry.eax &= !KVM_ASYNC_PF,
        _ => {}
    }
    entry
}

/// Fills in the APIC id and topology of vCPU `index` of `cpus`.
fn identify(entry: &mut kvm_cpuid_entry2, index: u32, cpus: u32) {
    match (entry.function, entry.index) {
        (1, _) => {
            entry.ebx = (entry.ebx & 0xFFFF) | ((cpus & 0xFF) << 16) | (index << 24);
            entry.edx = if cpus > 1 {
                entry.edx | HTT
            } else {
                entry.edx & !HTT
            };
        }
        // Caches are reported as private to each core: no false sharing of scheduling domains.
        (4, _) => {
            let cores = cpus.next_power_of_two().clamp(1, 64) - 1;
            entry.eax = (entry.eax & !CACHE_COUNTS) | (cores << 26);
        }
        (0xB | 0x1F, 0) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 1, LEVEL_TYPE_THREAD, index);
        }
        (0xB | 0x1F, 1) => {
            let shift = id_bits(cpus);
            (entry.eax, entry.ebx, entry.ecx, entry.edx) =
                (shift, cpus, LEVEL_TYPE_CORE | 1, index);
        }
        (0xB | 0x1F, level) => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, level & 0xFF, index);
        }
        (0x8000_0001, _) if cpus > 1 && entry.ecx & AMD_TOPOLOGY_EXTENSIONS != 0 => {
            entry.ecx |= AMD_CMP_LEGACY;
        }
        // Core count and the width of the core id within the APIC id (APM vol. 3, E.4.7).
        (0x8000_0008, _) => entry.ecx = (cpus - 1) | (id_bits(cpus) << 12),
        // One thread per core, one node (APM vol. 3, E.4.15).
        (0x8000_001E, _) => {
            (entry.eax, entry.ebx, entry.ecx) = (index, index & 0xFF, 0);
        }
        _ => {}
    }
}

/// Both levels of leaf 0xB, for a host whose list ends before them.
fn topology_leaves(index: u32, cpus: u32) -> [kvm_cpuid_entry2; 2] {
    [0, 1].map(|level| {
        let mut entry = kvm_cpuid_entry2 {
            function: 0xB,
            index: level,
            flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            ..Default::default()
        };
        identify(&mut entry, index, cpus);
        entry
    })
}

/// Bits of an APIC id that number the cores of one package.
const fn id_bits(cpus: u32) -> u32 {
    cpus.next_power_of_two().trailing_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, of: u32, cpus: u32) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        identify(&mut entry, of, cpus);
        entry
    }

    #[test]
    fn apic_ids_and_counts_follow_the_topology() {
        assert_eq!(leaf(1, 0, 2, 3).ebx, (3 << 16) | (2 << 24));
        assert_eq!(leaf(1, 0, 2, 3).edx & HTT, HTT);
        assert_eq!(leaf(1, 0, 0, 1).edx & HTT, 0);
        let cores = leaf(0xB, 1, 2, 3);
        assert_eq!(
            (cores.eax, cores.ebx, cores.ecx, cores.edx),
            (2, 3, 0x201, 2)
        );
        assert_eq!(leaf(0x8000_0008, 0, 0, 4).ecx, 3 | (2 << 12));
        assert_eq!(leaf(0x8000_001E, 0, 3, 4).eax, 3);
    }

    #[test]
    fn hardware_virtualization_is_not_offered() {
        let offered = |function| {
            let all = kvm_cpuid_entry2 {
                function,
                eax: u32::MAX,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            };
            common(all, true)
        };
        assert_eq!(offered(1).ecx, !VMX);
        assert_eq!(offered(0x8000_0001).ecx, !SVM);
        let svm = offered(0x8000_000A);
        assert_eq!((svm.eax, svm.ebx, svm.ecx, svm.edx), (0, 0, 0, 0));
    }
}
