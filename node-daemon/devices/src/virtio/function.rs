//! The PCI function of a virtio device (virtio 1.2, 4.1): its registers, and the commands to the
//! device's thread that they cause. `layout` holds their addresses.

use std::fmt;
use std::io;
use std::sync::Arc;

use bascule_types::WriterState;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use vm_memory::GuestAddress;

use super::constants::{F_EVENT_IDX, F_INDIRECT_DESC, F_VERSION_1};
use super::context::DeviceContext;
use super::layout::{
    ACCESS_DATA, BAR_BYTES, CONFIG_AT, ISR_AT, Model, NOTIFY_AT, NOTIFY_MULTIPLIER, PBA_AT,
    TABLE_AT, config_space, notify_address,
};
use super::queue::Virtqueue;
use super::queue_handler::{Active, QueueHandler};
use super::registers::{self, Registers};
use super::shared::Shared;
use super::worker::{Worker, WorkerGone};

use crate::device::Device;
use crate::failure::DeviceFailure;
use crate::pci::{BarRegion, ConfigSpace, ConfigState, Msix, MsixState, PciFunction};
use crate::state::{DeviceState, RestoreError};

/// A virtio device as a PCI function.
pub struct VirtioFunction {
    model: Model,
    context: DeviceContext,
    shared: Arc<Shared>,
    worker: Worker,
    space: ConfigSpace,
    /// The register at which the configuration access capability starts.
    access_capability: u16,
    /// The register at which the MSI-X capability starts.
    msix_capability: u16,
    registers: Registers,
    /// The address at which BAR 0 was placed before the guest ran.
    bar_assigned: GuestAddress,
    /// The address of BAR 0 for which ioeventfds are registered.
    ioeventfds_at: Option<GuestAddress>,
    paused: bool,
}

/// The saved state of any virtio device.
#[derive(Debug, Serialize, Deserialize)]
struct FunctionState {
    features: u64,
    config_space: ConfigState,
    registers: Registers,
    config_vector: u16,
    interrupt_status: u8,
    needs_reset: bool,
    msix: MsixState,
    device: Value,
}

impl VirtioFunction {
    /// Makes a device and starts its thread.
    pub(crate) fn new<H: QueueHandler>(
        mut model: Model,
        context: DeviceContext,
        handler: impl FnOnce(&Arc<Shared>) -> H,
    ) -> io::Result<Self> {
        model.features |= F_VERSION_1 | F_EVENT_IDX | F_INDIRECT_DESC;
        let queue_count = model.queue_sizes.len();
        let vectors = u16::try_from(queue_count + 1).map_err(io::Error::other)?;
        let msix = Msix::new(context.msi.clone(), vectors)?;
        let (space, access_capability, msix_capability) = config_space(&model, &msix);
        let shared = Arc::new(Shared::new(
            model.name.clone(),
            context.failures.clone(),
            msix,
            queue_count,
            model.config.clone(),
        ));
        let worker = Worker::spawn(shared.clone(), queue_count, handler(&shared))?;
        Ok(Self {
            registers: Registers::new(&model.queue_sizes),
            model,
            context,
            shared,
            worker,
            space,
            access_capability,
            msix_capability,
            bar_assigned: GuestAddress(0),
            ioeventfds_at: None,
            paused: false,
        })
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    fn common_read(&self, offset: u64, data: &mut [u8]) {
        let registers = &self.registers;
        let queue = registers.selected().copied().unwrap_or_default();
        let vector = self
            .shared
            .queue_vector(usize::from(registers.queue_select));
        let value: u64 = match offset {
            0x00 => registers.device_feature_select.into(),
            0x04 => {
                registers::feature_word(self.model.features, registers.device_feature_select).into()
            }
            0x08 => registers.driver_feature_select.into(),
            0x0C => {
                registers::feature_word(registers.driver_features, registers.driver_feature_select)
                    .into()
            }
            0x10 => self.shared.config_vector().into(),
            0x12 => u16::try_from(registers.queues.len()).unwrap_or(0).into(),
            0x14 => self.status().into(),
            0x15 => self.shared.config_generation().into(),
            0x16 => registers.queue_select.into(),
            0x18 => queue.size.into(),
            0x1A => vector.into(),
            0x1C => u16::from(queue.enabled).into(),
            0x1E => registers
                .selected()
                .map_or(0, |_| registers.queue_select)
                .into(),
            0x20 => queue.descriptors,
            0x24 => queue.descriptors >> 32,
            0x28 => queue.available,
            0x2C => queue.available >> 32,
            0x30 => queue.used,
            0x34 => queue.used >> 32,
            _ => 0,
        };
        for (byte, own) in data.iter_mut().zip(value.to_le_bytes()) {
            *byte = own;
        }
    }

    fn common_write(&mut self, offset: u64, data: &[u8]) {
        if let (0x20 | 0x28 | 0x30, &[a, b, c, d, e, f, g, h]) = (offset, data) {
            self.common_write(offset, &[a, b, c, d]);
            self.common_write(offset + 4, &[e, f, g, h]);
            return;
        }
        let Some(value) = little_endian(data) else {
            return;
        };
        let word = u16::try_from(value & 0xFFFF).unwrap_or(0);
        let registers = &mut self.registers;
        match (offset, data.len()) {
            (0x00, 4) => registers.device_feature_select = value,
            (0x08, 4) => registers.driver_feature_select = value,
            (0x0C, 4) => registers.set_driver_features(value),
            (0x10, 2) => self.shared.set_config_vector(word),
            (0x14, _) => self.write_status(data[0]),
            (0x16, 2) => registers.queue_select = word,
            (0x1A, 2) => {
                let queue = usize::from(registers.queue_select);
                self.shared.set_queue_vector(queue, word);
            }
            _ => registers.write_queue(&self.model.queue_sizes, offset, data.len(), value),
        }
    }

    fn status(&self) -> u8 {
        if self.shared.needs_reset() {
            self.registers.status | registers::STATUS_NEEDS_RESET
        } else {
            self.registers.status
        }
    }

    /// Handles a write to `device_status`: sets bits, or resets for 0 (2.1.1, 3.1.1).
    fn write_status(&mut self, status: u8) {
        if status == 0 {
            self.reset_virtio();
            return;
        }
        let old = self.registers.status;
        let mut new = old | (status & !registers::STATUS_NEEDS_RESET);
        let features_ok = self.registers.driver_features & !self.model.features == 0
            && self.registers.driver_features & F_VERSION_1 != 0;
        if !features_ok {
            new &= !registers::STATUS_FEATURES_OK;
        }
        if new & registers::STATUS_FEATURES_OK == 0 {
            new &= !registers::STATUS_DRIVER_OK;
        }
        self.registers.status = new;
        if new & !old & registers::STATUS_DRIVER_OK != 0 {
            self.activate();
        }
    }

    fn activate(&mut self) {
        match self.queues() {
            Ok(active) => {
                self.shared.set_negotiated(active.features);
                // A thread that has ended has reported why.
                let _gone: Result<(), WorkerGone> = self.worker.activate(active);
            }
            Err((queue, reason)) => self.shared.fail(DeviceFailure::BadVirtqueue {
                device: self.model.name.clone(),
                queue,
                reason,
            }),
        }
    }

    /// The queues as configured in the registers.
    fn queues(&self) -> Result<Active, (usize, String)> {
        let event_idx = self.registers.driver_features & F_EVENT_IDX != 0;
        let setups = self.registers.queues.iter().zip(&self.model.queue_sizes);
        let queues = setups.enumerate().map(|(index, (setup, &size_max))| {
            Virtqueue::new(&self.context.ram, setup, size_max, event_idx)
                .map_err(|error| (index, error.to_string()))
        });
        Ok(Active {
            ram: self.context.ram.clone(),
            queues: queues.collect::<Result<_, _>>()?,
            features: self.registers.driver_features,
            shared: self.shared.clone(),
        })
    }

    fn reset_virtio(&mut self) {
        let _gone: Result<(), WorkerGone> = self.worker.reset();
        self.registers = Registers::new(&self.model.queue_sizes);
        self.shared.reset();
    }

    /// Notifies a queue after an MMIO exit.
    fn notify(&self, offset: u64) {
        let queue = usize::try_from(offset / NOTIFY_MULTIPLIER).unwrap_or(usize::MAX);
        if let Some(Err(error)) = self.worker.kick(queue).map(|kick| kick.write(1)) {
            tracing::warn!(device = %self.shared, %error, "notification lost");
        }
    }

    /// Moves the ioeventfds to the current address of BAR 0.
    fn move_ioeventfds(&mut self) {
        let target = self.bars().first().map(|bar| bar.start);
        if target == self.ioeventfds_at {
            return;
        }
        let registry = &self.context.ioeventfds;
        for queue in 0..self.model.queue_sizes.len() {
            let Some(kick) = self.worker.kick(queue) else {
                continue;
            };
            // Errors are ignored: without an ioeventfd, notifications cause MMIO exits, and an ioeventfd
            // that was refused cannot be unregistered.
            if let Some(old) = self.ioeventfds_at {
                registry.unregister(kick, notify_address(old, queue)).ok();
            }
            if let Some(new) = target {
                registry.register(kick, notify_address(new, queue)).ok();
            }
        }
        self.ioeventfds_at = target;
    }

    /// The BAR access that the configuration access capability describes (4.1.4.9).
    fn access_window(&self) -> Option<(u64, usize)> {
        let mut raw = [0; 16];
        self.space.read(self.access_capability, &mut raw);
        let [_, _, _, _, bar, _, _, _, a, b, c, d, length, e, f, g] = raw;
        let length = usize::from(length);
        let known = bar == 0 && [e, f, g] == [0; 3] && matches!(length, 1 | 2 | 4);
        known.then(|| (u64::from(u32::from_le_bytes([a, b, c, d])), length))
    }

    fn restored(&mut self, state: &FunctionState) -> Result<(), String> {
        if (state.features ^ self.model.features) & !self.model.features_of_state != 0 {
            return Err(format!(
                "the source offered features {:#x}, this device offers {:#x}",
                state.features, self.model.features
            ));
        }
        let saved = &state.registers.queues;
        if saved.len() != self.model.queue_sizes.len() {
            return Err(format!(
                "{} queues saved, this device has {}",
                saved.len(),
                self.model.queue_sizes.len()
            ));
        }
        self.model.features = state.features;
        self.space.restore(&state.config_space)?;
        self.registers = state.registers.clone();
        self.shared.msix().restore(&state.msix)?;
        self.shared.set_config_vector(state.config_vector);
        self.shared.set_isr(state.interrupt_status);
        for (queue, setup) in state.registers.queues.iter().enumerate() {
            self.shared.set_queue_vector(queue, setup.vector);
        }
        let driver_ok = state.registers.status & registers::STATUS_DRIVER_OK != 0;
        self.shared.set_needs_reset(state.needs_reset);
        let negotiated = if driver_ok {
            self.registers.driver_features
        } else {
            0
        };
        self.shared.set_negotiated(negotiated);
        let active = if driver_ok && !state.needs_reset {
            let active = self.queues();
            Some(active.map_err(|(queue, reason)| format!("queue {queue}: {reason}"))?)
        } else {
            None
        };
        let restored = self.worker.restore(active, state.device.clone());
        restored.map_err(|WorkerGone| "the device thread has ended".to_owned())??;
        self.move_ioeventfds();
        Ok(())
    }
}

impl Device for VirtioFunction {
    fn name(&self) -> &str {
        &self.model.name
    }

    fn pause(&mut self) -> WriterState {
        self.paused = true;
        // A thread that has ended does not touch guest memory, but the outcome of its writes is
        // unknown.
        self.worker.pause().unwrap_or(WriterState::Unclean)
    }

    fn resume(&mut self) {
        self.paused = false;
        let _gone: Result<(), WorkerGone> = self.worker.resume();
    }

    fn save(&self) -> DeviceState {
        assert!(
            self.paused,
            "{} must be paused before it is saved",
            self.model.name
        );
        let mut registers = self.registers.clone();
        let mut device = Value::Null;
        if let Ok(saved) = self.worker.save() {
            device = saved.handler;
            for (setup, position) in registers.queues.iter_mut().zip(&saved.positions) {
                let position = position.unwrap_or_default();
                (setup.next_available, setup.next_used) = position;
            }
        }
        for (queue, setup) in registers.queues.iter_mut().enumerate() {
            setup.vector = self.shared.queue_vector(queue);
        }
        let state = FunctionState {
            features: self.model.features,
            config_space: self.space.save(),
            registers,
            config_vector: self.shared.config_vector(),
            interrupt_status: self.shared.isr(),
            needs_reset: self.shared.needs_reset(),
            msix: self.shared.msix().save(),
            device,
        };
        DeviceState::new(self.model.kind, self.model.version, &state)
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        assert!(
            self.paused,
            "{} must be paused before it is restored",
            self.model.name
        );
        let parsed = state.parse(&self.model.name, self.model.kind, self.model.version)?;
        self.restored(&parsed)
            .map_err(|reason| RestoreError::DoesNotFit {
                device: self.model.name.clone(),
                reason,
            })
    }

    fn reset(&mut self) {
        self.reset_virtio();
        self.shared.msix().reset();
        (self.space, ..) = config_space(&self.model, &self.shared.msix());
        if self.bar_assigned.0 != 0 {
            self.space.place_bar(0, self.bar_assigned);
        }
        self.move_ioeventfds();
    }
}

impl PciFunction for VirtioFunction {
    fn config_read(&mut self, register: u16, data: &mut [u8]) {
        let window = self.access_capability + ACCESS_DATA;
        if register == window
            && let Some((offset, length)) = self.access_window()
        {
            let length = length.min(data.len());
            data.fill(0);
            self.bar_read(0, offset, &mut data[..length]);
            return;
        }
        self.space.read(register, data);
    }

    fn config_write(&mut self, register: u16, data: &[u8]) {
        self.space.write(register, data);
        if register == self.access_capability + ACCESS_DATA
            && let Some((offset, length)) = self.access_window()
        {
            let length = length.min(data.len());
            self.bar_write(0, offset, &data[..length]);
        }
        let control = self.space.word(self.msix_capability + 2);
        let end = usize::from(register) + data.len();
        if usize::from(register) < usize::from(self.msix_capability) + 4
            && end > usize::from(self.msix_capability) + 2
        {
            self.shared.msix().set_control(control);
        }
        self.move_ioeventfds();
    }

    fn bar_sizes(&self) -> Vec<(usize, u64)> {
        self.space.bar_sizes()
    }

    fn place_bar(&mut self, bar: usize, start: GuestAddress) {
        self.bar_assigned = start;
        self.space.place_bar(bar, start);
        self.move_ioeventfds();
    }

    fn bars(&self) -> Vec<BarRegion> {
        self.space.bars()
    }

    fn bar_read(&mut self, _bar: usize, offset: u64, data: &mut [u8]) {
        match offset {
            0..ISR_AT => self.common_read(offset, data),
            ISR_AT => data.fill_with(|| self.shared.take_isr()),
            CONFIG_AT..NOTIFY_AT => self.shared.config_read(offset - CONFIG_AT, data),
            TABLE_AT..PBA_AT => self.shared.msix().table_read(offset - TABLE_AT, data),
            PBA_AT..BAR_BYTES => self.shared.msix().pba_read(offset - PBA_AT, data),
            _ => {}
        }
    }

    fn bar_write(&mut self, _bar: usize, offset: u64, data: &[u8]) {
        match offset {
            0..ISR_AT => self.common_write(offset, data),
            NOTIFY_AT..TABLE_AT => self.notify(offset - NOTIFY_AT),
            TABLE_AT..PBA_AT => self.shared.msix().table_write(offset - TABLE_AT, data),
            // No device has writable configuration.
            _ => {}
        }
    }
}

impl Drop for VirtioFunction {
    fn drop(&mut self) {
        if let Some(at) = self.ioeventfds_at {
            for queue in 0..self.model.queue_sizes.len() {
                if let Some(kick) = self.worker.kick(queue) {
                    let address = notify_address(at, queue);
                    self.context.ioeventfds.unregister(kick, address).ok();
                }
            }
        }
    }
}

impl fmt::Debug for VirtioFunction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioFunction")
            .field("model", &self.model)
            .field("registers", &self.registers)
            .finish_non_exhaustive()
    }
}

fn little_endian(data: &[u8]) -> Option<u32> {
    let short = !data.is_empty() && data.len() <= 4;
    short.then(|| {
        data.iter()
            .rev()
            .fold(0, |value, &byte| (value << 8) | u32::from(byte))
    })
}

#[cfg(test)]
mod tests;
