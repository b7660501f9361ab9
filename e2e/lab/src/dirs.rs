//! The project's directories below the XDG base directories.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A directory of the project below one of the XDG base directories.
pub(crate) fn xdg_dir(variable: &str, default: &str) -> Result<PathBuf> {
    let base = match std::env::var_os(variable).filter(|dir| Path::new(dir).is_absolute()) {
        Some(dir) => PathBuf::from(dir),
        None => {
            let home = std::env::var_os("HOME").context("HOME is not set")?;
            PathBuf::from(home).join(default)
        }
    };
    Ok(base.join("bascule"))
}
