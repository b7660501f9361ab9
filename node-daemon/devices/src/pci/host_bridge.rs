//! The host bridge at 00:00.0: identification registers only. Guests probe it to detect a PCI bus.

use bascule_types::WriterState;
use vm_memory::GuestAddress;

use super::config::{ConfigSpace, ConfigState, Identity};
use super::function::{BarRegion, PciFunction};
use crate::device::Device;
use crate::state::{DeviceState, RestoreError};

/// A host bridge without registers.
#[derive(Debug)]
pub(super) struct HostBridge {
    config: ConfigSpace,
}

impl HostBridge {
    pub(super) fn new() -> Self {
        Self {
            config: ConfigSpace::new(&IDENTITY),
        }
    }
}

impl Device for HostBridge {
    fn name(&self) -> &'static str {
        KIND
    }

    fn pause(&mut self) -> WriterState {
        WriterState::Clean
    }

    fn resume(&mut self) {}

    fn save(&self) -> DeviceState {
        DeviceState::new(KIND, VERSION, &self.config.save())
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let config: ConfigState = state.parse(KIND, KIND, VERSION)?;
        self.config
            .restore(&config)
            .map_err(|reason| RestoreError::DoesNotFit {
                device: KIND.to_owned(),
                reason,
            })
    }

    fn reset(&mut self) {
        self.config = ConfigSpace::new(&IDENTITY);
    }
}

impl PciFunction for HostBridge {
    fn config_read(&mut self, register: u16, data: &mut [u8]) {
        self.config.read(register, data);
    }

    fn config_write(&mut self, register: u16, data: &[u8]) {
        self.config.write(register, data);
    }

    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        Vec::new()
    }

    fn place_bar(&mut self, _bar: usize, _start: GuestAddress) {}

    fn bars(&self) -> Vec<BarRegion> {
        Vec::new()
    }

    fn bar_read(&mut self, _bar: usize, _offset: u64, _data: &mut [u8]) {}

    fn bar_write(&mut self, _bar: usize, _offset: u64, _data: &[u8]) {}
}

const KIND: &str = "host-bridge";
/// The first layout: the configuration space.
const VERSION: u32 = 1;
/// Intel's id for a host bridge that VMMs commonly use; no driver binds to it.
const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x0D57,
    revision: 0,
    class: [0x06, 0, 0],
    subsystem_vendor: 0,
    subsystem: 0,
};
