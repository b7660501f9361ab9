//! The users of VM processes: one for each, so that the kernel keeps what one of them has, and may do, from the others.
//!
//! | id | is |
//! |---|---|
//! | the first of the range | no user; the group of what all VM processes may use: the volumes' sockets, the node's TLS identity |
//! | each further one | user and main group of at most one VM process |
//!
//! The group of a VM's run directory is the record of which VM has a user; there is no other one that could contradict it.
//! `bascule-volume` reads it to know whose process a client is. The directory is root's, with the sticky bit: the process makes
//! files in it, and can neither replace nor remove those of `bascule-node`.
//!
//! # Guarantees
//! A user is given to a VM only if no run directory has it as its group, also none that is being removed, and if no process
//! on the node has it.

use std::collections::BTreeSet;
use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use bascule_ipc::vm::ProcessUser;
use bascule_types::{UserRange, VmUid};

use super::supervisor::Supervisor;

impl Supervisor {
    /// Makes a VM's run directory, whose group is the VM's user from then on.
    pub(super) fn make_vm_folder(&self, vm: VmUid) -> Result<()> {
        let folder = self.paths.vm(vm);
        let make = || fs::create_dir_all(&folder);
        let Some(range) = self.users else {
            return make().with_context(|| format!("create {}", folder.display()));
        };
        let _lock = self.lock_users()?;
        let taken = taken(&self.paths.vms(), Path::new("/proc")).context("list the users")?;
        let user = free(range, vm, &taken).with_context(|| {
            format!("each of the users {range} has a process: set a larger range (node.vmUsers, --vm-users)")
        })?;
        make()
            .and_then(|()| chown(&folder, Some(0), Some(user)))
            .and_then(|()| fs::set_permissions(&folder, Permissions::from_mode(FOLDER_MODE)))
            .with_context(|| format!("create {} for user {user}", folder.display()))
    }

    /// The user of the process that has the run directory of `vm` and uses `volume`; none if it keeps that of this
    /// process.
    pub(super) fn user_of(&self, vm: VmUid, volume: &str) -> Result<Option<ProcessUser>> {
        let group_of = |path: &Path| {
            let found = fs::metadata(path).with_context(|| format!("find {}", path.display()))?;
            anyhow::Ok(found.gid())
        };
        let id = group_of(&self.paths.vm(vm))?;
        let Some(range) = self.users.filter(|range| range.has_user(id)) else {
            return Ok(None);
        };
        let of_socket = group_of(&self.paths.volume_socket(volume))?;
        if of_socket == 0 {
            tracing::warn!(
                %vm,
                volume,
                "the VM's process runs as root: the volume's process is of a release that serves no other user"
            );
            return Ok(None);
        }
        let groups = BTreeSet::from([of_socket, range.shared_group()]);
        Ok(Some(ProcessUser {
            id,
            groups: groups.into_iter().collect(),
        }))
    }
}

/// A user for `vm` that is not `taken`; the same one each time, as far as possible.
fn free(range: UserRange, vm: VmUid, taken: &BTreeSet<u32>) -> Option<u32> {
    let [a, b, c, d, ..] = vm.to_bytes();
    let seed = u32::from_le_bytes([a, b, c, d]);
    range.users_from(seed).find(|user| !taken.contains(user))
}

/// The groups of everything in `vms`, and the users of all processes in `proc`.
fn taken(vms: &Path, proc: &Path) -> Result<BTreeSet<u32>> {
    let mut taken = BTreeSet::new();
    for entry in fs::read_dir(vms)? {
        match entry?.metadata() {
            Ok(found) => drop(taken.insert(found.gid())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut processes = 0_usize;
    for entry in fs::read_dir(proc)? {
        // One that has ended meanwhile has no status.
        let status = fs::read_to_string(entry?.path().join("status")).unwrap_or_default();
        if let Some(ids) = status.lines().find_map(|line| line.strip_prefix("Uid:")) {
            let ids = ids.split_ascii_whitespace();
            taken.extend(ids.filter_map(|id| id.parse::<u32>().ok()));
            processes += 1;
        }
    }
    ensure!(processes > 0, "{} shows no process", proc.display());
    Ok(taken)
}

/// Root's, and the group's with it, but each file is its owner's: sticky bit (inode(7)).
const FOLDER_MODE: u32 = 0o1770;

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: UserRange = UserRange::of(3000, 2);

    fn vm(byte: u8) -> VmUid {
        VmUid::from_bytes([byte; 16])
    }

    #[test]
    fn the_chart_names_the_users_that_are_given_by_default() {
        let chart = include_str!("../../../charts/bascule/values.yaml");
        assert!(chart.contains(&format!("vmUsers: {}\n", UserRange::VMS)));
    }

    #[test]
    fn a_vm_gets_a_user_that_nobody_has_and_the_shared_group_is_no_user() {
        let first = free(SMALL, vm(1), &BTreeSet::new()).unwrap();
        assert!([3001, 3002].contains(&first));
        assert_eq!(free(SMALL, vm(1), &BTreeSet::new()), Some(first));
        let second = free(SMALL, vm(1), &BTreeSet::from([first])).unwrap();
        assert_eq!(first + second, 3001 + 3002);
        assert_eq!(free(SMALL, vm(1), &BTreeSet::from([3001, 3002])), None);
    }

    /// Skipped without root, but not in CI.
    fn node(folder: &Path) -> Option<Supervisor> {
        let mut node = Supervisor::test(folder);
        if node.users.is_none() {
            assert!(std::env::var_os("CI").is_none(), "CI needs root");
            println!("skipped: needs root");
            return None;
        }
        node.users = Some(SMALL);
        Some(node)
    }

    #[test]
    fn a_user_is_free_again_when_nothing_of_its_vm_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let Some(node) = node(folder.path()) else {
            return;
        };
        let group = |vm| fs::metadata(node.paths.vm(vm)).unwrap().gid();
        node.make_vm_folder(vm(1)).unwrap();
        node.make_vm_folder(vm(2)).unwrap();
        assert_ne!(group(vm(1)), group(vm(2)));
        let found = fs::metadata(node.paths.vm(vm(1))).unwrap();
        assert_eq!((found.uid(), found.mode() & 0o7777), (0, 0o1770));
        let error = node.make_vm_folder(vm(3)).unwrap_err();
        assert!(format!("{error:#}").contains("--vm-users"), "{error:#}");
        let removed = node.paths.vms().join(format!("{}.gone", vm(2)));
        fs::rename(node.paths.vm(vm(2)), &removed).unwrap();
        node.make_vm_folder(vm(3)).unwrap_err();
        fs::remove_dir(&removed).unwrap();
        node.make_vm_folder(vm(3)).unwrap();
        assert_ne!(group(vm(1)), group(vm(3)));
    }

    #[test]
    fn the_user_of_a_process_is_taken_until_it_has_ended() {
        let folder = tempfile::tempdir().unwrap();
        let (vms, proc) = (folder.path().join("vms"), folder.path().join("proc"));
        fs::create_dir_all(&vms).unwrap();
        let process = proc.join("17");
        fs::create_dir_all(&process).unwrap();
        fs::create_dir(proc.join("sys")).unwrap();
        let status = "Name:\tbascule-vm\nUid:\t3001\t3001\t3001\t3001\nGid:\t0\t0\t0\t0\n";
        fs::write(process.join("status"), status).unwrap();
        assert_eq!(taken(&vms, &proc).unwrap(), BTreeSet::from([3001]));
        fs::remove_dir_all(&process).unwrap();
        let error = taken(&vms, &proc).unwrap_err().to_string();
        assert!(error.contains("no process"), "{error}");
        assert!(taken(&vms, Path::new("/proc")).unwrap().contains(&0));
    }

    /// A VM starts on a volume whose process runs since before an update.
    #[test]
    fn a_vm_runs_as_root_where_the_volumes_process_serves_nobody_else() {
        let folder = tempfile::tempdir().unwrap();
        let Some(node) = node(folder.path()) else {
            return;
        };
        node.make_vm_folder(vm(1)).unwrap();
        let id = fs::metadata(node.paths.vm(vm(1))).unwrap().gid();
        node.user_of(vm(1), "gold").unwrap_err();
        fs::create_dir_all(node.paths.volume("gold")).unwrap();
        let socket = node.paths.volume_socket("gold");
        fs::write(&socket, "").unwrap();
        assert_eq!(node.user_of(vm(1), "gold").unwrap(), None);
        chown(&socket, None, Some(7)).unwrap();
        let groups = vec![7, 3000];
        assert_eq!(
            node.user_of(vm(1), "gold").unwrap(),
            Some(ProcessUser { id, groups })
        );
    }
}
