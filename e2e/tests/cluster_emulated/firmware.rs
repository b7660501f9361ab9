//! A guest that boots from its disk, by UEFI.

use crate::CLUSTER;

/// Firmware, GRUB, Debian's kernel as packaged. The disk is the second one of its VM, which has no `boot`: the
/// firmware passes the empty first one.
#[test]
fn disk_boots_through_uefi_and_its_guest_moves_live_and_quick() {
    CLUSTER.with_resident("firmware", |cluster, _| {
        let vm = cluster.firmware_vm("uefi", 140).unwrap();
        let mut talk = vm.talk().unwrap();
        talk.ensure_user_data("uefi").unwrap();
        talk.append().unwrap();
        vm.migrate("Live", None).unwrap();
        talk.ping().unwrap();
        vm.migrate("Quick", None).unwrap();
        talk.ping().unwrap();
        talk.append().unwrap();
        talk.check().unwrap();
        vm.delete().unwrap();
    });
}
