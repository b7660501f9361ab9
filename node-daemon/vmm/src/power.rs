//! Power: the ACPI sleep, reset and event registers, and the other ways by which guests reset.

use std::io;
use std::sync::atomic::{AtomicU8, Ordering};

use vmm_sys_util::eventfd::EventFd;

use crate::layout;

/// A power request of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PowerRequest {
    /// Switch off (S5).
    Off,
    /// Reset.
    Reset,
}

/// Sleep type of S5, as the `_S5_` object says.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;
/// Value that resets when written to the ACPI reset register.
pub(crate) const RESET_VALUE: u8 = 1;
/// Bit of the event register: the power button was pressed.
pub(crate) const EVENT_POWER_BUTTON: u8 = 1;

/// SLP_TYP of the sleep control register (ACPI 6.5, table 4.17).
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;
/// SLP_EN of the sleep control register.
const SLEEP_ENABLE: u8 = 1 << 5;
/// i8042: pulse output line 0, the reset line.
const I8042_PULSE_RESET: u8 = 0xFE;

/// The power registers. Shared by all vCPU threads and the control socket.
#[derive(Debug)]
pub(crate) struct Power {
    pending: AtomicU8,
    irq: EventFd,
}

impl Power {
    /// No event pending; `irq` is the generic event device's line.
    pub(crate) const fn new(irq: EventFd) -> Self {
        Self {
            pending: AtomicU8::new(0),
            irq,
        }
    }

    /// Presses the power button.
    pub(crate) fn press_button(&self) -> io::Result<()> {
        self.pending.fetch_or(EVENT_POWER_BUTTON, Ordering::SeqCst);
        self.irq.write(1)
    }

    /// Guest read; `None` where there is no register.
    pub(crate) fn read(&self, port: u16) -> Option<u8> {
        match port {
            layout::ACPI_EVENT_PORT => Some(self.pending.swap(0, Ordering::SeqCst)),
            // Nothing ever wakes; the i8042's buffers are empty, so a guest may write its command.
            layout::ACPI_SLEEP_CONTROL_PORT
            | layout::ACPI_SLEEP_STATUS_PORT
            | layout::ACPI_RESET_PORT
            | layout::I8042_COMMAND_PORT => Some(0),
            _ => None,
        }
    }

    /// Guest write of one byte; returns the power request that it makes, if any.
    pub(crate) fn write(&self, port: u16, value: u8) -> Option<PowerRequest> {
        match (port, value) {
            (layout::ACPI_SLEEP_CONTROL_PORT, _)
                if value & SLEEP_ENABLE != 0
                    && (value >> SLEEP_TYPE_SHIFT) & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 =>
            {
                Some(PowerRequest::Off)
            }
            (layout::ACPI_RESET_PORT, RESET_VALUE)
            | (layout::I8042_COMMAND_PORT, I8042_PULSE_RESET) => Some(PowerRequest::Reset),
            _ => None,
        }
    }

    /// Pending events that the guest has not read.
    pub(crate) fn save(&self) -> u8 {
        self.pending.load(Ordering::SeqCst)
    }

    /// Restores saved events; the state of the line is saved with the I/O APIC.
    pub(crate) fn restore(&self, pending: u8) {
        self.pending
            .store(pending & EVENT_POWER_BUTTON, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_s5_with_sleep_enable_switches_off() {
        let power = Power::new(EventFd::new(0).unwrap());
        let off = power.write(layout::ACPI_SLEEP_CONTROL_PORT, 0x34);
        assert_eq!(off, Some(PowerRequest::Off));
        for value in [0x14, 0x20, 0x24, 0] {
            assert_eq!(power.write(layout::ACPI_SLEEP_CONTROL_PORT, value), None);
        }
    }

    #[test]
    fn a_pressed_button_is_reported_once() {
        let power = Power::new(EventFd::new(0).unwrap());
        power.press_button().unwrap();
        assert_eq!(
            power.read(layout::ACPI_EVENT_PORT),
            Some(EVENT_POWER_BUTTON)
        );
        assert_eq!(power.read(layout::ACPI_EVENT_PORT), Some(0));
    }

    #[test]
    fn the_usual_ways_to_reset_make_a_reset_request() {
        let power = Power::new(EventFd::new(0).unwrap());
        assert_eq!(
            power.write(layout::ACPI_RESET_PORT, 1),
            Some(PowerRequest::Reset)
        );
        assert_eq!(
            power.write(layout::I8042_COMMAND_PORT, 0xFE),
            Some(PowerRequest::Reset)
        );
        assert_eq!(power.write(layout::I8042_COMMAND_PORT, 0xD1), None);
    }
}
