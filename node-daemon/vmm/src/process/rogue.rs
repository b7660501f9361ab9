//! What a guest could do that has taken over its process: every attempt is made in the place of the guest, with all
//! that confines the process in force. Only in builds with `fault-injection`, when the environment variable `BASCULE_ROGUE`
//! is set.
//!
//! `BASCULE_ROGUE` is a list of `<name>=<path>` with commas between: files and sockets of others that are to be opened. With
//! the value `die` a single forbidden call is made, and the process is to end by it. `BASCULE_ROGUE_REQUESTS` is a JSON list of
//! [`Request`]s to the home volume's process.
#![expect(unsafe_code, reason = "it makes system calls that no crate would make")]

use std::ffi::{CString, c_int, c_long, c_void};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bascule_ipc::Connection;
use bascule_ipc::vm::VmConfig;
use bascule_ipc::volume::{Request, Response};
use vmm_sys_util::signal::register_signal_handler;

use super::run_dir::RunDir;

/// One attempt: its name, and the system call with its arguments.
type Attempt = (&'static str, c_long, [usize; 5]);

/// Makes every attempt and logs what came of each: `rogue: <name>: refused: <why>`, or `rogue: <name>: DONE`.
/// Returns at once without `BASCULE_ROGUE`.
pub(super) fn run(run_dir: &RunDir, config: &VmConfig) {
    let Ok(wanted) = std::env::var("BASCULE_ROGUE") else {
        return;
    };
    if wanted == "die" {
        call(libc::SYS_ptrace, [ATTACH, INIT, 0, 0, 0]).ok();
    }
    // As an attacker would: without it, the first attempt ends the process.
    if let Err(error) = register_signal_handler(libc::SIGSYS, go_on) {
        tracing::error!(%error, "rogue: no handler");
    }
    // The control: a rogue that can do nothing at all would prove nothing.
    let own = std::fs::write(run_dir.path().join("rogue"), "own");
    report("control: write to its run directory", own);
    if config.home.is_some() {
        let own = ask(config, &Request::PeekVm { vm: config.uid });
        report("control: ask its volume for its own disks", own);
    }
    for (name, path) in wanted.split(',').filter_map(|item| item.split_once('=')) {
        open(name, Path::new(path));
    }
    for (name, number, arguments) in attempts() {
        report(name, call(number, arguments));
    }
    let requests = std::env::var("BASCULE_ROGUE_REQUESTS").unwrap_or_default();
    for request in serde_json::from_str::<Vec<Request>>(&requests).unwrap_or_default() {
        report(&format!("request {request:?}"), ask(config, &request));
    }
    tracing::info!("rogue: end");
}

fn open(name: &str, path: &Path) {
    let options = |write| {
        std::fs::OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
    };
    report(&format!("open {name} for reading"), options(false));
    report(&format!("open {name} for writing"), options(true));
    report(&format!("connect to {name}"), UnixStream::connect(path));
}

/// Everything else. Where a call would do harm if it were allowed, its arguments make it fail with another error.
fn attempts() -> Vec<Attempt> {
    let program = leaked("/bin/true");
    let root = leaked("/");
    let node = leaked("/dev/bascule-rogue");
    let zeroes = leaked(&"\u{1}".repeat(256));
    let host = 2 | (80 << 24);
    let new_user = usize::try_from(libc::CLONE_NEWUSER).unwrap_or(0);
    vec![
        (
            "trace another process",
            libc::SYS_ptrace,
            [ATTACH, INIT, 0, 0, 0],
        ),
        (
            "read another process's memory",
            libc::SYS_process_vm_readv,
            [INIT, zeroes, 1, zeroes, 1],
        ),
        ("signal another process", libc::SYS_kill, [INIT, 0, 0, 0, 0]),
        (
            "signal a thread of another process",
            libc::SYS_tgkill,
            [INIT, INIT, 0, 0, 0],
        ),
        (
            "hold another process",
            libc::SYS_pidfd_open,
            [INIT, 0, 0, 0, 0],
        ),
        ("execute a program", libc::SYS_execve, [program, 0, 0, 0, 0]),
        ("fork", libc::SYS_clone, [17, 0, 0, 0, 0]),
        ("fork by vfork", libc::SYS_vfork, [0; 5]),
        (
            "map memory to execute",
            libc::SYS_mmap,
            [0, 4096, 5, 34, usize::MAX],
        ),
        ("mount", libc::SYS_mount, [root, root, 0, 4096, 0]),
        (
            "open a tree of mounts",
            libc::SYS_open_tree,
            [AT_FDCWD, root, 1, 0, 0],
        ),
        ("change the root", libc::SYS_chroot, [root, 0, 0, 0, 0]),
        (
            "make a device node",
            libc::SYS_mknodat,
            [AT_FDCWD, node, 0o60_600, 0x0800, 0],
        ),
        (
            "make a user namespace",
            libc::SYS_unshare,
            [new_user, 0, 0, 0, 0],
        ),
        (
            "clone into a user namespace",
            libc::SYS_clone,
            [new_user, 0, 0, 0, 0],
        ),
        ("join a namespace", libc::SYS_setns, [0, 0, 0, 0, 0]),
        ("become root again", libc::SYS_setresuid, [0, 0, 0, 0, 0]),
        ("raise a limit", libc::SYS_prlimit64, [0, 4, zeroes, 0, 0]),
        ("a netlink socket", libc::SYS_socket, [16, 3, 0, 0, 0]),
        ("a packet socket", libc::SYS_socket, [17, 3, 0, 0, 0]),
        ("a vsock socket", libc::SYS_socket, [40, 1, 0, 0, 0]),
        (
            "an io_uring of its own",
            libc::SYS_io_uring_setup,
            [1, zeroes, 0, 0, 0],
        ),
        (
            "a registration of an io_uring",
            libc::SYS_io_uring_register,
            [0, 9, 0, 0, 0],
        ),
        (
            "a filter of its own",
            libc::SYS_seccomp,
            [1, 0, zeroes, 0, 0],
        ),
        (
            "a virtual machine of its own",
            libc::SYS_ioctl,
            [0, 0xAE01, 0, 0, 0],
        ),
        (
            "another tap",
            libc::SYS_ioctl,
            [0, 0x4004_54CA, zeroes, 0, 0],
        ),
        (
            "type into a terminal",
            libc::SYS_ioctl,
            [0, 0x5412, zeroes, 0, 0],
        ),
        ("a BPF program", libc::SYS_bpf, [5, zeroes, 128, 0, 0]),
        (
            "performance counters",
            libc::SYS_perf_event_open,
            [zeroes, 0, 0, usize::MAX, 0],
        ),
        ("handle its own page faults", libc::SYS_userfaultfd, [0; 5]),
        ("the kernel's keys", libc::SYS_keyctl, [0, 0, 0, 0, 0]),
        (
            "open a file by its handle",
            libc::SYS_open_by_handle_at,
            [0, zeroes, 0, 0, 0],
        ),
        (
            "a kernel module",
            libc::SYS_finit_module,
            [0, zeroes, 0, 0, 0],
        ),
        ("I/O ports", libc::SYS_iopl, [3, 0, 0, 0, 0]),
        ("the host's name", libc::SYS_sethostname, [root, 1, 0, 0, 0]),
        (
            "the host's clock",
            libc::SYS_clock_settime,
            [0, zeroes, 0, 0, 0],
        ),
        ("restart the host", libc::SYS_reboot, [0; 5]),
        ("kernel messages", libc::SYS_syslog, [10, 0, 0, 0, 0]),
        (
            "System V shared memory",
            libc::SYS_shmget,
            [host, 4096, 0o1600, 0, 0],
        ),
    ]
}

/// What the home volume's process does.
fn ask(config: &VmConfig, request: &Request) -> std::io::Result<()> {
    let refused = |why: String| Err(std::io::Error::other(why));
    let home = config.home.as_ref().ok_or(std::io::ErrorKind::NotFound)?;
    let answer = Connection::connect(&home.socket, Duration::from_secs(30))
        .and_then(|mut connection| connection.call::<_, Response>(request));
    match answer.map_err(std::io::Error::other)?.0 {
        Response::Refused(why) => refused(why.to_string()),
        Response::Unavailable { reason } => refused(reason),
        Response::Unknown => refused("no coordinator answers".to_owned()),
        _ => Ok(()),
    }
}

fn report<T>(name: &str, outcome: std::io::Result<T>) {
    let filtered = FILTERED.swap(false, Ordering::SeqCst);
    match outcome {
        Ok(_) => tracing::warn!("rogue: {name}: DONE"),
        Err(_) if filtered => tracing::info!("rogue: {name}: refused: system call"),
        Err(error) => tracing::info!("rogue: {name}: refused: {error}"),
    }
}

fn call(number: c_long, arguments: [usize; 5]) -> std::io::Result<c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: the calls either are refused, or only read what `leaked` made and fail.
    let result = unsafe { libc::syscall(number, a, b, c, d, e, 0) };
    if result < 0 {
        Err(std::io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// The address of a text that is never freed.
fn leaked(text: &str) -> usize {
    CString::new(text).map_or(0, |text| text.into_raw().expose_provenance())
}

/// Lets a refused call fail with EPERM: all that a handler can do.
extern "C" fn go_on(_: c_int, _: *mut libc::siginfo_t, context: *mut c_void) {
    FILTERED.store(true, Ordering::SeqCst);
    // SAFETY: with SA_SIGINFO the kernel passes the interrupted context here, which lives until the handler returns.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let register = usize::try_from(libc::REG_RAX).unwrap_or(0);
    if let Some(result) = context.uc_mcontext.gregs.get_mut(register) {
        *result = -i64::from(libc::EPERM);
    }
}

/// The last call was refused by the filter.
static FILTERED: AtomicBool = AtomicBool::new(false);
/// `PTRACE_ATTACH`
const ATTACH: usize = 16;
/// The process id of the host's first process.
const INIT: usize = 1;
const AT_FDCWD: usize = (-100_isize).cast_unsigned();
