//! Building the probe guest.
//!
//! It is a workspace of its own with its own flags (`e2e/probe/.cargo/config.toml`), so it is built
//! by a Cargo of its own, into a target directory of its own: the Cargo that runs a test may hold
//! the lock of the other one.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};

/// What our VMM's power button looks like to a guest without an interrupt: the event register of
/// its generic event device. Goes into the guest's command line.
pub const POWER_BUTTON: &str = "button=0x603";

/// The guest's ELF image, built if it is not there or older than its source. `BASCULE_PROBE` names
/// one that was built before.
///
/// # Errors
/// When it does not build.
pub fn build() -> Result<&'static Path> {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    if let Some(path) = BUILT.get() {
        return Ok(path);
    }
    let path = match std::env::var_os("BASCULE_PROBE") {
        Some(path) => PathBuf::from(path),
        None => build_with_cargo()?,
    };
    ensure!(
        path.is_file(),
        "there is no probe guest at {}",
        path.display()
    );
    Ok(BUILT.get_or_init(|| path))
}

fn build_with_cargo() -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("probe");
    let target = target_dir();
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo
        .current_dir(&source)
        .args(["build", "--quiet", "--locked", "--release", "--target-dir"]);
    cargo.arg(&target);
    // They would replace the flags without which the image does not run.
    for name in [
        "RUSTFLAGS",
        "CARGO_ENCODED_RUSTFLAGS",
        "CARGO_BUILD_TARGET",
        "CARGO_TARGET_DIR",
    ] {
        cargo.env_remove(name);
    }
    let status = cargo.status().context("run cargo for the probe guest")?;
    ensure!(
        status.success(),
        "the probe guest in {} does not build",
        source.display()
    );
    Ok(target.join("x86_64-unknown-linux-gnu/release/bascule-probe"))
}

/// Beside what else is built: `<target>/probe-guest`.
fn target_dir() -> PathBuf {
    let configured = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    configured.unwrap_or_else(default).join("probe-guest")
}
