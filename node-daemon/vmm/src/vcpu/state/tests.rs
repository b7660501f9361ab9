//! The order in which a vCPU's state is read, on a vCPU whose timer expires during that.

use std::cell::Cell;

use kvm_bindings::kvm_xsave;

use super::*;

/// Offset of the first interrupt request register in the local APIC (SDM vol. 3, table 12-1).
const REQUESTS: usize = 0x200;
const DEADLINE: u64 = 1_000_000;

/// A parked vCPU with a timer that expires after `left` reads.
struct Expiring {
    left: Cell<u32>,
}

impl Expiring {
    /// One read: whether the timer has expired before it.
    fn expired(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left == 0
    }

    fn read<T: Default>(&self) -> Result<T, KvmError> {
        self.expired();
        Ok(T::default())
    }
}

impl Readable for Expiring {
    fn mp_state(&self) -> Result<kvm_mp_state, KvmError> {
        self.read()
    }

    fn regs(&self) -> Result<kvm_regs, KvmError> {
        self.read()
    }

    fn sregs(&self) -> Result<kvm_sregs, KvmError> {
        self.read()
    }

    fn xsave(&self, _: &StateShape) -> Result<Blob<[u8]>, KvmError> {
        self.expired();
        Ok(Blob::of_bytes(&[]))
    }

    fn xcrs(&self) -> Result<kvm_xcrs, KvmError> {
        self.read()
    }

    fn debugregs(&self) -> Result<kvm_debugregs, KvmError> {
        self.read()
    }

    fn msrs(&self, _: &[u32]) -> Result<Vec<(u32, u64)>, KvmError> {
        let deadline = if self.expired() { 0 } else { DEADLINE };
        Ok(vec![(msr::TSC_DEADLINE, deadline)])
    }

    fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
        let mut lapic = kvm_lapic_state::default();
        lapic.regs[REQUESTS] = i8::from(self.expired());
        Ok(lapic)
    }

    fn cpuid(&self) -> Result<Vec<kvm_cpuid_entry2>, KvmError> {
        self.read()
    }

    fn events(&self) -> Result<kvm_vcpu_events, KvmError> {
        self.read()
    }

    fn tsc(&self) -> (Option<u32>, Option<u64>) {
        (None, None)
    }
}

/// Whether the restored guest's timer expires, and whether its interrupt is pending already.
fn saved(reads: u32) -> (bool, bool) {
    let shape = StateShape {
        msrs: vec![msr::TSC_DEADLINE],
        xsave_bytes: size_of::<kvm_xsave>(),
        has_xcrs: true,
    };
    let vcpu = Expiring {
        left: Cell::new(reads),
    };
    let state = save(&vcpu, &shape).unwrap();
    let armed = state.msrs == [(msr::TSC_DEADLINE, DEADLINE)];
    (armed, state.lapic.get().regs[REQUESTS] != 0)
}

/// Snapshots of other hypervisors that read the local APIC first have had guests without a timer
/// (firecracker#4618).
#[test]
fn a_timer_that_expires_at_any_moment_of_a_save_is_not_lost() {
    assert_eq!(saved(0), (false, true), "the control: before all reads");
    assert_eq!(saved(100), (true, false), "the control: after all reads");
    for reads in 0..100 {
        let (armed, pending) = saved(reads);
        assert!(armed || pending, "expired after {reads} reads");
    }
}
