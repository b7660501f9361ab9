//! Reading and writing the parts of a machine that KVM holds.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_irqchip, kvm_pit_state2,
};

use crate::blob::Blob;
use crate::kvm::{BareVm, KvmError};
use crate::vcpu::{self, state::VcpuState};

const IRQCHIPS: [u32; 3] = [
    KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE,
    KVM_IRQCHIP_IOAPIC,
];

/// The states of all vCPUs, read at once.
pub(super) fn vcpus(vcpus: &[vcpu::Vcpu]) -> Result<Vec<VcpuState>, KvmError> {
    let pending: Vec<_> = vcpus
        .iter()
        .map(vcpu::Vcpu::save)
        .collect::<Result<_, _>>()?;
    pending.iter().map(vcpu::answer).collect()
}

pub(super) fn irqchips(bare: &BareVm) -> Result<Vec<Blob<kvm_irqchip>>, KvmError> {
    let read = |chip_id| {
        let mut chip = kvm_irqchip {
            chip_id,
            ..Default::default()
        };
        let read = bare.vm.get_irqchip(&mut chip);
        read.map_err(KvmError::ioctl("read an interrupt controller"))?;
        Ok(Blob::of(&chip))
    };
    IRQCHIPS.into_iter().map(read).collect()
}

pub(super) fn set_irqchips(bare: &BareVm, chips: &[Blob<kvm_irqchip>]) -> Result<(), KvmError> {
    chips.iter().try_for_each(|chip| {
        let set = bare.vm.set_irqchip(&chip.get());
        set.map_err(KvmError::ioctl("set an interrupt controller"))
    })
}

/// The interval timer, where the kernel has one.
pub(super) fn pit(bare: &BareVm) -> Result<Option<Blob<kvm_pit_state2>>, KvmError> {
    if !bare.has_pit {
        return Ok(None);
    }
    let pit = bare.vm.get_pit2();
    let pit = pit.map_err(KvmError::ioctl("read the interval timer"))?;
    Ok(Some(Blob::of(&pit)))
}

pub(super) fn set_pit(bare: &BareVm, pit: Option<&Blob<kvm_pit_state2>>) -> Result<(), KvmError> {
    match pit {
        Some(pit) if bare.has_pit => bare
            .vm
            .set_pit2(&pit.get())
            .map_err(KvmError::ioctl("set the interval timer")),
        _ => Ok(()),
    }
}
