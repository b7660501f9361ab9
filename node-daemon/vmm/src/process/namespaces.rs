//! The namespaces of the process: a root directory of its own that holds nothing but its own files, and no shared
//! memory, semaphores or host name of others.
//!
//! Its process ids are the host's: without `/proc`, and with a filter that lets it signal itself only, ids of others are
//! of no use, and the process stays its own when `bascule-node` and `bascule-volume` look for it.
#![expect(unsafe_code, reason = "unshare can leave threads with another view")]

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{chdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

/// A file, device or directory that the process still finds, at the path that it has on the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Shown {
    pub(super) path: PathBuf,
    pub(super) read_only: bool,
}

/// Leaves the host's namespaces. From then on the root directory, on which nothing can be written, holds those of
/// `shown` that exist, and nothing else. `base` is any directory; no other process sees a change of it.
/// `false` without the right to do so, and nothing was changed.
///
/// Called while there is one thread.
///
/// # Errors
/// When the kernel refuses a step.
pub(super) fn leave_host(base: &Path, shown: &[Shown]) -> anyhow::Result<bool> {
    let flags = UnshareFlags::NEWNS | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: no flag unshares descriptors, and no thread relies on the root directory of another one: there
    // is one thread.
    match unsafe { unshare_unsafe(flags) } {
        Err(Errno::PERM) => return Ok(false),
        other => other.context("make namespaces")?,
    }
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).context("detach the mounts from the host's")?;
    // Before `base` is covered: they may lie below it.
    let trees = shown.iter().filter_map(|shown| tree_of(shown).transpose());
    let trees = trees.collect::<anyhow::Result<Vec<_>>>()?;
    let limits = c"mode=0755,size=64k,nr_inodes=256";
    mount("tmpfs", base, "tmpfs", OF_ROOT, limits).context("mount a root directory")?;
    for (shown, tree) in trees {
        let path = shown.path.display();
        place(base, shown, tree).with_context(|| format!("show {path}"))?;
    }
    enter(base).context("enter the root directory")?;
    Ok(true)
}

/// A mount of this file or directory alone; none if it does not exist.
fn tree_of(shown: &Shown) -> anyhow::Result<Option<(&Shown, OwnedFd)>> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    match open_tree(CWD, &shown.path, flags) {
        Err(Errno::NOENT) => Ok(None),
        tree => {
            let tree = tree.with_context(|| format!("open {}", shown.path.display()))?;
            Ok(Some((shown, tree)))
        }
    }
}

/// Mounts `tree` below `base`, unless it is there already, within another one.
fn place(base: &Path, shown: &Shown, tree: OwnedFd) -> io::Result<()> {
    let relative = shown.path.strip_prefix("/").map_err(io::Error::other)?;
    let at = base.join(relative);
    if at.exists() {
        return Ok(());
    }
    let parent = at.parent().unwrap_or(base);
    std::fs::create_dir_all(parent)?;
    let tree = File::from(tree);
    if tree.metadata()?.is_dir() {
        std::fs::create_dir(&at)?;
    } else {
        File::create(&at)?;
    }
    move_mount(&tree, "", CWD, &at, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
    let read_only = MountFlags::RDONLY.bits() * u32::from(shown.read_only);
    let flags = OF_SHOWN | MountFlags::from_bits_retain(read_only);
    mount_remount(&at, MountFlags::BIND | flags, "")?;
    Ok(())
}

/// The old root directory is detached with everything below it (pivot_root(2), "pivot_root(".", ".")").
fn enter(base: &Path) -> io::Result<()> {
    chdir(base)?;
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    chdir("/")?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | OF_ROOT;
    Ok(mount_remount("/", flags, "")?)
}

const OF_SHOWN: MountFlags = MountFlags::NOSUID.union(MountFlags::NOEXEC);
const OF_ROOT: MountFlags = OF_SHOWN.union(MountFlags::NODEV);

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs;
    use std::io::ErrorKind;

    use super::*;

    /// Runs `test` in a thread that has left the host's namespaces. Without the right to do so a test says so and
    /// returns, but fails in CI.
    fn away(base: &Path, shown: &[Shown], test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| {
                if leave_host(base, shown).unwrap() {
                    return test();
                }
                assert!(std::env::var_os("CI").is_none(), "CI needs root");
                println!("skipped: needs root");
            });
        });
    }

    fn shown(path: PathBuf, read_only: bool) -> Shown {
        Shown { path, read_only }
    }

    #[test]
    fn the_root_directory_holds_the_processs_own_files_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["run", "keys", "neighbour"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("file"), name).unwrap();
        }
        fs::write(path("kernel"), "kernel").unwrap();
        let list = [
            shown(path("run"), false),
            shown(path("keys"), true),
            shown(path("kernel"), true),
            shown(path("run/file"), true),
            shown(path("missing"), false),
            shown("/dev/null".into(), false),
        ];
        away(&path("run"), &list, || {
            let names = |of: &Path| -> BTreeSet<_> {
                let entries = fs::read_dir(of).unwrap();
                entries.map(|entry| entry.unwrap().path()).collect()
            };
            let own = ["run", "keys", "kernel"].map(path);
            assert_eq!(names(folder.path()), BTreeSet::from(own));
            let mut above: Vec<_> = folder.path().ancestors().collect();
            let (_root, top) = (above.pop(), above.pop().unwrap());
            let tops = BTreeSet::from([top.to_owned(), "/dev".into()]);
            assert_eq!(names(Path::new("/")), tops, "no /proc, no /etc");
            assert_eq!(
                names(Path::new("/dev")),
                BTreeSet::from(["/dev/null".into()])
            );

            assert_eq!(fs::read_to_string(path("kernel")).unwrap(), "kernel");
            assert_eq!(fs::read_to_string(path("run/file")).unwrap(), "run");
            fs::write(path("run/new"), "new").unwrap();
            fs::write("/dev/null", "x").unwrap();
            let refused = [path("keys/file"), path("kernel"), "/new".into()];
            for path in &refused {
                let error = fs::write(path, "x").unwrap_err();
                assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem, "{path:?}");
            }
        });
        // The host sees what was written to its file, and no mount.
        assert!(fs::read_dir(path("run")).unwrap().count() <= 2);
        assert_eq!(fs::read_to_string(path("run/file")).unwrap(), "run");
    }
}
