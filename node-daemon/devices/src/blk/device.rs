//! The block device: wires configuration, disk engine and queue handler together.

use std::io;
use std::sync::Arc;

use super::config::{
    BlkConfig, CLASS, DEVICE_TYPE, F_BLK_SIZE, F_FLUSH, F_MQ, F_RO, F_SEG_MAX, QUEUE_SIZE,
    QUEUES_MAX, config_space,
};
use super::metrics::BlkMetrics;
use super::queue_handler::BlkHandler;
use super::state::{KIND, VERSION};
use crate::disk::{Disk, DiskEngine};
use crate::virtio::layout::Model;
use crate::virtio::{DeviceContext, VirtioFunction};

/// A block device with its thread.
#[derive(Debug)]
pub struct BlkDevice {
    /// To be added to the PCI bus.
    pub function: VirtioFunction,
    /// Counters, updated by the device thread.
    pub metrics: Arc<BlkMetrics>,
}

/// Why a block device cannot be made.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum BlkError {
    /// Too few or too many queues.
    #[error("{name}: {queue_count} queues, but 1 to {QUEUES_MAX} are possible")]
    QueueCount { name: String, queue_count: u16 },
    /// io_uring, a thread or an interrupt is not available.
    #[error("{name}: cannot set up the device")]
    Host {
        name: String,
        #[source]
        source: io::Error,
    },
}

impl BlkDevice {
    /// Makes a device on `disk` and starts its thread.
    ///
    /// # Errors
    /// [`BlkError`].
    pub fn new(config: &BlkConfig, disk: Disk, context: DeviceContext) -> Result<Self, BlkError> {
        let queue_count = config.queue_count;
        if queue_count == 0 || queue_count > QUEUES_MAX {
            return Err(BlkError::QueueCount {
                name: config.name.clone(),
                queue_count,
            });
        }
        let host = |source| BlkError::Host {
            name: config.name.clone(),
            source,
        };
        let read_only = if config.read_only { F_RO } else { 0 };
        let block_bytes = disk.block_bytes;
        let engine = DiskEngine::new(disk, context.ram.clone()).map_err(host)?;
        let metrics = Arc::new(BlkMetrics::default());
        let model = Model {
            name: config.name.clone(),
            kind: KIND,
            version: VERSION,
            device_type: DEVICE_TYPE,
            class: CLASS,
            features: F_SEG_MAX | F_BLK_SIZE | F_FLUSH | F_MQ | read_only,
            features_of_state: 0,
            queue_sizes: vec![QUEUE_SIZE; usize::from(queue_count)],
            config: config_space(engine.size_bytes(), block_bytes, queue_count),
        };
        let handler_metrics = metrics.clone();
        let function = VirtioFunction::new(model, context, |shared| {
            BlkHandler::new(config, engine, block_bytes, shared.clone(), handler_metrics)
        });
        Ok(Self {
            function: function.map_err(host)?,
            metrics,
        })
    }
}

#[cfg(test)]
mod tests;
