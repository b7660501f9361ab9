use std::fs;
use std::os::unix::fs::chown;
use std::os::unix::net::UnixStream;

use bascule_types::{AttemptId, Bytes, DiskId, Epoch, Generation, NodeUid, Owner, RowName, SlotId};

use super::*;

const OWN: VmUid = VmUid::from_bytes([1; 16]);
const OTHER: VmUid = VmUid::from_bytes([2; 16]);

fn owner() -> Owner {
    Owner {
        slot: SlotId(1),
        generation: Generation(1),
    }
}

/// What the process of a VM requests of it.
fn requests(vm: VmUid) -> Vec<Request> {
    let (from, epoch, owner) = (owner(), Epoch(3), owner());
    let attempt = AttemptId::random();
    let changes = [
        Change::Release { vm, from, epoch },
        Change::Transfer {
            vm,
            from,
            epoch,
            to: owner,
            attempt,
        },
        Change::ReserveSavedState {
            vm,
            from,
            epoch,
            size: Bytes(1),
        },
        Change::FinishSavedState {
            vm,
            from,
            epoch,
            length: Bytes(1),
            crc32c: 0,
        },
        Change::DropSavedState { vm, from, epoch },
    ];
    let what = "EIO".to_owned();
    let others = [
        Request::OpenVm {
            vm,
            owner,
            epoch,
            pid: 1,
        },
        Request::PeekVm { vm },
        Request::Vm { vm },
        Request::CloseVm { vm, owner, epoch },
        Request::ReportFailure { vm, what },
    ];
    changes
        .map(Request::Change)
        .into_iter()
        .chain(others)
        .collect()
}

/// What only the node requests, of the VM's own rows too.
fn of_the_node(vm: VmUid) -> Vec<Request> {
    let (from, to, epoch) = (owner(), owner(), Epoch(3));
    let name: RowName = "shop/web".to_owned().try_into().unwrap();
    let disk = DiskId::random();
    let changes = [
        Change::RegisterNode {
            node: NodeUid::random(),
        },
        Change::DeleteVm { vm },
        Change::DeleteDisk { disk },
        Change::FinishImport { disk, length: None },
        Change::AttachDisk {
            name: name.clone(),
            vm,
        },
        Change::CreateVm {
            vm,
            name,
            spec_digest: [0; 32],
        },
        Change::Acquire {
            vm,
            expected_epoch: epoch,
            to,
        },
        Change::TakeOver {
            vm,
            from,
            epoch,
            to,
        },
    ];
    changes.map(Request::Change).into()
}

#[test]
fn a_vms_process_may_request_what_it_needs_of_its_own_vm_and_nothing_of_others() {
    let client = Client::Vm(OWN);
    for request in requests(OWN) {
        assert_eq!(client.why_refused(&request), None, "{request:?}");
    }
    assert_eq!(client.why_refused(&Request::Status), None);
    assert!(client.why_refused(&Request::Rows).is_some());
    let refused = requests(OTHER).into_iter().chain(of_the_node(OWN));
    for request in refused.chain(of_the_node(OTHER)) {
        assert!(client.why_refused(&request).is_some(), "{request:?}");
        assert_eq!(Client::Node.why_refused(&request), None, "{request:?}");
    }
}

/// Skipped without root, but not in CI.
fn may_chown() -> bool {
    let may = rustix::process::geteuid().is_root();
    assert!(may || std::env::var_os("CI").is_none(), "CI needs root");
    may
}

#[test]
fn a_user_is_known_by_the_group_of_its_vms_run_directory_and_no_other_user_is_let_in() {
    let folder = tempfile::tempdir().unwrap();
    let clients = LocalClients::new(folder.path().to_owned());
    let (ours, _theirs) = UnixStream::pair().unwrap();
    assert_eq!(clients.admit(&ours).unwrap().client, Client::Node);
    if !may_chown() {
        return;
    }
    let make = |name: &str, owner, group| {
        let path = folder.path().join(name);
        fs::create_dir(&path).unwrap();
        chown(path, Some(owner), Some(group)).unwrap();
    };
    make(&OWN.to_string(), 0, 2001);
    make(&OTHER.to_string(), 0, 2002);
    make(&format!("{}.gone", VmUid::from_bytes([3; 16])), 0, 2003);
    // A directory that its user could have made.
    make(&VmUid::from_bytes([4; 16]).to_string(), 2004, 2004);
    let client = |user| clients.admit_user(user).map(|admitted| admitted.client);
    assert_eq!(client(2001), Ok(Client::Vm(OWN)));
    assert_eq!(client(2002), Ok(Client::Vm(OTHER)));
    for stranger in [2003, 2004, 1000] {
        assert_eq!(client(stranger), Err(NotAdmitted::Stranger(stranger)));
    }
}

#[test]
fn the_process_of_one_vm_takes_no_connections_from_others() {
    if !may_chown() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    for (vm, group) in [(OWN, 2001), (OTHER, 2002)] {
        let path = folder.path().join(vm.to_string());
        fs::create_dir(&path).unwrap();
        chown(path, None, Some(group)).unwrap();
    }
    let clients = LocalClients::new(folder.path().to_owned());
    let mut held: Vec<_> = (0..CONNECTIONS_OF_VM_MAX)
        .map(|_| clients.admit_user(2001).unwrap())
        .collect();
    let refused = clients.admit_user(2001).map(|admitted| admitted.client);
    assert_eq!(refused, Err(NotAdmitted::TooMany(OWN)));
    assert_eq!(clients.admit_user(2002).unwrap().client, Client::Vm(OTHER));
    held.pop();
    clients.admit_user(2001).unwrap();
}
