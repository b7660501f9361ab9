//! MSI-X: the vector table, the pending bits and their masks (PCI Local Bus 3.0, 6.8.2).
//!
//! A vector delivers when MSI-X is enabled and neither the function nor the vector is masked.
//! Otherwise the interrupt waits in the pending bit array and is delivered at the unmasking.

use std::io;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::EventFd;

use crate::interrupt::{Gsi, MsiMessage, MsiRouter};

/// The vectors of one function.
#[derive(Debug)]
pub struct Msix {
    router: Arc<dyn MsiRouter>,
    vectors: Vec<Vector>,
    enabled: bool,
    function_masked: bool,
}

/// The saved state of the vectors.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    enabled: bool,
    function_masked: bool,
    vectors: Vec<VectorState>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct VectorState {
    message: MsiMessage,
    masked: bool,
    pending: bool,
}

#[derive(Debug)]
struct Vector {
    gsi: Gsi,
    irqfd: EventFd,
    state: VectorState,
    /// The message that the hypervisor routes, to skip calls that change nothing.
    routed: Option<MsiMessage>,
}

impl Msix {
    /// `count` masked vectors, each with its own GSI and irqfd.
    ///
    /// # Errors
    /// When the hypervisor has no free GSI or refuses an irqfd.
    pub fn new(router: Arc<dyn MsiRouter>, count: u16) -> io::Result<Self> {
        let make = |_| {
            let gsi = router.allocate_gsi()?;
            let irqfd = EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
            router.attach_irqfd(gsi, &irqfd)?;
            Ok(Vector {
                gsi,
                irqfd,
                state: VectorState::AFTER_RESET,
                routed: None,
            })
        };
        let vectors = (0..count).map(make).collect::<io::Result<_>>()?;
        Ok(Self {
            router,
            vectors,
            enabled: false,
            function_masked: false,
        })
    }

    /// The capability's body: message control, table and pending bits in `bar` at these offsets.
    #[must_use]
    pub fn capability(&self, bar: u8, table_offset: u32, pba_offset: u32) -> Vec<u8> {
        let last = u16::try_from(self.vectors.len().saturating_sub(1)).unwrap_or(0);
        let mut body = last.to_le_bytes().to_vec();
        body.extend((table_offset | u32::from(bar)).to_le_bytes());
        body.extend((pba_offset | u32::from(bar)).to_le_bytes());
        body
    }

    /// The guest wrote the message control word.
    pub fn set_control(&mut self, control: u16) {
        self.enabled = control & CONTROL_ENABLE != 0;
        self.function_masked = control & CONTROL_FUNCTION_MASK != 0;
        self.deliver_unmasked();
    }

    /// The number of vectors.
    #[must_use]
    pub fn len(&self) -> usize {
        self.vectors.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.vectors.is_empty()
    }

    /// Raises a vector, or marks it pending while it is masked. An index without a vector
    /// (virtio's 0xFFFF: the guest chose none) does nothing.
    pub fn signal(&mut self, vector: u16) {
        let open = self.enabled && !self.function_masked;
        if let Some(vector) = self.vectors.get_mut(usize::from(vector)) {
            vector.state.pending = true;
            if open {
                vector.deliver(self.router.as_ref());
            }
        }
    }

    /// Reads the vector table.
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            let vector = index(at / ENTRY_BYTES).and_then(|index| self.vectors.get(index));
            *byte = vector.map_or(0, |vector| vector.state.bytes()[low_bits(at)]);
        }
    }

    /// Writes the vector table.
    pub fn table_write(&mut self, offset: u64, data: &[u8]) {
        for (at, &byte) in (offset..).zip(data) {
            let vector = index(at / ENTRY_BYTES).and_then(|index| self.vectors.get_mut(index));
            if let Some(vector) = vector {
                let mut bytes = vector.state.bytes();
                bytes[low_bits(at)] = byte;
                vector.state.set_bytes(bytes);
            }
        }
        self.deliver_unmasked();
    }

    /// Reads the pending bit array.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        for (at, byte) in (offset..).zip(data) {
            *byte = (0..8_u8)
                .filter(|&bit| {
                    let vector = at.checked_mul(8).map(|first| first + u64::from(bit));
                    let vector = vector
                        .and_then(index)
                        .and_then(|index| self.vectors.get(index));
                    vector.is_some_and(|vector| vector.state.pending)
                })
                .fold(0, |bits, bit| bits | (1 << bit));
        }
    }

    /// A function reset: MSI-X disabled, every vector masked, none pending.
    pub fn reset(&mut self) {
        self.enabled = false;
        self.function_masked = false;
        for vector in &mut self.vectors {
            vector.state = VectorState::AFTER_RESET;
        }
    }

    /// The state to save.
    #[must_use]
    pub fn save(&self) -> MsixState {
        MsixState {
            enabled: self.enabled,
            function_masked: self.function_masked,
            vectors: self.vectors.iter().map(|vector| vector.state).collect(),
        }
    }

    /// Loads a saved state and routes the unmasked vectors.
    ///
    /// # Errors
    /// When the number of vectors differs.
    pub fn restore(&mut self, state: &MsixState) -> Result<(), String> {
        if state.vectors.len() != self.vectors.len() {
            return Err(format!(
                "the source has {} interrupt vectors, this function {}",
                state.vectors.len(),
                self.vectors.len()
            ));
        }
        self.enabled = state.enabled;
        self.function_masked = state.function_masked;
        for (vector, saved) in self.vectors.iter_mut().zip(&state.vectors) {
            vector.state = *saved;
        }
        self.deliver_unmasked();
        Ok(())
    }

    fn deliver_unmasked(&mut self) {
        if !self.enabled || self.function_masked {
            return;
        }
        for vector in &mut self.vectors {
            vector.deliver(self.router.as_ref());
        }
    }
}

impl Vector {
    /// Routes an unmasked vector as the guest programmed it, and raises it when it is pending.
    fn deliver(&mut self, router: &dyn MsiRouter) {
        if self.state.masked {
            return;
        }
        if self.routed != Some(self.state.message) {
            if let Err(error) = router.set_route(self.gsi, self.state.message) {
                // The guest programmed a message that the hypervisor rejects, so the interrupt is
                // not delivered, as on hardware.
                tracing::debug!(gsi = self.gsi.0, %error, "interrupt route refused");
                return;
            }
            self.routed = Some(self.state.message);
        }
        if self.state.pending {
            // A write fails only when the counter is at 2^64 - 2.
            if let Err(error) = self.irqfd.write(1) {
                tracing::warn!(gsi = self.gsi.0, %error, "interrupt lost");
            }
            self.state.pending = false;
        }
    }
}

impl VectorState {
    const AFTER_RESET: Self = Self {
        message: MsiMessage {
            address: 0,
            data: 0,
        },
        masked: true,
        pending: false,
    };

    /// The table entry: address, data, vector control.
    fn bytes(&self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.message.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.message.data.to_le_bytes());
        bytes[12] = u8::from(self.masked);
        bytes
    }

    fn set_bytes(&mut self, bytes: [u8; 16]) {
        let [a, b, c, d, e, f, g, h, i, j, k, l, control, ..] = bytes;
        // The address is dword-aligned: its two low bits are reserved.
        self.message.address = u64::from_le_bytes([a & !3, b, c, d, e, f, g, h]);
        self.message.data = u32::from_le_bytes([i, j, k, l]);
        self.masked = control & 1 != 0;
    }
}

fn index(value: u64) -> Option<usize> {
    usize::try_from(value).ok()
}

/// The byte within its entry of a byte of the table.
fn low_bits(at: u64) -> usize {
    usize::try_from(at % ENTRY_BYTES).unwrap_or(0)
}

const ENTRY_BYTES: u64 = 16;
const CONTROL_ENABLE: u16 = 1 << 15;
const CONTROL_FUNCTION_MASK: u16 = 1 << 14;

#[cfg(test)]
mod tests;
