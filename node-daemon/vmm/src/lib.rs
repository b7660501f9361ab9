//! bascule-vm: one process per virtual machine: the KVM guest, its devices, its disk I/O, its migration streams.
