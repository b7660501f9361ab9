//! The QEMU that runs the emulated nodes: that of the nodes' own Debian release, unpacked into the cache.
//!
//! This machine's may be older. QEMU 10 emulates what copying a guest's memory costs most, AES and string
//! instructions, in a fraction of the time that 7.2 takes.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::cached;
use crate::node_image::{SUITE, bootstrap};

/// Runs QEMU with the libraries that it was built for.
#[derive(Debug, Clone)]
pub(crate) struct Emulator {
    root: PathBuf,
}

impl Emulator {
    /// Finds it in the cache, or unpacks it: half a minute.
    pub(crate) fn ensure() -> Result<Self> {
        let what = "unpacking the emulated nodes' QEMU (once; usually 20 s)";
        let root = cached(&format!("qemu-{SUITE}"), what, |dir| {
            bootstrap("extract", PACKAGE, &dir.join("root"))
        })?;
        Ok(Self {
            root: root.join("root"),
        })
    }

    /// The first words of its command line, which begin with the dynamic linker.
    pub(crate) fn argv(&self) -> Vec<String> {
        let at = |path: &str| self.root.join(path).to_string_lossy().into_owned();
        [
            at("usr/lib64/ld-linux-x86-64.so.2"),
            "--argv0".to_owned(),
            PROGRAM.to_owned(),
            "--library-path".to_owned(),
            at("usr/lib/x86_64-linux-gnu"),
            at(&format!("usr/bin/{PROGRAM}")),
            "-L".to_owned(),
            at("usr/share/qemu"),
            "-L".to_owned(),
            at("usr/share/seabios"),
        ]
        .into()
    }
}

const PACKAGE: &str = "qemu-system-x86";
const PROGRAM: &str = "qemu-system-x86_64";
