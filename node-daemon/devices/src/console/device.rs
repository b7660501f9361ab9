//! The console device: wires configuration, host port and queue handler together.

use std::io;
use std::sync::Arc;

use super::config::{
    CLASS, ConsoleConfig, DEVICE_TYPE, F_MULTIPORT, PORT_NAME_BYTES_MAX, QUEUE_SIZES, config_space,
};
use super::port::HostPort;
use super::queue_handler::ConsoleHandler;
use super::state::{KIND, VERSION};
use crate::virtio::layout::Model;
use crate::virtio::{DeviceContext, VirtioFunction};

/// A console device with its thread.
#[derive(Debug)]
pub struct ConsoleDevice {
    /// To be added to the PCI bus.
    pub function: VirtioFunction,
}

impl ConsoleDevice {
    /// Makes a device with `port` as the host's end of its port, and starts its thread.
    ///
    /// # Errors
    /// When the port's name is too long, the hypervisor has no interrupts left, or the thread cannot be started.
    pub fn new(
        config: &ConsoleConfig,
        port: Arc<dyn HostPort>,
        context: DeviceContext,
    ) -> io::Result<Self> {
        if config.port.len() > PORT_NAME_BYTES_MAX {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let model = Model {
            name: config.name.clone(),
            kind: KIND,
            version: VERSION,
            device_type: DEVICE_TYPE,
            class: CLASS,
            features: F_MULTIPORT,
            features_of_state: 0,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: config_space(),
        };
        let function = VirtioFunction::new(model, context, |shared| {
            ConsoleHandler::new(config.port.clone(), port, shared.clone())
        })?;
        Ok(Self { function })
    }
}

#[cfg(test)]
mod tests;
