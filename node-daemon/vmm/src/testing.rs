//! What the tests of this crate share.

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
