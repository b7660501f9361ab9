//! Whether this machine has a usable `/dev/kvm`.

use std::fs::OpenOptions;

/// Whether `/dev/kvm` can be opened. Where it cannot, the caller skips with the message printed
/// here.
///
/// # Panics
/// If `CI` is set and `/dev/kvm` cannot be opened: CI must not skip its KVM tests.
#[must_use]
#[expect(
    clippy::panic,
    reason = "the only way for a test to fail from a helper"
)]
pub fn kvm_or_skip(test: &str) -> bool {
    let opened = OpenOptions::new().read(true).write(true).open("/dev/kvm");
    match opened {
        Ok(_) => true,
        Err(error) if std::env::var_os("CI").is_some() => {
            panic!("{test} needs /dev/kvm: {error}")
        }
        Err(error) => {
            eprintln!("{test} is skipped: it needs /dev/kvm: {error}");
            false
        }
    }
}
