//! The entropy device put together.

use std::io;
use std::sync::Arc;

use super::config::{CLASS, DEVICE_TYPE, QUEUE_SIZE, RngConfig};
use super::metrics::RngMetrics;
use super::queue_handler::RngHandler;
use super::state::{KIND, VERSION};
use crate::virtio::layout::Model;
use crate::virtio::{DeviceContext, VirtioFunction};

/// An entropy device, ready to be plugged in.
#[derive(Debug)]
pub struct RngDevice {
    /// The function for the bus.
    pub function: VirtioFunction,
    /// What it has done so far.
    pub metrics: Arc<RngMetrics>,
}

impl RngDevice {
    /// Makes one and starts its thread.
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
