//! Failures that a device reports to the VMM.

use std::fmt;

/// Why a device cannot continue. The text names the device and the cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum DeviceFailure {
    /// The guest violated the rules of a virtqueue. Stops this virtual machine only.
    #[error("{device}: bad virtqueue {queue}: {reason}")]
    BadVirtqueue {
        device: String,
        queue: usize,
        reason: String,
    },
    /// A write or a flush failed for the first time, and may still land. The guest sees an error, or
    /// waits for the path to the device; the disk goes on.
    #[error("{device}: {operation} failed: {reason}")]
    DiskFailed {
        device: String,
        operation: &'static str,
        reason: String,
    },
    /// A read or a write failed. The guest does not get the error: the disk holds the request back until it
    /// is resumed, and the guest is to be paused.
    #[error("{device}: {operation} failed: {reason}; held back")]
    DiskHeld {
        device: String,
        operation: &'static str,
        reason: String,
    },
    /// The host side of the device failed: the tap was deleted, or epoll or io_uring failed.
    #[error("{device}: {what}: {reason}")]
    Host {
        device: String,
        what: &'static str,
        reason: String,
    },
    /// The device's thread panicked.
    #[error("{device}: device thread panicked: {reason}")]
    Panicked { device: String, reason: String },
}

impl DeviceFailure {
    /// Whether the virtual machine must stop, because the device serves no more requests.
    #[must_use]
    pub const fn ends_the_machine(&self) -> bool {
        !matches!(self, Self::DiskFailed { .. } | Self::DiskHeld { .. })
    }
}

/// Receives failure reports. Called from device threads, and from vCPU threads that access the
/// device, so an implementation must neither block nor call into the bus.
pub trait FailureSink: Send + Sync + fmt::Debug {
    /// A device failed. Each failure is reported once.
    fn device_failed(&self, failure: DeviceFailure);
}
