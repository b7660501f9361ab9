//! PCI addresses: device numbers, and decoding of configuration accesses.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A device on bus 0, `0..32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DeviceNumber(pub u8);

impl fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "00:{:02x}.0", self.0)
    }
}

/// The address of a configuration access.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct PciAddress {
    pub bus: u8,
    pub device: DeviceNumber,
    pub function: u8,
    /// The byte in the configuration space, below 4096.
    pub register: u16,
}

impl PciAddress {
    /// Decodes an offset into the ECAM window (PCI Express 5.0, 7.2.2): bus 27:20, device 19:15,
    /// function 14:12, register 11:0.
    #[must_use]
    pub fn from_ecam(offset: u64) -> Self {
        Self {
            bus: bits(offset, 20, 8),
            device: DeviceNumber(bits(offset, 15, 5)),
            function: bits(offset, 12, 3),
            register: u16::from(bits(offset, 0, 8)) | (u16::from(bits(offset, 8, 4)) << 8),
        }
    }

    /// Decodes the address register of mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2) together with
    /// the byte of the data register that is accessed. `None` when the enable bit is off.
    #[must_use]
    pub fn from_mechanism_1(address: u32, data_byte: u8) -> Option<Self> {
        let enabled = address & (1 << 31) != 0;
        let address = u64::from(address);
        enabled.then(|| Self {
            bus: bits(address, 16, 8),
            device: DeviceNumber(bits(address, 11, 5)),
            function: bits(address, 8, 3),
            register: u16::from(bits(address, 0, 8) & !3) + u16::from(data_byte & 3),
        })
    }
}

/// `count` (at most 8) bits of `value`, starting at bit `low`.
fn bits(value: u64, low: u32, count: u32) -> u8 {
    let masked = (value >> low) & ((1 << count) - 1);
    u8::try_from(masked).unwrap_or(u8::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_mechanisms_address_the_same_byte() {
        let ecam = PciAddress::from_ecam((3 << 15) | 0x41);
        assert_eq!(
            PciAddress::from_mechanism_1(0x8000_0000 | (3 << 11) | 0x40, 1),
            Some(ecam)
        );
        assert_eq!(ecam.device, DeviceNumber(3));
        assert_eq!(ecam.register, 0x41);
        assert_eq!(PciAddress::from_mechanism_1(3 << 11, 0), None);
    }

    #[test]
    fn ecam_reaches_the_extended_registers() {
        let address = PciAddress::from_ecam(0x0123_4FFF);
        assert_eq!(address.register, 0xFFF);
        assert_eq!(
            (address.bus, address.device.0, address.function),
            (0x12, 6, 4)
        );
    }
}
