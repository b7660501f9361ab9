//! The configuration of tests and fuzz targets that need any.

use std::path::PathBuf;

use bascule_ipc::vm::{Boot, ImageSource, StartMode, VmConfig};
use bascule_types::{Bytes, OnPanic, VmUid};

/// Of a VM without disks, whose machine a test makes itself.
pub(crate) fn config() -> VmConfig {
    VmConfig {
        version: VmConfig::VERSION,
        uid: VmUid::random(),
        name: "shop/web".to_owned(),
        cpus: 1,
        memory: Bytes::mib(16),
        boot: Boot {
            kernel: ImageSource::File {
                path: PathBuf::new(),
            },
            initrd: None,
            cmdline: String::new(),
        },
        disks: Vec::new(),
        interfaces: Vec::new(),
        home: None,
        start: StartMode::Boot,
        tls_dir: None,
        shutdown_timeout_ms: None,
        cloud_init: None,
        user: None,
        guest_agent: false,
        on_panic: OnPanic::default(),
    }
}
