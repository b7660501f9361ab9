//! State shared between the PCI function (vCPU threads) and the device's thread.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::constants::NO_VECTOR;
use crate::failure::{DeviceFailure, FailureSink};
use crate::pci::Msix;

/// State shared by a function, its thread and its handles.
#[derive(Debug)]
pub(crate) struct Shared {
    name: String,
    failures: Arc<dyn FailureSink>,
    msix: Mutex<Msix>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    needs_reset: AtomicBool,
    /// The negotiated features; 0 until DRIVER_OK.
    negotiated: AtomicU64,
    config: Mutex<DeviceConfig>,
}

/// The device-specific configuration.
#[derive(Debug)]
struct DeviceConfig {
    bytes: Vec<u8>,
    /// Rises with every change, modulo 256.
    generation: u8,
}

impl Shared {
    pub(crate) fn new(
        name: String,
        failures: Arc<dyn FailureSink>,
        msix: Msix,
        queue_count: usize,
        config: Vec<u8>,
    ) -> Self {
        Self {
            name,
            failures,
            msix: Mutex::new(msix),
            isr: AtomicU8::new(0),
            config_vector: AtomicU16::new(NO_VECTOR),
            queue_vectors: (0..queue_count)
                .map(|_| AtomicU16::new(NO_VECTOR))
                .collect(),
            needs_reset: AtomicBool::new(false),
            negotiated: AtomicU64::new(0),
            config: Mutex::new(DeviceConfig {
                bytes: config,
                generation: 0,
            }),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn msix(&self) -> MutexGuard<'_, Msix> {
        self.msix.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Interrupts the guest: `queue` has used buffers.
    pub(crate) fn signal_queue(&self, queue: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(queue) {
            self.msix().signal(vector.load(Ordering::Acquire));
        }
    }

    /// Interrupts the guest: the configuration or the device status changed.
    pub(crate) fn signal_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix()
            .signal(self.config_vector.load(Ordering::Acquire));
    }

    /// Reads and clears the interrupt status (4.1.4.5).
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The interrupt status, without clearing it.
    pub(crate) fn isr(&self) -> u8 {
        self.isr.load(Ordering::Acquire)
    }

    pub(crate) fn set_isr(&self, isr: u8) {
        self.isr
            .store(isr & (ISR_QUEUE | ISR_CONFIG), Ordering::Release);
    }

    pub(crate) fn config_vector(&self) -> u16 {
        self.config_vector.load(Ordering::Acquire)
    }

    /// Sets the vector for configuration changes. For a vector that does not exist the driver reads
    /// back [`NO_VECTOR`] (4.1.5.1.2).
    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.valid_vector(vector), Ordering::Release);
    }

    pub(crate) fn queue_vector(&self, queue: usize) -> u16 {
        let vector = self.queue_vectors.get(queue);
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(crate) fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(own) = self.queue_vectors.get(queue) {
            own.store(self.valid_vector(vector), Ordering::Release);
        }
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Restores the bit without reporting a failure.
    pub(crate) fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// The negotiated features; 0 until DRIVER_OK.
    pub(crate) fn negotiated(&self) -> u64 {
        self.negotiated.load(Ordering::Acquire)
    }

    pub(crate) fn set_negotiated(&self, features: u64) {
        self.negotiated.store(features, Ordering::Release);
    }

    /// Stops the device until the driver resets it: sets DEVICE_NEEDS_RESET, reports the failure to
    /// the VMM and raises a configuration interrupt (2.1.2).
    pub(crate) fn fail(&self, failure: DeviceFailure) {
        self.needs_reset.store(true, Ordering::Release);
        self.report(failure);
        self.signal_config();
    }

    /// Reports a failure after which the device still serves requests.
    pub(crate) fn report(&self, failure: DeviceFailure) {
        self.failures.device_failed(failure);
    }

    /// Reads device-specific configuration. Bytes beyond its end read as zero.
    pub(crate) fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(index);
            *byte = config.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// `config_generation`: the number of configuration changes, modulo 256 (4.1.4.3.1).
    pub(crate) fn config_generation(&self) -> u8 {
        self.config().generation
    }

    /// Changes the configuration without an interrupt; [`Shared::signal_config`] raises one.
    pub(crate) fn change_config(&self, change: impl FnOnce(&mut [u8])) {
        let mut config = self.config();
        change(&mut config.bytes);
        config.generation = config.generation.wrapping_add(1);
    }

    /// Resets everything that the driver set. The device-specific configuration is kept.
    pub(crate) fn reset(&self) {
        self.set_negotiated(0);
        self.set_needs_reset(false);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    /// `vector` if it exists, else [`NO_VECTOR`].
    fn valid_vector(&self, vector: u16) -> u16 {
        if usize::from(vector) < self.msix().len() {
            vector
        } else {
            NO_VECTOR
        }
    }

    fn config(&self) -> MutexGuard<'_, DeviceConfig> {
        self.config.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Display for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

const ISR_QUEUE: u8 = 1;
const ISR_CONFIG: u8 = 2;
