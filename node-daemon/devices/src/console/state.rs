//! The saved state of a console device beyond its registers and queues.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::config::PORT;

/// [`crate::state::DeviceState::kind`]
pub(super) const KIND: &str = "virtio-console";
/// [`crate::state::DeviceState::version`]. 1: the first layout.
pub(super) const VERSION: u32 = 1;

/// Control messages that wait for buffers of the guest. A driver gives the device a buffer for each of the four that it
/// gets at its start.
pub(super) const REPLIES_MAX: usize = 16;

/// A control message to the guest (5.3.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Reply {
    /// `VIRTIO_CONSOLE_PORT_ADD`: the port exists.
    Add,
    /// `VIRTIO_CONSOLE_PORT_NAME`, with the port's name.
    Name,
    /// `VIRTIO_CONSOLE_PORT_OPEN`: the host's end is open.
    Open,
}

/// What the guest has said of the port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ConsoleState {
    /// The name of the port. The destination's device must have the same.
    pub(super) port: String,
    /// Whether a program in the guest has the port open.
    pub(super) guest_open: bool,
    /// Control messages that the guest has yet to get.
    pub(super) replies: VecDeque<Reply>,
    /// How many bytes of the chain that is next in the queue from the guest the host has taken already.
    pub(super) taken_bytes: usize,
}

impl ConsoleState {
    /// Of a device that no driver has spoken to.
    pub(super) fn new(port: String) -> Self {
        Self {
            port,
            guest_open: false,
            replies: VecDeque::new(),
            taken_bytes: 0,
        }
    }

    pub(super) fn to_value(&self) -> Value {
        serde_json::to_value(self).unwrap_or_default()
    }

    /// The state in `value`, for a device with the port `port`.
    pub(super) fn from_value(value: &Value, port: &str) -> Result<Self, String> {
        let state = Self::deserialize(value).map_err(|error| error.to_string())?;
        if state.port != port {
            return Err(format!(
                "the source has the port {:?}, this device {port:?}",
                state.port
            ));
        }
        if state.replies.len() > REPLIES_MAX {
            return Err(format!("{} control messages wait", state.replies.len()));
        }
        Ok(state)
    }
}

impl Reply {
    /// The message's bytes: port, event, value, and the name behind one that has it.
    pub(super) fn bytes(self, port: &str) -> Vec<u8> {
        let (event, name) = match self {
            Self::Add => (PORT_ADD, ""),
            Self::Name => (PORT_NAME, port),
            Self::Open => (PORT_OPEN, ""),
        };
        let mut bytes = PORT.to_le_bytes().to_vec();
        bytes.extend(event.to_le_bytes());
        bytes.extend(1_u16.to_le_bytes());
        bytes.extend(name.as_bytes());
        bytes
    }
}

/// `VIRTIO_CONSOLE_DEVICE_READY`
pub(super) const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
/// `VIRTIO_CONSOLE_PORT_READY`
pub(super) const PORT_READY: u16 = 3;
/// `VIRTIO_CONSOLE_PORT_OPEN`
pub(super) const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;
