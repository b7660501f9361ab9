//! What the bus needs of a function.

use vm_memory::GuestAddress;

use crate::device::Device;

/// A memory BAR that decodes at present.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BarRegion {
    /// Its index, `0..6`.
    pub bar: usize,
    /// The first guest address.
    pub start: GuestAddress,
    /// A power of two.
    pub size_bytes: u64,
}

/// A function on the bus. All calls come from vCPU threads, one at a time.
pub trait PciFunction: Device {
    /// Reads configuration bytes from `register` on, at most four and not across a dword. The root
    /// guarantees `register + data.len() <= 256`.
    fn config_read(&mut self, register: u16, data: &mut [u8]);

    /// Writes configuration bytes, under the same guarantee.
    fn config_write(&mut self, register: u16, data: &[u8]);

    /// The memory BARs to assign, as (BAR index, size in bytes).
    fn bar_sizes(&self) -> Vec<(usize, u64)>;

    /// Assigns an address to a BAR when the function is added, before the guest runs.
    fn place_bar(&mut self, bar: usize, start: GuestAddress);

    /// The BARs that decode at present: none while memory decoding is disabled.
    fn bars(&self) -> Vec<BarRegion>;

    /// A guest read from a BAR. Bytes that no register backs read as zero.
    fn bar_read(&mut self, bar: usize, offset: u64, data: &mut [u8]);

    /// A guest write to a BAR.
    fn bar_write(&mut self, bar: usize, offset: u64, data: &[u8]);
}
