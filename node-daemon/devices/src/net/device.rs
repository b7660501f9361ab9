//! The network device: wires configuration, tap and queue handler together; and its handle.

use std::io;
use std::sync::Arc;

use super::announce::announcements;
use super::config::{
    CLASS, DEVICE_TYPE, F_CSUM, F_CTRL_VQ, F_GUEST_ANNOUNCE, F_GUEST_CSUM, F_GUEST_ECN,
    F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_ECN, F_HOST_TSO4, F_HOST_TSO6, F_MAC, F_MRG_RXBUF, F_MTU,
    F_STATUS, MTU_AT, MacAddress, NetConfig, QUEUE_SIZES, STATUS_ANNOUNCE, STATUS_LINK_UP,
    config_space, set_status,
};
use super::learned::Learned;
use super::metrics::NetMetrics;
use super::queue_handler::NetHandler;
use super::state::{KIND, VERSION};
use super::tap::Tap;
use crate::virtio::layout::Model;
use crate::virtio::shared::Shared;
use crate::virtio::{DeviceContext, VirtioFunction};

/// A network device with its thread.
#[derive(Debug)]
pub struct NetDevice {
    /// To be added to the PCI bus.
    pub function: VirtioFunction,
    /// Announcements and link state.
    pub handle: NetHandle,
    /// Counters, updated by the device thread.
    pub metrics: Arc<NetMetrics>,
}

/// Announces the device to the network and sets its link state. Every method may be called from any
/// thread, while the device runs or is paused.
#[derive(Clone, Debug)]
pub struct NetHandle {
    mac: MacAddress,
    tap: Arc<dyn Tap>,
    learned: Arc<Learned>,
    shared: Arc<Shared>,
}

impl NetDevice {
    /// Makes a device on `tap` and starts its thread. The link is up.
    ///
    /// # Errors
    /// When the hypervisor has no interrupts left, or the thread cannot be started.
    pub fn new(config: &NetConfig, tap: Arc<dyn Tap>, context: DeviceContext) -> io::Result<Self> {
        let metrics = Arc::new(NetMetrics::default());
        let learned = Arc::new(Learned::new());
        let mtu = config.mtu.map_or(0, |_| F_MTU);
        let model = Model {
            name: config.name.clone(),
            kind: KIND,
            version: VERSION,
            device_type: DEVICE_TYPE,
            class: CLASS,
            features: FEATURES | mtu,
            // A guest keeps the MTU that it was started with, or none.
            features_of_state: F_MTU,
            queue_sizes: QUEUE_SIZES.to_vec(),
            config: config_space(config),
        };
        let parts = (tap.clone(), learned.clone(), metrics.clone());
        let function = VirtioFunction::new(model, context, |shared| {
            let (tap, learned, metrics) = parts;
            NetHandler::new(config, tap, learned, shared.clone(), metrics)
        })?;
        let handle = NetHandle {
            mac: config.mac,
            tap,
            learned,
            shared: function.shared().clone(),
        };
        Ok(Self {
            function,
            handle,
            metrics,
        })
    }
}

impl NetHandle {
    /// Announces the guest's new location after a migration: sends RARP, gratuitous ARP and
    /// neighbor advertisements with the guest's MAC address through the tap, and sets `VIRTIO_NET_S_ANNOUNCE` if the driver
    /// supports it. To be called before the first guest packet and a few times after it, because
    /// frames may be lost. Returns the number of frames sent.
    ///
    /// # Errors
    /// When the tap does not accept a frame.
    pub fn announce(&self) -> io::Result<usize> {
        let frames = announcements(self.mac, &self.learned.current());
        for frame in &frames {
            self.tap.send(frame)?;
        }
        if self.shared.negotiated() & F_GUEST_ANNOUNCE != 0 {
            self.shared
                .change_config(|space| set_status(space, STATUS_ANNOUNCE, true));
            self.shared.signal_config();
        }
        Ok(frames.len())
    }

    /// The MTU in bytes that was offered to the guest when it was started, here or on the node that it
    /// came from; none if none was.
    #[must_use]
    pub fn offered_mtu(&self) -> Option<u16> {
        let mut mtu = [0; 2];
        self.shared.config_read(MTU_AT as u64, &mut mtu);
        Some(u16::from_le_bytes(mtu)).filter(|&mtu| mtu > 0)
    }

    /// Sets the link state that the guest reads. Frames pass in either state.
    pub fn set_link(&self, up: bool) {
        self.shared
            .change_config(|space| set_status(space, STATUS_LINK_UP, up));
        self.shared.signal_config();
    }
}

const FEATURES: u64 = F_CSUM
    | F_GUEST_CSUM
    | F_MAC
    | F_GUEST_TSO4
    | F_GUEST_TSO6
    | F_GUEST_ECN
    | F_HOST_TSO4
    | F_HOST_TSO6
    | F_HOST_ECN
    | F_MRG_RXBUF
    | F_STATUS
    | F_CTRL_VQ
    | F_GUEST_ANNOUNCE;

#[cfg(test)]
mod tests;
