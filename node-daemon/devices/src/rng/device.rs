//! The entropy device: wires configuration and queue handler together.

use std::io;
use std::sync::Arc;

use super::config::{CLASS, DEVICE_TYPE, QUEUE_SIZE, RngConfig};
use super::metrics::RngMetrics;
use super::queue_handler::RngHandler;
use super::state::{KIND, VERSION};
use crate::virtio::layout::Model;
use crate::virtio::{DeviceContext, VirtioFunction};

/// An entropy device with its thread.
#[derive(Debug)]
pub struct RngDevice {
    /// To be added to the PCI bus.
    pub function: VirtioFunction,
    /// Counters, updated by the device thread.
    pub metrics: Arc<RngMetrics>,
}

impl RngDevice {
    /// Makes a device and starts its thread.
    ///
    /// # Errors
    /// When the hypervisor has no interrupts left, or the thread cannot be started.
    pub fn new(config: &RngConfig, context: DeviceContext) -> io::Result<Self> {
        let metrics = Arc::new(RngMetrics::default());
        let model = Model {
            name: config.name.clone(),
            kind: KIND,
            version: VERSION,
            device_type: DEVICE_TYPE,
            class: CLASS,
            features: 0,
            features_of_state: 0,
            queue_sizes: vec![QUEUE_SIZE],
            config: Vec::new(),
        };
        let handler = RngHandler::new(metrics.clone());
        let function = VirtioFunction::new(model, context, |_| handler)?;
        Ok(Self { function, metrics })
    }
}

#[cfg(test)]
mod tests;
