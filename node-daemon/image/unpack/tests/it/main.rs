//! What is unpacked, compared with what QEMU and the compressors' own programs make of it.
#![forbid(unsafe_code)]
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod compressed;
mod damaged;
mod formats;
mod tools;
