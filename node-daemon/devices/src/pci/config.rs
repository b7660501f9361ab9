//! A function's configuration space (PCI Local Bus 3.0, chapter 6): 256 bytes, and for each byte a
//! mask of the bits that the guest may write. BARs size themselves through those masks.

use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::function::BarRegion;

/// The identification registers of a function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
    pub subsystem_vendor: u16,
    pub subsystem: u16,
}

/// The number of base address registers of a type 0 header.
pub const BAR_COUNT: usize = 6;

/// One function's configuration space.
#[derive(Clone, Debug)]
pub struct ConfigSpace {
    bytes: [u8; SPACE_BYTES],
    writable: [u8; SPACE_BYTES],
    bar_sizes: [u32; BAR_COUNT],
    last_capability: Option<usize>,
    next_free: usize,
}

/// The bytes of a configuration space, as saved.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigState(Vec<u8>);

impl ConfigSpace {
    /// A type 0 header with this identity, no BARs and no capabilities.
    #[must_use]
    pub fn new(identity: &Identity) -> Self {
        let mut space = Self {
            bytes: [0; SPACE_BYTES],
            writable: [0; SPACE_BYTES],
            bar_sizes: [0; BAR_COUNT],
            last_capability: None,
            next_free: FIRST_CAPABILITY,
        };
        space.put(VENDOR_ID, &identity.vendor.to_le_bytes());
        space.put(DEVICE_ID, &identity.device.to_le_bytes());
        space.put(REVISION_ID, &[identity.revision]);
        let [class, subclass, interface] = identity.class;
        space.put(CLASS_INTERFACE, &[interface, subclass, class]);
        space.put(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM_ID, &identity.subsystem.to_le_bytes());
        space.allow(COMMAND, &COMMAND_WRITABLE.to_le_bytes());
        // Firmware stores the interrupt line here; without INTx it has no meaning.
        space.allow(INTERRUPT_LINE, &[0xFF]);
        space.allow(CACHE_LINE_SIZE, &[0xFF]);
        space
    }

    /// Adds a 32-bit non-prefetchable memory BAR.
    ///
    /// # Panics
    /// When the index is not below 6, or the size is not a power of two of at least 4096.
    pub fn add_memory_bar(&mut self, bar: usize, size_bytes: u32) {
        assert!(bar < BAR_COUNT, "no BAR {bar}");
        assert!(
            size_bytes.is_power_of_two() && size_bytes >= 4096,
            "bad size of BAR {bar}"
        );
        self.bar_sizes[bar] = size_bytes;
        self.allow(bar_register(bar), &(!(size_bytes - 1)).to_le_bytes());
    }

    /// Appends a capability: `body` follows the id and the link to the next one. Returns the
    /// register at which the capability starts.
    ///
    /// # Panics
    /// When it does not fit into the 256 bytes: an error in the layout of the device.
    pub fn add_capability(&mut self, id: u8, body: &[u8]) -> usize {
        let start = self.next_free;
        let end = start + 2 + body.len();
        assert!(end <= SPACE_BYTES, "configuration space is full");
        self.put(start, &[id, 0]);
        self.put(start + 2, body);
        let link = u8::try_from(start).unwrap_or(0);
        match self.last_capability {
            Some(last) => self.put(last + 1, &[link]),
            None => {
                self.put(CAPABILITIES_POINTER, &[link]);
                self.put(STATUS, &STATUS_CAPABILITIES.to_le_bytes());
            }
        }
        self.last_capability = Some(start);
        self.next_free = end.next_multiple_of(4);
        start
    }

    /// Sets bytes regardless of the write masks.
    ///
    /// # Panics
    /// Beyond the end of the space.
    pub fn put(&mut self, register: usize, bytes: &[u8]) {
        self.bytes[register..register + bytes.len()].copy_from_slice(bytes);
    }

    /// Lets the guest write the bits that are set in `mask`.
    ///
    /// # Panics
    /// Beyond the end of the space.
    pub fn allow(&mut self, register: usize, mask: &[u8]) {
        self.writable[register..register + mask.len()].copy_from_slice(mask);
    }

    /// Reads bytes; beyond the end of the space they are zero.
    pub fn read(&self, register: u16, data: &mut [u8]) {
        for (index, byte) in data.iter_mut().enumerate() {
            let at = usize::from(register) + index;
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// A guest write: changes the writable bits only.
    pub fn write(&mut self, register: u16, data: &[u8]) {
        for (index, &new) in data.iter().enumerate() {
            let at = usize::from(register) + index;
            if let (Some(byte), Some(&mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = (*byte & !mask) | (new & mask);
            }
        }
    }

    /// The 16 bits at `register`.
    #[must_use]
    pub fn word(&self, register: u16) -> u16 {
        let mut data = [0; 2];
        self.read(register, &mut data);
        u16::from_le_bytes(data)
    }

    /// Index and size in bytes of each BAR.
    #[must_use]
    pub fn bar_sizes(&self) -> Vec<(usize, u64)> {
        let sizes = self.bar_sizes.iter().enumerate();
        sizes
            .filter(|(_, size)| **size != 0)
            .map(|(bar, &size)| (bar, u64::from(size)))
            .collect()
    }

    /// Sets the address of a BAR and enables memory decoding and bus mastering.
    ///
    /// # Panics
    /// When the address is not below 4 GiB or not aligned to the BAR's size.
    pub fn place_bar(&mut self, bar: usize, start: GuestAddress) {
        let address = u32::try_from(start.0).expect("BARs are below 4 GiB");
        assert!(
            address.is_multiple_of(self.bar_sizes[bar].max(1)),
            "BAR {bar} is not aligned"
        );
        self.put(bar_register(bar), &address.to_le_bytes());
        self.put(
            COMMAND,
            &(COMMAND_MEMORY | COMMAND_BUS_MASTER).to_le_bytes(),
        );
    }

    /// The BARs that decode at present.
    #[must_use]
    pub fn bars(&self) -> Vec<BarRegion> {
        if self.word(COMMAND_U16) & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let sizes = self.bar_sizes();
        sizes
            .into_iter()
            .map(|(bar, size_bytes)| BarRegion {
                bar,
                start: GuestAddress(u64::from(self.bar_address(bar))),
                size_bytes,
            })
            .collect()
    }

    /// The state to save.
    #[must_use]
    pub fn save(&self) -> ConfigState {
        ConfigState(self.bytes.to_vec())
    }

    /// Loads the guest-writable bits from a saved space.
    ///
    /// # Errors
    /// When a byte differs in bits that the guest cannot write: the saved function is not the same
    /// as this one. The text names the first such byte.
    pub fn restore(&mut self, state: &ConfigState) -> Result<(), String> {
        if state.0.len() != SPACE_BYTES {
            return Err(format!("configuration space of {} bytes", state.0.len()));
        }
        for (at, (&saved, (&own, &mask))) in state
            .0
            .iter()
            .zip(self.bytes.iter().zip(&self.writable))
            .enumerate()
        {
            if saved & !mask != own & !mask {
                return Err(format!(
                    "configuration byte {at:#x} is {saved:#x}, not {own:#x}"
                ));
            }
        }
        self.bytes.copy_from_slice(&state.0);
        Ok(())
    }

    fn bar_address(&self, bar: usize) -> u32 {
        let at = bar_register(bar);
        let bytes = &self.bytes[at..at + 4];
        let raw = bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| (value << 8) | u32::from(byte));
        raw & !0xF
    }
}

const fn bar_register(bar: usize) -> usize {
    FIRST_BAR + 4 * bar
}

const SPACE_BYTES: usize = 256;
const VENDOR_ID: usize = 0x00;
const DEVICE_ID: usize = 0x02;
const COMMAND: usize = 0x04;
const COMMAND_U16: u16 = 0x04;
const STATUS: usize = 0x06;
const REVISION_ID: usize = 0x08;
const CLASS_INTERFACE: usize = 0x09;
const CACHE_LINE_SIZE: usize = 0x0C;
const FIRST_BAR: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2C;
const SUBSYSTEM_ID: usize = 0x2E;
const CAPABILITIES_POINTER: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3C;
const FIRST_CAPABILITY: usize = 0x40;
const STATUS_CAPABILITIES: u16 = 1 << 4;
const COMMAND_MEMORY: u16 = 1 << 1;
const COMMAND_BUS_MASTER: u16 = 1 << 2;
/// Memory space, bus master, parity error response, SERR#, interrupt disable.
const COMMAND_WRITABLE: u16 = COMMAND_MEMORY | COMMAND_BUS_MASTER | (1 << 6) | (1 << 8) | (1 << 10);

#[cfg(test)]
mod tests;
