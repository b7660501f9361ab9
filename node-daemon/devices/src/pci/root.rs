//! The root of the bus: dispatches the guest's accesses to the functions.

use std::fmt;
use std::ops::Range;
use std::sync::{Mutex, MutexGuard, PoisonError, RwLock};

use bascule_types::WriterState;
use serde::{Deserialize, Serialize};
use vm_memory::GuestAddress;

use super::address::{DeviceNumber, PciAddress};
use super::function::{BarRegion, PciFunction};
use super::host_bridge::HostBridge;
use crate::state::{DeviceState, RestoreError};

/// Bus 0 and its functions. Functions are added before the bus is shared between threads; all other
/// methods take `&self` and may be called from any vCPU thread.
///
/// # Ordering
/// Locks are acquired in the order address register, function, map. The lock of the map is never held
/// while that of a function is acquired.
pub struct PciRoot {
    functions: Vec<Mutex<Box<dyn PciFunction>>>,
    /// The address register of mechanism #1.
    config_address: Mutex<u32>,
    /// The BARs that decode at present, of all functions.
    map: RwLock<Vec<Mapping>>,
    /// The unassigned rest of the MMIO window.
    window_free: Range<u64>,
}

/// Why a function cannot be added.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum AddError {
    /// All 32 device numbers are in use.
    #[error("the PCI bus is full: no device number left for {device}")]
    BusFull { device: String },
    /// The MMIO window has no room for the BARs of the device.
    #[error("the PCI memory window has no room for a BAR of {size_bytes} bytes of {device}")]
    WindowFull { device: String, size_bytes: u64 },
}

#[derive(Clone, Copy, Debug)]
struct Mapping {
    slot: usize,
    region: BarRegion,
}

#[derive(Debug, Serialize, Deserialize)]
struct RootState {
    config_address: u32,
    functions: Vec<FunctionState>,
}

#[derive(Debug, Serialize, Deserialize)]
struct FunctionState {
    device: DeviceNumber,
    name: String,
    state: DeviceState,
}

impl PciRoot {
    /// A bus with only a host bridge. BARs are assigned in `mmio_window` from its start.
    #[must_use]
    pub fn new(mmio_window: Range<GuestAddress>) -> Self {
        Self {
            functions: vec![Mutex::new(Box::new(HostBridge::new()))],
            config_address: Mutex::new(0),
            map: RwLock::new(Vec::new()),
            window_free: mmio_window.start.0..mmio_window.end.0,
        }
    }

    /// Adds a function at the next device number and assigns its BARs. The order of additions
    /// determines numbers and addresses, so source and destination of a migration add the same
    /// functions in the same order.
    ///
    /// # Errors
    /// [`AddError`] when the bus or the window is full.
    pub fn add(&mut self, mut function: Box<dyn PciFunction>) -> Result<DeviceNumber, AddError> {
        let slot = self.functions.len();
        let number = u8::try_from(slot)
            .ok()
            .filter(|number| *number < DEVICE_COUNT);
        let Some(number) = number else {
            return Err(AddError::BusFull {
                device: function.name().to_owned(),
            });
        };
        for (bar, size_bytes) in function.bar_sizes() {
            let start = self.window_free.start.next_multiple_of(size_bytes);
            if start + size_bytes > self.window_free.end {
                return Err(AddError::WindowFull {
                    device: function.name().to_owned(),
                    size_bytes,
                });
            }
            self.window_free.start = start + size_bytes;
            function.place_bar(bar, GuestAddress(start));
        }
        let regions = function.bars();
        self.functions.push(Mutex::new(function));
        self.remap(slot, &regions);
        Ok(DeviceNumber(number))
    }

    /// A guest read at `offset` in the ECAM window.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        self.config_read(PciAddress::from_ecam(offset), data);
    }

    /// A guest write at `offset` in the ECAM window.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        self.config_write(PciAddress::from_ecam(offset), data);
    }

    /// A guest read from a port in `0xCF8..=0xCFF`.
    pub fn io_read(&self, port: u16, data: &mut [u8]) {
        let address = *lock(&self.config_address);
        match port {
            CONFIG_ADDRESS if data.len() == 4 => data.copy_from_slice(&address.to_le_bytes()),
            CONFIG_DATA..=CONFIG_DATA_LAST => {
                match PciAddress::from_mechanism_1(address, data_byte(port)) {
                    Some(address) => self.config_read(address, data),
                    None => data.fill(0xFF),
                }
            }
            _ => data.fill(0xFF),
        }
    }

    /// A guest write to a port in `0xCF8..=0xCFF`.
    pub fn io_write(&self, port: u16, data: &[u8]) {
        match (port, data) {
            (CONFIG_ADDRESS, &[a, b, c, d]) => {
                *lock(&self.config_address) = u32::from_le_bytes([a, b, c, d]);
            }
            (CONFIG_DATA..=CONFIG_DATA_LAST, data) => {
                let address = *lock(&self.config_address);
                if let Some(address) = PciAddress::from_mechanism_1(address, data_byte(port)) {
                    self.config_write(address, data);
                }
            }
            _ => {}
        }
    }

    /// A guest read from memory that is not RAM. `false` when no BAR decodes there; `data` is then
    /// untouched.
    pub fn mmio_read(&self, address: GuestAddress, data: &mut [u8]) -> bool {
        let Some((slot, bar, offset)) = self.find(address, data.len()) else {
            return false;
        };
        data.fill(0);
        lock(&self.functions[slot]).bar_read(bar, offset, data);
        true
    }

    /// A guest write to memory that is not RAM. `false` when no BAR decodes there.
    pub fn mmio_write(&self, address: GuestAddress, data: &[u8]) -> bool {
        let Some((slot, bar, offset)) = self.find(address, data.len()) else {
            return false;
        };
        lock(&self.functions[slot]).bar_write(bar, offset, data);
        true
    }

    /// Pauses every device ([`crate::device::Device::pause`]). Returns clean only if every device is.
    pub fn pause(&self) -> WriterState {
        let mut state = WriterState::Clean;
        for function in &self.functions {
            state = state.and(lock(function).pause());
        }
        state
    }

    /// Resumes every device ([`crate::device::Device::resume`]).
    pub fn resume(&self) {
        for function in &self.functions {
            lock(function).resume();
        }
    }

    /// Returns the bus and every device to their initial state ([`crate::device::Device::reset`]).
    pub fn reset(&self) {
        *lock(&self.config_address) = 0;
        for (slot, function) in self.functions.iter().enumerate() {
            let mut function = lock(function);
            function.reset();
            self.remap(slot, &function.bars());
        }
    }

    /// The state of the bus and of every device on it. All must be paused.
    #[must_use]
    pub fn save(&self) -> DeviceState {
        let functions = self.functions.iter().zip(0_u8..);
        let state = RootState {
            config_address: *lock(&self.config_address),
            functions: functions
                .map(|(function, number)| {
                    let function = lock(function);
                    FunctionState {
                        device: DeviceNumber(number),
                        name: function.name().to_owned(),
                        state: function.save(),
                    }
                })
                .collect(),
        };
        DeviceState::new(KIND, VERSION, &state)
    }

    /// Loads a saved bus. All devices must be paused and be the same as the saved ones.
    ///
    /// # Errors
    /// [`RestoreError`] when the devices of the bus differ from the saved ones, or one of them
    /// cannot load its state.
    pub fn restore(&self, state: &DeviceState) -> Result<(), RestoreError> {
        let state: RootState = state.parse(KIND, KIND, VERSION)?;
        if state.functions.len() != self.functions.len() {
            return Err(RestoreError::DoesNotFit {
                device: KIND.to_owned(),
                reason: format!(
                    "the source has {} functions, this bus {}",
                    state.functions.len(),
                    self.functions.len()
                ),
            });
        }
        for (slot, (saved, function)) in state.functions.iter().zip(&self.functions).enumerate() {
            let mut function = lock(function);
            if saved.name != function.name() || usize::from(saved.device.0) != slot {
                return Err(RestoreError::DoesNotFit {
                    device: KIND.to_owned(),
                    reason: format!(
                        "the source has {} at {}, this bus has {} at slot {slot}",
                        saved.name,
                        saved.device,
                        function.name()
                    ),
                });
            }
            function.restore(&saved.state)?;
            self.remap(slot, &function.bars());
        }
        *lock(&self.config_address) = state.config_address;
        Ok(())
    }

    fn config_read(&self, address: PciAddress, data: &mut [u8]) {
        match self.function(address) {
            // Beyond 256 bytes is the PCI Express extended space: an empty capability list.
            Some(_) if usize::from(address.register) + data.len() > 256 => data.fill(0),
            Some((_, mut function)) => function.config_read(address.register, data),
            None => data.fill(0xFF),
        }
    }

    fn config_write(&self, address: PciAddress, data: &[u8]) {
        if usize::from(address.register) + data.len() > 256 {
            return;
        }
        if let Some((slot, mut function)) = self.function(address) {
            function.config_write(address.register, data);
            self.remap(slot, &function.bars());
        }
    }

    fn function(
        &self,
        address: PciAddress,
    ) -> Option<(usize, MutexGuard<'_, Box<dyn PciFunction>>)> {
        let slot = usize::from(address.device.0);
        let here = address.bus == 0 && address.function == 0;
        let function = self.functions.get(slot).filter(|_| here)?;
        Some((slot, lock(function)))
    }

    fn find(&self, address: GuestAddress, length: usize) -> Option<(usize, usize, u64)> {
        let length = u64::try_from(length).ok()?;
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.iter().find_map(|mapping| {
            let offset = address.0.checked_sub(mapping.region.start.0)?;
            let inside = offset.checked_add(length)? <= mapping.region.size_bytes;
            inside.then_some((mapping.slot, mapping.region.bar, offset))
        })
    }

    /// Replaces the mappings of `slot` by `regions`.
    fn remap(&self, slot: usize, regions: &[BarRegion]) {
        let unchanged = {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            let mapped = map.iter().filter(|mapping| mapping.slot == slot);
            mapped.map(|mapping| &mapping.region).eq(regions)
        };
        if unchanged {
            return;
        }
        let mut map = self.map.write().unwrap_or_else(PoisonError::into_inner);
        map.retain(|mapping| mapping.slot != slot);
        map.extend(regions.iter().map(|&region| Mapping { slot, region }));
    }
}

impl fmt::Debug for PciRoot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciRoot")
            .field("functions", &self.functions.len())
            .field("map", &self.map)
            .finish_non_exhaustive()
    }
}

/// Ignores poisoning: a panic in one function is reported by it, and must not disable the others.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The byte of the data register that `port` addresses.
fn data_byte(port: u16) -> u8 {
    u8::try_from(port - CONFIG_DATA).unwrap_or(0)
}

const KIND: &str = "pci-root";
/// The first layout: the address register of mechanism #1 and every function's state.
const VERSION: u32 = 1;
const DEVICE_COUNT: u8 = 32;
const CONFIG_ADDRESS: u16 = 0xCF8;
const CONFIG_DATA: u16 = 0xCFC;
const CONFIG_DATA_LAST: u16 = 0xCFF;

#[cfg(test)]
mod tests;
