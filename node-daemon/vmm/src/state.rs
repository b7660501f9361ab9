//! The saved state of a whole machine, without its RAM.
//!
//! # Constraints
//! - Written by one release, read by the next two and the previous two: fields may be added with a
//!   default, nothing is ever given another meaning; anything else takes a new [`VERSION`].
//! - JSON: small (some ten KiB per vCPU, and at most 350 KiB of serial output), readable in a debugger. Kernel structures are base64.
//! - It comes from a peer: every length is bounded by the message that carries it, every structure
//!   has its exact size, and KVM checks the values.
//!
//! Not included: the address space (`layout`), which is fixed; the configuration, which the destination
//! has of its own; and the guest's ACPI tables, which are in RAM.

use bascule_devices::state::DeviceState;
use bascule_ipc::vm::PanicStatus;
use bascule_types::Bytes;
use kvm_bindings::{kvm_clock_data, kvm_irqchip, kvm_pit_state2};
use serde::{Deserialize, Serialize};

use crate::blob::Blob;
use crate::console::SavedConsole;
use crate::rtc::SavedRtc;
use crate::serial::SavedSerial;
use crate::vcpu::state::VcpuState;

/// The layout that this release writes.
///
/// 1: the first.
pub const VERSION: u32 = 1;

/// Everything about a paused machine but its RAM.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MachineState {
    /// [`VERSION`] of the writer.
    pub(crate) version: u32,
    pub(crate) memory: Bytes,
    pub(crate) vcpus: Vec<VcpuState>,
    /// Master and slave 8259, I/O APIC.
    pub(crate) irqchips: Vec<Blob<kvm_irqchip>>,
    pub(crate) pit: Option<Blob<kvm_pit_state2>>,
    pub(crate) clock: Blob<kvm_clock_data>,
    pub(crate) serial: SavedSerial,
    /// Pending power events that the guest has not read.
    pub(crate) power_events: u8,
    pub(crate) devices: DeviceState,
    /// How often the machine was reset in place since the guest's start.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub(crate) resets: u32,
    /// The age of the power management timer in nanoseconds; none in a machine without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pm_timer_ns: Option<u64>,
    /// The CMOS clock; none in a machine without one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) rtc: Option<SavedRtc>,
    /// The last serial output; none from a release that did not keep it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) console: Option<SavedConsole>,
    /// The panics of the guest's kernel; none in a machine without a pvpanic device.
    #[serde(default, skip_serializing_if = "PanicStatus::is_none")]
    pub(crate) panics: PanicStatus,
}

/// A saved state that this release cannot use.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// Not a machine state, or truncated.
    #[error("malformed machine state")]
    Malformed(#[source] serde_json::Error),
    /// From another release.
    #[error("machine state version {found} is not known, the newest known is {VERSION}")]
    Version {
        /// The state's version.
        found: u64,
    },
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
const fn is_zero(count: &u32) -> bool {
    *count == 0
}

impl MachineState {
    /// The bytes to send or store.
    ///
    /// # Errors
    /// [`StateError::Malformed`] never happens for a state that was saved.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        serde_json::to_vec(self).map_err(StateError::Malformed)
    }

    /// Reads what [`MachineState::encode`] wrote.
    ///
    /// # Errors
    /// When the bytes are not a state or of a version that is not known.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        /// The field that is read before all else.
        #[derive(Deserialize)]
        struct Head {
            version: u64,
        }
        let head: Head = serde_json::from_slice(bytes).map_err(StateError::Malformed)?;
        if head.version != u64::from(VERSION) {
            return Err(StateError::Version {
                found: head.version,
            });
        }
        serde_json::from_slice(bytes).map_err(StateError::Malformed)
    }

    /// Number of vCPUs.
    #[must_use]
    pub fn cpus(&self) -> usize {
        self.vcpus.len()
    }
}

#[cfg(test)]
mod tests;
