//! The devices of the host that a process opens before it leaves it: from then on it finds none by its name, and its
//! user could open none.

use std::io;

use bascule_devices::net::TapFd;
use bascule_ipc::vm::VmConfig;
use kvm_ioctls::Kvm;

use crate::kvm::{self, KvmError};

/// `/dev/kvm` and the taps of a configuration. What could not be opened is reported by the status of the VM, as
/// everything for which no machine can be built.
#[derive(Debug)]
pub(super) struct HostDevices {
    pub(super) kvm: Result<Kvm, KvmError>,
    /// One for each interface, in order.
    pub(super) taps: Vec<io::Result<TapFd>>,
}

impl HostDevices {
    pub(super) fn open(config: &VmConfig) -> Self {
        let taps = config.interfaces.iter();
        Self {
            kvm: kvm::open(),
            taps: taps.map(|nic| TapFd::open(&nic.tap)).collect(),
        }
    }
}
