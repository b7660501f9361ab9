//! The start of a machine: its state at power-on, and the images that are loaded. [`super::reset`] starts it again.

use std::sync::Arc;

use bascule_types::VmUid;
use kvm_bindings::{kvm_irqchip, kvm_pit_state2};

use super::{BuildError, parts};
use crate::blob::Blob;
use crate::boot::{Entry, OpenImages};
use crate::kvm::{BareVm, KvmError};
use crate::memory::GuestMemory;
use crate::vcpu::Vcpu;
use crate::vcpu::state::VcpuState;
use crate::{acpi, boot, smbios};

/// What the firmware tables say of a machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Identity {
    pub(super) cpus: u32,
    pub(super) uid: VmUid,
}

/// What a reset returns to and loads.
pub(crate) struct Start {
    pub(super) identity: Identity,
    pub(super) vcpus: Vec<Arc<VcpuState>>,
    pub(super) irqchips: Vec<Blob<kvm_irqchip>>,
    pub(super) pit: Option<Blob<kvm_pit_state2>>,
    pub(super) images: OpenImages,
}

impl Start {
    /// Of a machine that was just created.
    pub(super) fn of(
        identity: Identity,
        vcpus: &[Vcpu],
        bare: &BareVm,
        images: OpenImages,
    ) -> Result<Self, KvmError> {
        let states = parts::vcpus(vcpus)?.into_iter().map(Arc::new);
        Ok(Self {
            identity,
            vcpus: states.collect(),
            irqchips: parts::irqchips(bare)?,
            pit: parts::pit(bare)?,
            images,
        })
    }
}

/// Loads the images, the ACPI and the SMBIOS tables into memory that is all zero.
pub(super) fn load(
    memory: &GuestMemory,
    identity: Identity,
    source: boot::BootSource,
) -> Result<Entry, BuildError> {
    let rsdp = acpi::write(memory, identity.cpus).map_err(BuildError::Tables)?;
    smbios::write(memory, identity.uid).map_err(BuildError::Tables)?;
    Ok(boot::load(memory, source, rsdp)?)
}
