//! What the process gives up before it does anything for a guest: its user, every capability, and every file but
//! those that its configuration names.
//!
//! It keeps its network and the descriptors that it is given, that of the volume's device among them.
//! Its namespaces are in [`super::namespaces`], its system calls in [`super::seccomp`].

use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};

use bascule_ipc::vm::{DiskSource, ImageSource, ProcessUser, VmConfig};
use landlock::{
    ABI, Access, AccessFs, BitFlags, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetError,
    RulesetStatus, Scope, make_bitflags, path_beneath_rules,
};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use rustix::process::{Gid, Uid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, set_capabilities,
    set_no_new_privs, set_thread_groups, set_thread_res_gid, set_thread_res_uid,
};

use super::namespaces::Shown;
use super::run_dir::RunDir;

/// Becomes `user`, with no way back, and makes it the owner of the log, which was opened before. Called by root, while
/// there is one thread: the system calls change the calling thread only.
///
/// # Errors
/// When the kernel refuses a step; the process must end then.
pub(super) fn become_user(user: &ProcessUser, run_dir: &RunDir) -> io::Result<()> {
    chown(run_dir.log_path(), Some(user.id), Some(user.id))?;
    let groups: Vec<Gid> = user.groups.iter().copied().map(Gid::from_raw).collect();
    set_thread_groups(&groups)?;
    let (uid, gid) = (Uid::from_raw(user.id), Gid::from_raw(user.id));
    set_thread_res_gid(gid, gid, gid)?;
    Ok(set_thread_res_uid(uid, uid, uid)?)
}

/// Gives up every capability, for the threads to come as well: called while there is one thread. Nothing
/// that the process does later needs one: `/dev/kvm` and taps are open, its files belong to its user, and the
/// volume's device comes as a descriptor.
///
/// # Errors
/// When the kernel refuses a step.
pub(super) fn drop_capabilities() -> io::Result<()> {
    // Or root would get them all back by executing a program.
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    set_capabilities(None, none)?;
    // Guest memory is not written to disk, and another process of this user without capabilities can
    // neither trace this one nor read its memory.
    let none = Rlimit {
        current: Some(0),
        maximum: Some(0),
    };
    setrlimit(Resource::Core, none)?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    Ok(())
}

/// Gives up every file but those of `config` and of the run directory, the execution of programs, and signals to
/// other processes, as far as the kernel's Landlock (5.13; signals from 6.12 on) enforces it. Files that
/// are open stay open.
///
/// # Errors
/// When the kernel has Landlock and refuses a step.
pub(super) fn confine(run_dir: &Path, config: &VmConfig) -> Result<RulesetStatus, RulesetError> {
    let mut ruleset = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI_KNOWN))?
        .scope(Scope::from_all(ABI_KNOWN))?
        .create()?;
    for (path, access) in allowed(run_dir, config) {
        ruleset = ruleset.add_rules(path_beneath_rules([path], access))?;
    }
    Ok(ruleset.restrict_self()?.ruleset)
}

/// What the root directory of the process holds: what it may open, and the sockets of its home volume, which Landlock
/// does not restrict (no access right is for connecting).
pub(super) fn shown(run_dir: &Path, config: &VmConfig) -> Vec<Shown> {
    let sockets = config.home.as_ref().and_then(|home| home.socket.parent());
    let sockets = sockets.map(|folder| Shown {
        path: folder.to_owned(),
        read_only: true,
    });
    let files = allowed(run_dir, config).into_iter();
    let files = files.map(|(path, access)| Shown {
        path,
        read_only: access == READ,
    });
    files.chain(sockets).collect()
}

/// What is opened by its path after the process has left its host.
fn allowed(run_dir: &Path, config: &VmConfig) -> Vec<(PathBuf, BitFlags<AccessFs>)> {
    let mut allowed = vec![
        (run_dir.to_owned(), KEEP_FILES),
        (PathBuf::from("/proc/sys/kernel/random/boot_id"), READ),
        // A static program takes its random numbers from files: it does not find getrandom(2).
        (PathBuf::from("/dev/random"), READ),
        (PathBuf::from("/dev/urandom"), READ),
    ];
    let images = [Some(&config.boot.kernel), config.boot.initrd.as_ref()];
    for image in images.into_iter().flatten() {
        if let ImageSource::File { path } | ImageSource::Firmware { path } = image {
            allowed.push((path.clone(), READ));
        }
    }
    for disk in &config.disks {
        if let DiskSource::File { path, .. } = &disk.source {
            allowed.push((path.clone(), USE_DEVICE));
        }
    }
    if let Some(folder) = &config.tls_dir {
        allowed.push((folder.clone(), READ));
    }
    allowed
}

/// The newest rules that are used; an older kernel enforces those that it has.
const ABI_KNOWN: ABI = ABI::V6;
const READ: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | ReadDir});
const USE_DEVICE: BitFlags<AccessFs> = make_bitflags!(AccessFs::{ReadFile | WriteFile | IoctlDev});
/// Logs, socket and state of the run directory.
const KEEP_FILES: BitFlags<AccessFs> = make_bitflags!(AccessFs::{
    ReadFile | ReadDir | WriteFile | Truncate | MakeReg | MakeSock | RemoveFile
});

#[cfg(test)]
mod tests {
    use std::fs;
    use std::io::ErrorKind;
    use std::os::unix::net::UnixListener;
    use std::process::Command;

    use super::*;
    use crate::process::testing;

    /// Landlock binds a thread and what it starts.
    fn confined(run_dir: &Path, config: &VmConfig, test: impl FnOnce() + Send) {
        std::thread::scope(|scope| {
            scope.spawn(|| match confine(run_dir, config).unwrap() {
                RulesetStatus::NotEnforced => {
                    assert!(std::env::var_os("CI").is_none(), "CI needs Landlock");
                    println!("skipped: this kernel has no Landlock");
                }
                _ => test(),
            });
        });
    }

    fn denied<T>(result: io::Result<T>) -> bool {
        result.is_err_and(|error| error.kind() == ErrorKind::PermissionDenied)
    }

    #[test]
    fn firmware_may_be_read_and_not_written() {
        let mut config = testing::config();
        config.boot.kernel = ImageSource::Firmware {
            path: "/programs/bascule-firmware".into(),
        };
        let expected = (PathBuf::from("/programs/bascule-firmware"), READ);
        assert!(allowed(Path::new("/run/vm"), &config).contains(&expected));
    }

    #[test]
    fn a_process_can_open_its_own_files_and_no_other_ones() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["disk", "kernel", "other"] {
            fs::write(path(name), name).unwrap();
        }
        let run_dir = path("run");
        for name in ["run", "tls", "neighbour"] {
            fs::create_dir(path(name)).unwrap();
            fs::write(path(name).join("key"), "key").unwrap();
        }
        let mut config = testing::config();
        config.boot.kernel = ImageSource::File {
            path: path("kernel"),
        };
        config.disks = vec![bascule_ipc::vm::DiskConfig {
            name: "data".to_owned(),
            source: DiskSource::File {
                path: path("disk"),
                read_only: false,
            },
            on_error: bascule_types::OnError::Report,
        }];
        config.tls_dir = Some(path("tls"));
        confined(&run_dir, &config, || {
            fs::write(run_dir.join("state.json.new"), "{}").unwrap();
            fs::rename(run_dir.join("state.json.new"), run_dir.join("state.json")).unwrap();
            drop(UnixListener::bind(run_dir.join("vm.sock")).unwrap());
            fs::remove_file(run_dir.join("vm.sock")).unwrap();
            assert_eq!(fs::read_to_string(path("tls/key")).unwrap(), "key");
            assert_eq!(fs::read_to_string(path("kernel")).unwrap(), "kernel");
            let mut writable = fs::OpenOptions::new();
            writable.read(true).write(true);
            writable.open(path("disk")).unwrap();

            for source in ["/dev/random", "/dev/urandom"] {
                fs::File::open(source).unwrap();
            }

            assert!(denied(fs::read(path("other"))));
            assert!(denied(fs::read(path("neighbour/key"))));
            assert!(denied(fs::read_dir("/")));
            assert!(denied(fs::read("/etc/passwd")));
            assert!(denied(fs::write(path("tls/key"), "mine")));
            assert!(denied(fs::write(path("kernel"), "mine")));
            assert!(denied(fs::write(path("new"), "new")));
            assert!(denied(writable.open("/dev/null")));
            assert!(denied(Command::new("/bin/true").status()));
        });
    }
}
