//! The programs under test: built from this checkout, in the profile that the tests are built in.

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
    let profile = if cfg!(debug_assertions) {
        "dev"
    } else {
        "release"
    };
    let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join(".."));
    cargo.args(["build", "--quiet", "--locked", "--profile", profile]);
    cargo.args(["--package", package, "--bin", program]);
    let status = cargo
        .status()
        .with_context(|| format!("run cargo for {program}"))?;
    ensure!(status.success(), "{program} does not build");
    let path = beside_this_program()?.join(program);
    ensure!(
        path.is_file(),
        "{program} was built, but not to {}",
        path.display()
    );
    Ok(path)
}

/// `target/<profile>`: a test runs from its `deps`, a benchmark from itself.
fn beside_this_program() -> Result<PathBuf> {
    let this = std::env::current_exe().context("find this program")?;
    let directory = this.parent().context("this program has no directory")?;
    let inner = directory.ends_with("deps");
    let directory = if inner {
        directory.parent()
    } else {
        Some(directory)
    };
    directory
        .map(Path::to_path_buf)
        .context("this program has no target directory")
}
