//! Dispatch of a vCPU's accesses to I/O ports and MMIO.

use std::sync::Arc;

use bascule_devices::pci::PciRoot;
use vm_memory::GuestAddress;

use crate::layout;
use crate::pm_timer::PmTimer;
use crate::power::{Power, PowerRequest};
use crate::pvpanic::Pvpanic;
use crate::rtc::Rtc;
use crate::serial::SerialPort;

/// All devices with ports or MMIO. Shared by all vCPU threads.
#[derive(Debug)]
pub(crate) struct Bus {
    pub(crate) serial: SerialPort,
    pub(crate) power: Power,
    pub(crate) pm_timer: PmTimer,
    pub(crate) rtc: Rtc,
    pub(crate) pvpanic: Arc<Pvpanic>,
    pub(crate) pci: Arc<PciRoot>,
}

const COM1_LAST: u16 = layout::COM1_PORT + layout::COM1_PORTS - 1;
const PM_TIMER_LAST: u16 = layout::ACPI_PM_TIMER_PORT + 3;
const PCI_CONFIG_LAST: u16 = layout::PCI_CONFIG_DATA_PORT + 3;
/// Reset control register of many chipsets, byte-wide within the configuration address register.
const RESET_CONTROL_PORT: u16 = 0xCF9;
/// RST_CPU of that register.
const RESET_CONTROL_RESET: u8 = 1 << 2;
const ECAM_END: u64 = layout::ECAM_START + layout::ECAM_BUS_SIZE;

impl Bus {
    /// Returns every device to its state at power-on. They are paused.
    pub(crate) fn reset(&self) {
        self.pci.reset();
        self.serial.reset();
        self.power.restore(0);
        self.pm_timer.reset();
        self.rtc.reset();
        self.pvpanic.reset();
    }

    /// A guest read from `port`. A port without a device reads as all ones, as on a real bus.
    pub(crate) fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xFF);
        match port {
            layout::COM1_PORT..=COM1_LAST => {
                let offset = com1_offset(port);
                data.iter_mut()
                    .for_each(|byte| *byte = self.serial.read(offset));
            }
            layout::RTC_DATA_PORT => data.iter_mut().for_each(|byte| *byte = self.rtc.read()),
            layout::PVPANIC_PORT => data.fill(Pvpanic::KNOWN),
            layout::ACPI_PM_TIMER_PORT..=PM_TIMER_LAST => {
                self.pm_timer.read(port - layout::ACPI_PM_TIMER_PORT, data);
            }
            layout::PCI_CONFIG_ADDRESS_PORT..=PCI_CONFIG_LAST => self.pci.io_read(port, data),
            _ => {
                if let (Some(value), Some(byte)) = (self.power.read(port), data.first_mut()) {
                    *byte = value;
                }
            }
        }
    }

    /// A guest write to `port`; returns the power request that it makes, if any.
    pub(crate) fn port_write(&self, port: u16, data: &[u8]) -> Option<PowerRequest> {
        match (port, data) {
            // The UART's registers are bytes: longer data is a string instruction's.
            (layout::COM1_PORT..=COM1_LAST, _) => {
                let offset = com1_offset(port);
                data.iter()
                    .for_each(|byte| self.serial.write(offset, *byte));
                None
            }
            (layout::RTC_INDEX_PORT, _) => {
                data.iter().for_each(|byte| self.rtc.select(*byte));
                None
            }
            (layout::RTC_DATA_PORT, _) => {
                data.iter().for_each(|byte| self.rtc.write(*byte));
                None
            }
            (layout::PVPANIC_PORT, [events, ..]) => {
                self.pvpanic.write(*events);
                None
            }
            (RESET_CONTROL_PORT, [value]) if value & RESET_CONTROL_RESET != 0 => {
                Some(PowerRequest::Reset)
            }
            (layout::PCI_CONFIG_ADDRESS_PORT..=PCI_CONFIG_LAST, _) => {
                self.pci.io_write(port, data);
                None
            }
            (_, [value, ..]) => self.power.write(port, *value),
            _ => None,
        }
    }

    /// A guest read from memory that is not RAM.
    pub(crate) fn memory_read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xFF);
        if (layout::ECAM_START..ECAM_END).contains(&address) {
            self.pci.ecam_read(address - layout::ECAM_START, data);
        } else if !self.pci.mmio_read(GuestAddress(address), data) {
            tracing::trace!(address, "read from nowhere");
        }
    }

    /// A guest write to memory that is not RAM.
    pub(crate) fn memory_write(&self, address: u64, data: &[u8]) {
        if (layout::ECAM_START..ECAM_END).contains(&address) {
            self.pci.ecam_write(address - layout::ECAM_START, data);
        } else if !self.pci.mmio_write(GuestAddress(address), data) {
            tracing::trace!(address, "write to nowhere");
        }
    }
}

fn com1_offset(port: u16) -> u8 {
    u8::try_from(port.wrapping_sub(layout::COM1_PORT)).unwrap_or(0)
}
