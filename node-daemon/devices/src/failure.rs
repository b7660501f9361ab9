//! Devices that cannot go on, and whom they tell.

use std::fmt;

/// Why a device cannot go on. The text names the device and the cause.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeviceFailure {
    /// The guest broke the rules of a virtqueue. Ends this virtual machine alone.
    #[error("{device}: bad virtqueue {queue}: {reason}")]
    BadVirtqueue {
        /// The device.
        device: String,
        /// The queue's index.
        queue: usize,
        /// Which rule was broken.
        reason: String,
    },
    /// A write or a flush failed. The disk accepts no further write until it is opened anew and
    /// verified; the guest sees I/O errors.
    #[error("{device}: {operation} failed: {reason}")]
    DiskFailed {
        /// The device.
        device: String,
        /// `write` or `flush`.
        operation: &'static str,
        /// The operating system's word for it.
        reason: String,
    },
    /// The device's host side broke (a tap vanished, epoll or io_uring failed).
    #[error("{device}: {what}: {reason}")]
    Host {
        /// The device.
        device: String,
        /// What was being done.
        what: &'static str,
        /// The operating system's word for it.
        reason: String,
    },
    /// The device's thread panicked.
    #[error("{device}: device thread panicked: {reason}")]
    Panicked {
        /// The device.
        device: String,
        /// The panic's message.
        reason: String,
    },
}

impl DeviceFailure {
    /// Whether the machine must stop: the device answers nothing any more.
    #[must_use]
    pub const fn ends_the_machine(&self) -> bool {
        !matches!(self, Self::DiskFailed { .. })
    }
}

/// Takes failure reports. Called from device threads, and from vCPU threads that are inside the
/// device: it must neither block nor call into the bus.
pub trait FailureSink: Send + Sync + fmt::Debug {
    /// A device failed. Each failure is reported once.
    fn device_failed(&self, failure: DeviceFailure);
}
