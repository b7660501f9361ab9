//! Fuzz targets for the parsers of foreign bytes: what guests, peers, disks, image sources and users send.
//!
//! A target takes any bytes, makes input of them that reaches behind magic numbers and checksums, and checks
//! more than the absence of panics: what a parser accepts reads back as itself, a result does not depend on how
//! its bytes were split, a device can be paused and reset whatever its driver did. `targets/` has one program for each, which
//! libFuzzer calls (`make fuzz`); `tests/replay.rs` runs every target over its corpus in `corpus/`, without
//! libFuzzer.
//!
//! The crate is a member of the workspace, so that targets are built against the locked dependencies that are
//! released. Only its feature `libfuzzer` needs a C++ compiler.
//!
//! | target | whose bytes | oracle |
//! |---|---|---|
//! | `migration_stream` | the source of a migration; a saved image | frames are written as they were read; memory lies in the machine; state and rounds are bounded and in order |
//! | `volume_record` | a shared volume's block of any kind | what is accepted reads back as itself |
//! | `volume_metadata` | a shared volume with damaged and forged records | check and planning write nothing; a repaired volume opens, and needs no further repair |
//! | `ipc_frame` | another process of the node | an accepted message reads back as itself |
//! | `image_inspection` | an image source | the verdict does not depend on how the image was split |
//! | `image_decompression` | an image source | the same output however it is read; memory by libFuzzer's limit |
//! | `image_qcow2` | an image source | the pieces make up the disk exactly; nothing behind the end is read |
//! | `documents` | a user, the operator, a node | an accepted document reads back as itself |
//! | `block_queues`, `network_queues`, `entropy_queues`, `console_queues` | a guest's driver | the device pauses, serves a correct driver afterwards, and resets to what it was |
//! | `pci_bus` | a guest's configuration, port and memory accesses | the bus saves, restores and resets to what it was |
//! | `device_state` | the source of a migration | a state is refused, or saved as loaded |
//! | `machine_state` | the source of a migration | an accepted state reads back as itself; devices keep it within their bounds and serve any access |
//! | `kernel_loaders` | who wrote the kernel and the initrd | a kernel that is accepted finds command line and initrd whole, and above the boot structures |
//! | `agent_answers` | a guest's agent | what the status shows is small, of the VM's own interfaces, and without control characters |
//! | `cloud_init_disk` | a user | the guest reads what the user wrote; the same texts are the same bytes |
//! | `volume_requests` | a node | a change has one effect; epochs never fall; no owner changes without a transfer or a proof; no extent is used twice; a successor reads the same rows |
//! | `volume_peers` | another node's volume process | an accepted message ends with its frame, and reads back as itself |

#![forbid(unsafe_code)]
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "an oracle that does not hold is a finding, and reported by panicking"
)]

mod devices;
mod documents;
mod image;
mod ipc;
mod migration;
mod peers;
mod requests;
mod target;
mod vm;
mod volume;

pub use target::{TARGETS, Target};
