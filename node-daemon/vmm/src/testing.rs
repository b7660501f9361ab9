//! Fixtures of this crate's tests: tiny guests in machine code, and a machine to run them.

mod guests;

use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use bascule_types::Bytes;

pub(crate) use self::guests::*;
use crate::{BootSource, Console, GuestEnd, OpenImages, PausedVm, VmBuilder};

/// Whether this machine has KVM. Without it a test says so and returns, but fails in CI.
pub(crate) fn kvm_or_skip() -> bool {
    let present = std::path::Path::new("/dev/kvm").exists();
    assert!(
        present || std::env::var_os("CI").is_none(),
        "/dev/kvm is missing"
    );
    if !present {
        println!("skipped: /dev/kvm is missing");
    }
    present
}

/// A kernel of `code` alone.
pub(crate) fn images(code: &[u8]) -> OpenImages {
    let kernel = elf(code);
    Box::new(move || {
        Ok(BootSource {
            kernel: kernel.clone(),
            initrd: None,
            cmdline: String::new(),
        })
    })
}

/// A machine without devices, and how its guest ends by itself.
pub(crate) struct TestVm {
    pub(crate) console: Console,
    pub(crate) ended: Receiver<GuestEnd>,
}

impl TestVm {
    /// A builder of 16 MiB and `cpus` vCPUs.
    pub(crate) fn builder(cpus: u32) -> (VmBuilder, Self) {
        let console = Console::new();
        let (ended_tx, ended) = channel();
        let on_end = move |end| drop(ended_tx.send(end));
        let kvm = crate::kvm::open().unwrap();
        let builder = VmBuilder::new(kvm, cpus, Bytes::mib(16), console.clone(), on_end).unwrap();
        (builder, Self { console, ended })
    }

    /// A paused machine about to run `code`.
    pub(crate) fn with(code: &[u8]) -> (PausedVm, Self) {
        let (builder, test) = Self::builder(1);
        (builder.boot(images(code)).unwrap(), test)
    }

    /// The bytes that the guest has written to the console since its start, of which the last 256 KiB are kept.
    pub(crate) fn written(&self) -> u64 {
        self.console.save().position
    }

    /// Waits until the guest has written `count` bytes to the console since its start.
    pub(crate) fn await_output(&self, count: u64) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.written() < count {
            assert!(
                Instant::now() < deadline,
                "no {count} bytes of output in 20 s"
            );
            std::thread::yield_now();
        }
    }

    /// Waits until the guest ends by itself.
    pub(crate) fn await_end(&self) -> GuestEnd {
        self.ended.recv_timeout(Duration::from_secs(20)).unwrap()
    }
}
