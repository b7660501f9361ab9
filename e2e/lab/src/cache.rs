//! Results of slow set-up steps, kept outside the checkout and keyed by what they were made from.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{FlockOperation, flock};

use crate::dirs::xdg_dir;
use crate::progress::step;

/// `$XDG_CACHE_HOME/bascule`, or `~/.cache/bascule`.
pub fn cache_dir() -> Result<PathBuf> {
    xdg_dir("XDG_CACHE_HOME", ".cache")
}

/// The directory `key` of the cache; made by `build`, which gets an empty directory to fill, when it is not there.
///
/// The directory appears under its name only when `build` has succeeded. A process that finds another one
/// building the same thing waits for it.
pub fn cached(key: &str, what: &str, build: impl FnOnce(&Path) -> Result<()>) -> Result<PathBuf> {
    cached_in(&cache_dir()?, key, what, build)
}

fn cached_in(
    cache: &Path,
    key: &str,
    what: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let ready = cache.join(key);
    if ready.is_dir() {
        return Ok(ready);
    }
    fs::create_dir_all(cache).with_context(|| format!("make {}", cache.display()))?;
    let lock_path = cache.join(format!("{key}.lock"));
    let lock = File::create(&lock_path).with_context(|| format!("lock {}", lock_path.display()))?;
    flock(&lock, FlockOperation::LockExclusive).context("wait for another build")?;
    if ready.is_dir() {
        return Ok(ready);
    }
    let partial = cache.join(format!("{key}.partial"));
    remove_all(&partial)?;
    fs::create_dir_all(&partial).with_context(|| format!("make {}", partial.display()))?;
    step(what, || build(&partial))?;
    fs::rename(&partial, &ready).with_context(|| format!("put {} into place", ready.display()))?;
    Ok(ready)
}

/// Removes a directory tree; it is no error when it is not there.
pub(crate) fn remove_all(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    #[test]
    fn a_result_is_built_once_and_a_failed_build_leaves_nothing_under_its_name() {
        let cache = tempfile::tempdir().unwrap();
        let failed = cached_in(cache.path(), "k-v1", "fail", |dir| {
            fs::write(dir.join("half"), "x")?;
            bail!("no network")
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("no network"));
        assert!(!cache.path().join("k-v1").exists());

        let build = |dir: &Path| {
            assert_eq!(fs::read_dir(dir)?.count(), 0, "remains of the failed build");
            Ok(fs::write(dir.join("tool"), "x")?)
        };
        let ready = cached_in(cache.path(), "k-v1", "build", build).unwrap();
        assert!(ready.join("tool").exists());
        let again = cached_in(cache.path(), "k-v1", "build", |_| bail!("built twice")).unwrap();
        assert_eq!(ready, again);
    }
}
