//! The programs under test: built from this checkout, optimized, as users run them. A debug build
//! sends memory so slowly that guests which converge for users do not converge there.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, ensure};

/// The path of `program` of package `package`, built if it is out of date. `BASCULE_BIN_DIR` names a
/// directory of programs that were built before.
///
/// # Errors
/// When it does not build.
pub fn binary(package: &str, program: &str) -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("BASCULE_BIN_DIR") {
        let path = PathBuf::from(directory).join(program);
        ensure!(
            path.is_file(),
            "BASCULE_BIN_DIR has no {program}: {}",
            path.display()
        );
        return Ok(path);
    }
    static BUILT: Mutex<Option<HashMap<String, PathBuf>>> = Mutex::new(None);
    let mut built = BUILT.lock().unwrap_or_else(PoisonError::into_inner);
    let built = built.get_or_insert_default();
    if let Some(path) = built.get(program) {
        return Ok(path.clone());
    }
    let path = build(package, program)?;
    built.insert(program.to_owned(), path.clone());
    Ok(path)
}

fn build(package: &str, program: &str) -> Result<PathBuf> {
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    cargo.args(["build", "--quiet", "--locked", "--release"]);
    cargo.args(["--package", package, "--bin", program]);
    // Tests break migrations from within; what benchmarks measure cannot be broken.
    if cfg!(debug_assertions) && package == "bascule-vmm" {
        cargo.args(["--features", "fault-injection"]);
    }
    let status = cargo
        .status()
        .with_context(|| format!("run cargo for {program}"))?;
    ensure!(status.success(), "{program} does not build");
    let configured = std::env::var_os("CARGO_TARGET_DIR").map(PathBuf::from);
    let default = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let path = configured
        .unwrap_or_else(default)
        .join("release")
        .join(program);
    ensure!(
        path.is_file(),
        "{program} was built, but not to {}",
        path.display()
    );
    Ok(path)
}
