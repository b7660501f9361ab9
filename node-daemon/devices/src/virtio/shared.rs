//! What the vCPU side and the device's thread share.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::constants::NO_VECTOR;
use crate::failure::{DeviceFailure, FailureSink};
use crate::pci::Msix;

/// Shared by a function, its thread and its handles.
#[derive(Debug)]
pub(crate) struct Shared {
    name: String,
    failures: Arc<dyn FailureSink>,
    msix: Mutex<Msix>,
    isr: AtomicU8,
    config_vector: AtomicU16,
    queue_vectors: Vec<AtomicU16>,
    needs_reset: AtomicBool,
    /// 0 until the driver has taken the device into use.
    negotiated: AtomicU64,
    config: Mutex<DeviceConfig>,
}

/// The device-specific configuration, and how often it has changed.
#[derive(Debug)]
struct DeviceConfig {
    bytes: Vec<u8>,
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

    /// Tells the guest that a queue has used buffers.
    pub(crate) fn signal_queue(&self, queue: usize) {
        self.isr.fetch_or(ISR_QUEUE, Ordering::AcqRel);
        if let Some(vector) = self.queue_vectors.get(queue) {
            self.msix().signal(vector.load(Ordering::Acquire));
        }
    }

    /// Tells the guest that the configuration or the status changed.
    pub(crate) fn signal_config(&self) {
        self.isr.fetch_or(ISR_CONFIG, Ordering::AcqRel);
        self.msix()
            .signal(self.config_vector.load(Ordering::Acquire));
    }

    /// Reads and clears the interrupt status (4.1.4.5).
    pub(crate) fn take_isr(&self) -> u8 {
        self.isr.swap(0, Ordering::AcqRel)
    }

    /// The interrupt status, left as it is.
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

    /// Sets the vector for configuration changes. A vector that does not exist becomes none, which
    /// the driver reads back (4.1.5.1.2).
    pub(crate) fn set_config_vector(&self, vector: u16) {
        self.config_vector
            .store(self.existing(vector), Ordering::Release);
    }

    pub(crate) fn queue_vector(&self, queue: usize) -> u16 {
        let vector = self.queue_vectors.get(queue);
        vector.map_or(NO_VECTOR, |vector| vector.load(Ordering::Acquire))
    }

    pub(crate) fn set_queue_vector(&self, queue: usize, vector: u16) {
        if let Some(own) = self.queue_vectors.get(queue) {
            own.store(self.existing(vector), Ordering::Release);
        }
    }

    pub(crate) fn needs_reset(&self) -> bool {
        self.needs_reset.load(Ordering::Acquire)
    }

    /// Restores the bit without reporting anew.
    pub(crate) fn set_needs_reset(&self, needs_reset: bool) {
        self.needs_reset.store(needs_reset, Ordering::Release);
    }

    /// The features that the driver chose; 0 until it has taken the device into use.
    pub(crate) fn negotiated(&self) -> u64 {
        self.negotiated.load(Ordering::Acquire)
    }

    pub(crate) fn set_negotiated(&self, features: u64) {
        self.negotiated.store(features, Ordering::Release);
    }

    /// The device stops for good until it is reset: NEEDS_RESET, a configuration interrupt, and a
    /// report (2.1.2).
    pub(crate) fn fail(&self, failure: DeviceFailure) {
        self.needs_reset.store(true, Ordering::Release);
        self.report(failure);
        self.signal_config();
    }

    /// Reports a failure after which the device still answers.
    pub(crate) fn report(&self, failure: DeviceFailure) {
        self.failures.device_failed(failure);
    }

    /// Reads device-specific configuration; beyond its end it is zero.
    pub(crate) fn config_read(&self, offset: u64, data: &mut [u8]) {
        let config = self.config();
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        for (index, byte) in data.iter_mut().enumerate() {
            let at = start.saturating_add(index);
            *byte = config.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// How often the configuration changed, modulo 256 (4.1.4.3.1).
    pub(crate) fn config_generation(&self) -> u8 {
        self.config().generation
    }

    /// Changes the configuration. The guest is not told: [`Shared::signal_config`] does that.
    pub(crate) fn change_config(&self, change: impl FnOnce(&mut [u8])) {
        let mut config = self.config();
        change(&mut config.bytes);
        config.generation = config.generation.wrapping_add(1);
    }

    /// Back to before the driver came. The configuration stays.
    pub(crate) fn reset(&self) {
        self.set_negotiated(0);
        self.set_needs_reset(false);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn existing(&self, vector: u16) -> u16 {
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
