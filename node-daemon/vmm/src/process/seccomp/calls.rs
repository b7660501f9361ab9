//! The list of allowed system calls, with what of their arguments a filter can see.
//!
//! It was collected with strace from the processes of all KVM tests, for a dynamic and a static glibc, and holds what the
//! other of the two and other kernels use in the same place (`epoll_pwait` for `epoll_wait`). A call that is missing ends a
//! guest: whoever adds one to the process adds it here.

use std::collections::BTreeMap;
use std::ffi::c_long;

use seccompiler::BackendError;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::{SeccompCmpOp, SeccompCondition, SeccompRule};

/// What the process is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It builds its machine.
    Starting,
    /// It has its machine, whose guest runs, is awaited, or has ended.
    Running,
}

/// Which calls of a number are allowed.
#[derive(Clone, Copy, Debug)]
enum Only {
    /// Those whose argument of this index is, under the mask, one of the values. Arguments are compared as
    /// 32 bits, as the kernel takes them.
    Masked(u8, u32, &'static [u32]),
    /// Those whose argument of this index is a null pointer.
    Null(u8),
    /// Those whose argument of this index is this process's id.
    ThisProcess(u8),
}

/// The rules of a stage by system call number; a number without rules is allowed with any arguments.
pub(super) fn allowed(
    stage: Stage,
    process: u32,
) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut rules = BTreeMap::new();
    let starting = if stage == Stage::Starting {
        STARTING
    } else {
        &[]
    };
    for &(call, only) in ALWAYS_WITH.iter().chain(starting) {
        let of_call: &mut Vec<_> = rules.entry(call).or_default();
        of_call.extend(compile(only, process)?);
    }
    for &call in ALWAYS {
        rules.insert(call, Vec::new());
    }
    if stage == Stage::Starting {
        rules.insert(libc::SYS_io_uring_setup, Vec::new());
        rules.insert(libc::SYS_seccomp, Vec::new());
    }
    Ok(rules)
}

fn compile(only: Only, process: u32) -> Result<Vec<SeccompRule>, BackendError> {
    let equal = |index, mask: u32, value: u32| {
        let under = SeccompCmpOp::MaskedEq(mask.into());
        let condition = SeccompCondition::new(index, Dword, under, value.into())?;
        SeccompRule::new(vec![condition])
    };
    match only {
        Only::Masked(index, mask, values) => values
            .iter()
            .map(|value| equal(index, mask, *value))
            .collect(),
        Only::Null(index) => {
            let null = SeccompCondition::new(index, Qword, SeccompCmpOp::Eq, 0)?;
            Ok(vec![SeccompRule::new(vec![null])?])
        }
        Only::ThisProcess(index) => Ok(vec![equal(index, u32::MAX, process)?]),
    }
}

/// With any arguments, in both stages. Files are bounded by Landlock, memory by the cgroup.
const ALWAYS: &[c_long] = &[
    // Descriptors.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_lseek,
    libc::SYS_close,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_memfd_create,
    libc::SYS_eventfd2,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_wait,
    libc::SYS_epoll_pwait,
    libc::SYS_poll,
    libc::SYS_ppoll,
    libc::SYS_io_uring_enter,
    // Files of the run directory.
    libc::SYS_open,
    libc::SYS_openat,
    libc::SYS_rename,
    libc::SYS_renameat,
    libc::SYS_unlink,
    // Sockets that are there.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept4,
    libc::SYS_connect,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_recvfrom,
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_getsockopt,
    libc::SYS_setsockopt,
    // Memory.
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_brk,
    // Threads, their signals and their time.
    libc::SYS_futex,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_clone3,
    libc::SYS_rseq,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_restart_syscall,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_gettimeofday,
    libc::SYS_time,
    libc::SYS_getrandom,
];

/// With some arguments, in both stages.
const ALWAYS_WITH: &[(c_long, Only)] = &[
    // First the one that a vCPU makes at every exit: rules are compared in order.
    (libc::SYS_ioctl, kvm(&[nr::RUN])),
    (libc::SYS_ioctl, kvm(OF_MACHINE)),
    (libc::SYS_ioctl, Only::Masked(1, u32::MAX, OTHER_REQUESTS)),
    // No memory can be executed but that which was when the process began.
    (libc::SYS_mmap, Only::Masked(2, PROT_EXEC, &[0])),
    (libc::SYS_mprotect, Only::Masked(2, PROT_EXEC, &[0])),
    (libc::SYS_madvise, Only::Masked(2, u32::MAX, ADVICE)),
    // Threads of this process, in its namespaces.
    (
        libc::SYS_clone,
        Only::Masked(0, CLONE_CHECKED, &[CLONE_THREAD]),
    ),
    (libc::SYS_tgkill, Only::ThisProcess(0)),
    (libc::SYS_kill, Only::ThisProcess(0)),
    (libc::SYS_prctl, Only::Masked(0, u32::MAX, PROCESS_OPTIONS)),
    (libc::SYS_prlimit64, Only::Null(2)),
    (libc::SYS_fcntl, Only::Masked(1, u32::MAX, FILE_OPTIONS)),
    (libc::SYS_socket, Only::Masked(0, u32::MAX, FAMILIES)),
    (libc::SYS_socketpair, Only::Masked(0, u32::MAX, &[AF_UNIX])),
];

/// With some arguments, while the machine is built.
const STARTING: &[(c_long, Only)] = &[
    (libc::SYS_ioctl, kvm(OF_BUILDING)),
    (libc::SYS_ioctl, Only::Masked(1, u32::MAX, DISK_REQUESTS)),
    (
        libc::SYS_io_uring_register,
        Only::Masked(1, u32::MAX, RING_REGISTRATIONS),
    ),
];

/// KVM requests by type and number; the kernel itself compares direction and size (`_IOC`).
const fn kvm(numbers: &'static [u32]) -> Only {
    Only::Masked(1, 0xFFFF, numbers)
}

/// Numbers of KVM's requests with KVM's type (KVM API; `linux/kvm.h`).
mod nr {
    const fn of(number: u32) -> u32 {
        0xAE00 | number
    }

    pub(super) const GET_API_VERSION: u32 = of(0x00);
    pub(super) const CREATE_VM: u32 = of(0x01);
    pub(super) const GET_MSR_INDEX_LIST: u32 = of(0x02);
    pub(super) const CHECK_EXTENSION: u32 = of(0x03);
    pub(super) const GET_VCPU_MMAP_SIZE: u32 = of(0x04);
    pub(super) const GET_SUPPORTED_CPUID: u32 = of(0x05);
    pub(super) const CREATE_VCPU: u32 = of(0x41);
    pub(super) const GET_DIRTY_LOG: u32 = of(0x42);
    pub(super) const SET_USER_MEMORY_REGION: u32 = of(0x46);
    pub(super) const SET_TSS_ADDR: u32 = of(0x47);
    pub(super) const SET_IDENTITY_MAP_ADDR: u32 = of(0x48);
    pub(super) const CREATE_IRQCHIP: u32 = of(0x60);
    pub(super) const GET_IRQCHIP: u32 = of(0x62);
    pub(super) const SET_IRQCHIP: u32 = of(0x63);
    pub(super) const SET_GSI_ROUTING: u32 = of(0x6A);
    pub(super) const IRQFD: u32 = of(0x76);
    pub(super) const CREATE_PIT2: u32 = of(0x77);
    pub(super) const IOEVENTFD: u32 = of(0x79);
    pub(super) const SET_CLOCK: u32 = of(0x7B);
    pub(super) const GET_CLOCK: u32 = of(0x7C);
    pub(super) const RUN: u32 = of(0x80);
    pub(super) const GET_REGS: u32 = of(0x81);
    pub(super) const SET_REGS: u32 = of(0x82);
    pub(super) const GET_SREGS: u32 = of(0x83);
    pub(super) const SET_SREGS: u32 = of(0x84);
    pub(super) const GET_MSRS: u32 = of(0x88);
    pub(super) const SET_MSRS: u32 = of(0x89);
    pub(super) const GET_LAPIC: u32 = of(0x8E);
    pub(super) const SET_LAPIC: u32 = of(0x8F);
    pub(super) const SET_CPUID2: u32 = of(0x90);
    pub(super) const GET_CPUID2: u32 = of(0x91);
    pub(super) const GET_MP_STATE: u32 = of(0x98);
    pub(super) const SET_MP_STATE: u32 = of(0x99);
    /// `KVM_GET_PIT2` too.
    pub(super) const GET_VCPU_EVENTS: u32 = of(0x9F);
    /// `KVM_SET_PIT2` too.
    pub(super) const SET_VCPU_EVENTS: u32 = of(0xA0);
    pub(super) const GET_DEBUGREGS: u32 = of(0xA1);
    /// `KVM_SET_DEBUGREGS` and `KVM_SET_TSC_KHZ`.
    pub(super) const SET_DEBUGREGS: u32 = of(0xA2);
    /// `KVM_GET_TSC_KHZ` and `KVM_ENABLE_CAP`.
    pub(super) const GET_TSC_KHZ: u32 = of(0xA3);
    pub(super) const GET_XSAVE: u32 = of(0xA4);
    pub(super) const SET_XSAVE: u32 = of(0xA5);
    pub(super) const GET_XCRS: u32 = of(0xA6);
    pub(super) const SET_XCRS: u32 = of(0xA7);
    pub(super) const KVMCLOCK_CTRL: u32 = of(0xAD);
    pub(super) const CLEAR_DIRTY_LOG: u32 = of(0xC0);
    pub(super) const GET_XSAVE2: u32 = of(0xCF);
    pub(super) const SET_DEVICE_ATTR: u32 = of(0xE1);
    pub(super) const GET_DEVICE_ATTR: u32 = of(0xE2);
}

/// On a machine and vCPUs that are there.
const OF_MACHINE: &[u32] = &[
    nr::CHECK_EXTENSION,
    nr::GET_DIRTY_LOG,
    nr::SET_USER_MEMORY_REGION,
    nr::GET_IRQCHIP,
    nr::SET_IRQCHIP,
    nr::SET_GSI_ROUTING,
    nr::IRQFD,
    nr::IOEVENTFD,
    nr::SET_CLOCK,
    nr::GET_CLOCK,
    nr::GET_REGS,
    nr::SET_REGS,
    nr::GET_SREGS,
    nr::SET_SREGS,
    nr::GET_MSRS,
    nr::SET_MSRS,
    nr::GET_LAPIC,
    nr::SET_LAPIC,
    nr::SET_CPUID2,
    nr::GET_CPUID2,
    nr::GET_MP_STATE,
    nr::SET_MP_STATE,
    nr::GET_VCPU_EVENTS,
    nr::SET_VCPU_EVENTS,
    nr::GET_DEBUGREGS,
    nr::SET_DEBUGREGS,
    nr::GET_TSC_KHZ,
    nr::GET_XSAVE,
    nr::SET_XSAVE,
    nr::GET_XCRS,
    nr::SET_XCRS,
    nr::KVMCLOCK_CTRL,
    nr::CLEAR_DIRTY_LOG,
    nr::GET_XSAVE2,
    nr::SET_DEVICE_ATTR,
    nr::GET_DEVICE_ATTR,
];

const OF_BUILDING: &[u32] = &[
    nr::GET_API_VERSION,
    nr::CREATE_VM,
    nr::GET_MSR_INDEX_LIST,
    nr::GET_VCPU_MMAP_SIZE,
    nr::GET_SUPPORTED_CPUID,
    nr::CREATE_VCPU,
    nr::SET_TSS_ADDR,
    nr::SET_IDENTITY_MAP_ADDR,
    nr::CREATE_IRQCHIP,
    nr::CREATE_PIT2,
];

const OTHER_REQUESTS: &[u32] = &[
    // FIONBIO
    0x5421,
    // TUNSETOFFLOAD: the guest's driver says which offloads it takes.
    0x4004_54D0,
];

const DISK_REQUESTS: &[u32] = &[
    // BLKSSZGET, of a disk that is a file.
    0x1268,
];

/// `IORING_REGISTER_FILES`, `_EVENTFD`, `_RESTRICTIONS`, `_ENABLE_RINGS`
const RING_REGISTRATIONS: &[u32] = &[2, 4, 11, 12];
/// `PR_SET_NO_NEW_PRIVS` (again, with a filter), `PR_SET_NAME`, `PR_SET_VMA` (glibc names its memory), `PR_GET_AUXV`
/// (rustix).
const PROCESS_OPTIONS: &[u32] = &[38, 15, 0x5356_4D41, 0x4155_5856];
/// `F_GETFD`, `F_SETFD`, `F_GETFL`, `F_SETFL`, `F_DUPFD_CLOEXEC`, `F_ADD_SEALS`
const FILE_OPTIONS: &[u32] = &[1, 2, 3, 4, 1030, 1033];
/// `MADV_DONTNEED`, `_FREE`, `_HUGEPAGE`, `_NOHUGEPAGE`, `_DONTDUMP`, `_POPULATE_WRITE`, `_GUARD_INSTALL`, `_GUARD_REMOVE`
const ADVICE: &[u32] = &[4, 8, 14, 15, 16, 23, 102, 103];
const AF_UNIX: u32 = 1;
/// `AF_INET` and `AF_INET6`: a migration's stream.
const FAMILIES: &[u32] = &[AF_UNIX, 2, 10];
const PROT_EXEC: u32 = 4;
const CLONE_THREAD: u32 = 0x0001_0000;
/// `CLONE_THREAD` and every `CLONE_NEW*`.
const CLONE_CHECKED: u32 = CLONE_THREAD | 0x7E02_0080;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_guests_process_may_make_no_call_that_a_starting_one_may_not() {
        let starting = allowed(Stage::Starting, 7).unwrap();
        let running = allowed(Stage::Running, 7).unwrap();
        for (call, rules) in &running {
            let wider = starting.get(call).unwrap();
            assert!(wider.starts_with(rules), "call {call}");
        }
        for gone in [
            libc::SYS_io_uring_setup,
            libc::SYS_io_uring_register,
            libc::SYS_seccomp,
        ] {
            assert!(starting.contains_key(&gone) && !running.contains_key(&gone));
        }
        let requests = |rules: &BTreeMap<i64, Vec<SeccompRule>>| rules[&libc::SYS_ioctl].len();
        assert_eq!(
            requests(&starting) - requests(&running),
            OF_BUILDING.len() + DISK_REQUESTS.len()
        );
    }

    /// With several rules or none, the calls of one number are allowed with any arguments.
    #[test]
    fn no_call_is_in_the_list_both_with_and_without_arguments() {
        for (call, _) in ALWAYS_WITH.iter().chain(STARTING) {
            assert!(!ALWAYS.contains(call), "call {call}");
        }
    }

    #[test]
    fn the_first_request_that_is_compared_is_the_one_of_every_exit() {
        assert!(matches!(
            ALWAYS_WITH.first(),
            Some((libc::SYS_ioctl, Only::Masked(1, 0xFFFF, [nr::RUN])))
        ));
    }
}
