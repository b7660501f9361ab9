//! COM1: a 16550A on line 4 whose output goes to the [`Console`] and whose input comes from the attached
//! terminal.

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::serial::{NoEvents, SerialState};
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use crate::console::Console;

/// Most unread input in bytes; input beyond it is dropped.
const BACKLOG_BYTES_MAX: usize = 64 << 10;

/// The serial port. Shared by all vCPU threads and the console's reader.
#[derive(Debug)]
pub(crate) struct SerialPort {
    inner: Mutex<Inner>,
    irq: Arc<EventFd>,
    console: Console,
}

struct Inner {
    uart: Serial<Line, NoEvents, Console>,
    backlog: VecDeque<u8>,
}

impl std::fmt::Debug for Inner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Inner")
            .field("uart", &self.uart.state())
            .finish_non_exhaustive()
    }
}

/// The interrupt line: every write to the eventfd is an edge.
#[derive(Debug)]
struct Line(Arc<EventFd>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The saved registers and unread input, first layout.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedSerial {
    baud_divisor_low: u8,
    baud_divisor_high: u8,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    in_buffer: Vec<u8>,
    backlog: Vec<u8>,
}

impl SerialPort {
    /// A port at reset that raises `irq`.
    pub(crate) fn new(irq: EventFd, console: Console) -> Self {
        let irq = Arc::new(irq);
        let uart = Serial::new(Line(Arc::clone(&irq)), console.clone());
        let inner = Inner {
            uart,
            backlog: VecDeque::new(),
        };
        Self {
            inner: Mutex::new(inner),
            irq,
            console,
        }
    }

    /// A reset: registers as in a new port, and unread input is lost. The console keeps its output.
    pub(crate) fn reset(&self) {
        let uart = Serial::new(Line(Arc::clone(&self.irq)), self.console.clone());
        *self.lock() = Inner {
            uart,
            backlog: VecDeque::new(),
        };
    }

    /// Guest read of register `offset`.
    pub(crate) fn read(&self, offset: u8) -> u8 {
        let mut inner = self.lock();
        let value = inner.uart.read(offset);
        inner.feed();
        value
    }

    /// Guest write of register `offset`.
    pub(crate) fn write(&self, offset: u8, value: u8) {
        if let Err(error) = self.lock().uart.write(offset, value) {
            tracing::warn!(?error, "serial port write failed");
        }
    }

    /// Input for the guest.
    pub(crate) fn type_in(&self, input: &[u8]) {
        let mut inner = self.lock();
        let room = BACKLOG_BYTES_MAX.saturating_sub(inner.backlog.len());
        inner.backlog.extend(input.iter().take(room));
        inner.feed();
    }

    /// Where its output goes.
    pub(crate) const fn console(&self) -> &Console {
        &self.console
    }

    pub(crate) fn save(&self) -> SavedSerial {
        let inner = self.lock();
        let state = inner.uart.state();
        SavedSerial {
            baud_divisor_low: state.baud_divisor_low,
            baud_divisor_high: state.baud_divisor_high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.in_buffer,
            backlog: inner.backlog.iter().copied().collect(),
        }
    }

    /// Restores a saved state. `false` when it holds more input than a 16550A can.
    pub(crate) fn restore(&self, saved: &SavedSerial) -> bool {
        let state = SerialState {
            baud_divisor_low: saved.baud_divisor_low,
            baud_divisor_high: saved.baud_divisor_high,
            interrupt_enable: saved.interrupt_enable,
            interrupt_identification: saved.interrupt_identification,
            line_control: saved.line_control,
            line_status: saved.line_status,
            modem_control: saved.modem_control,
            modem_status: saved.modem_status,
            scratch: saved.scratch,
            in_buffer: saved.in_buffer.clone(),
        };
        let line = Line(Arc::clone(&self.irq));
        let Ok(uart) = Serial::from_state(&state, line, NoEvents, self.console.clone()) else {
            return false;
        };
        let backlog = saved
            .backlog
            .iter()
            .copied()
            .take(BACKLOG_BYTES_MAX)
            .collect();
        *self.lock() = Inner { uart, backlog };
        true
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Moves waiting input into the receive FIFO as far as it has room.
    fn feed(&mut self) {
        let room = self.uart.fifo_capacity().min(self.backlog.len());
        if room == 0 {
            return;
        }
        let (ready, _) = self.backlog.as_slices();
        let ready = ready.get(..room.min(ready.len())).unwrap_or_default();
        match self.uart.enqueue_raw_bytes(ready) {
            Ok(taken) => drop(self.backlog.drain(..taken)),
            Err(error) => tracing::warn!(?error, "serial input dropped"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DATA: u8 = 0;
    const LINE_STATUS: u8 = 5;

    fn port() -> SerialPort {
        SerialPort::new(EventFd::new(0).unwrap(), Console::new())
    }

    #[test]
    fn more_input_than_the_fifo_holds_arrives_in_order() {
        let port = port();
        let input: Vec<u8> = (0..=255).collect();
        port.type_in(&input);
        let mut read = Vec::new();
        while port.read(LINE_STATUS) & 1 != 0 {
            read.push(port.read(DATA));
        }
        assert_eq!(read, input);
    }

    #[test]
    fn a_port_after_a_reset_is_as_a_new_one() {
        let port = port();
        let new = port.save();
        for (offset, value) in [(3, 0x83), (0, 7), (1, 1), (3, 3), (1, 5), (4, 0x1B), (7, 9)] {
            port.write(offset, value);
        }
        port.type_in(&[7; 100]);
        assert_ne!(port.save(), new);
        port.reset();
        assert_eq!(port.save(), new);
    }

    #[test]
    fn a_restored_port_has_the_registers_and_the_unread_input() {
        let old = port();
        old.write(7, 0x5A);
        old.type_in(&[7; 100]);
        let saved = old.save();
        let new = port();
        assert!(new.restore(&saved));
        assert_eq!(new.save(), saved);
        assert_eq!(new.read(7), 0x5A);
        let absurd = SavedSerial {
            in_buffer: vec![0; 65],
            ..saved
        };
        assert!(!new.restore(&absurd));
    }
}
