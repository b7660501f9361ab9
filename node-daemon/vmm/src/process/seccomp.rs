//! The system calls that the process may make, and the end of a process that makes another one.
//!
//! Two filters are installed, both for all threads: they share their memory, so whoever controls one thread controls
//! all of them, and a narrower filter for one kind of thread would protect nothing.
//!
//! | filter | installed | allows |
//! |---|---|---|
//! | [`Stage::Starting`] | before the second thread is started | what building a machine and running its guest need |
//! | [`Stage::Running`] | when the machine is built, before its guest runs or a source of a migration is admitted | the same without new machines, vCPUs, rings and filters |
//!
//! A call that is not allowed is not executed, and ends the process: [`on_refused`] writes the call's number to `vm.log`
//! and to `state.json`. One call is probed: clone3 fails with ENOSYS, as on a kernel without it, so that glibc takes clone,
//! whose flags a filter can see (seccomp(2): a filter cannot follow pointers).
#![expect(
    unsafe_code,
    reason = "a signal handler reads what the kernel tells of a refused call"
)]

mod calls;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_int, c_uint, c_void};
use std::fmt::{self, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt as _;
use std::sync::OnceLock;

use anyhow::Context as _;
use bascule_ipc::vm::{LastState, StopReason, VmState};
use bascule_types::VmUid;
use rustix::fs::{Mode, OFlags};
use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch};
use vmm_sys_util::signal::register_signal_handler;

use super::run_dir::RunDir;
use calls::Stage;

/// What [`on_refused`] needs, prepared because a signal handler may neither allocate nor lock.
struct Report {
    log: OwnedFd,
    /// `state.json` of a process that has failed: the text before and after the reason.
    state: (Vec<u8>, Vec<u8>),
    state_draft: CString,
    state_path: CString,
}

static REPORT: OnceLock<Report> = OnceLock::new();

/// Restricts the process to [`Stage::Starting`]. Called while there is one thread, which passes the filter on
/// to those that it starts.
///
/// # Errors
/// When the kernel has no seccomp filters, or the run directory's log cannot be opened.
pub(super) fn restrict(run_dir: &RunDir, uid: VmUid) -> anyhow::Result<()> {
    let report = Report::new(run_dir, uid)?;
    // Fails only when it was set before, to the same.
    REPORT.set(report).ok();
    register_signal_handler(libc::SIGSYS, on_refused).context("handle SIGSYS")?;
    let absent = without_clone3().context("compile the filter of clone3")?;
    let starting = compile(Stage::Starting).context("compile the first filter")?;
    seccompiler::apply_filter(&absent).context("install the filter of clone3")?;
    seccompiler::apply_filter(&starting).context("install the first filter")
}

/// Restricts all threads to [`Stage::Running`], for good. Does nothing in a process that [`restrict`] was not called in:
/// a test of the actor.
///
/// # Errors
/// When the kernel refuses.
pub(super) fn restrict_further() -> anyhow::Result<()> {
    if REPORT.get().is_none() {
        return Ok(());
    }
    let running = compile(Stage::Running).context("compile the second filter")?;
    seccompiler::apply_filter_all_threads(&running).context("install the second filter")
}

fn compile(stage: Stage) -> Result<BpfProgram, seccompiler::BackendError> {
    let filter = SeccompFilter::new(
        calls::allowed(stage, std::process::id())?,
        SeccompAction::Trap,
        SeccompAction::Allow,
        TargetArch::x86_64,
    )?;
    filter.try_into()
}

fn without_clone3() -> Result<BpfProgram, seccompiler::BackendError> {
    let filter = SeccompFilter::new(
        BTreeMap::from([(libc::SYS_clone3, Vec::new())]),
        SeccompAction::Allow,
        SeccompAction::Errno(libc::ENOSYS.unsigned_abs()),
        TargetArch::x86_64,
    )?;
    filter.try_into()
}

impl Report {
    fn new(run_dir: &RunDir, uid: VmUid) -> anyhow::Result<Self> {
        let what = REASON.to_owned();
        let state = VmState::Stopped(StopReason::Failed { what });
        let text = serde_json::to_string(&LastState { uid, state })?;
        let (before, after) = text.split_once(REASON).context("no place for a reason")?;
        let c_string = |name: &str| CString::new(run_dir.path().join(name).as_os_str().as_bytes());
        Ok(Self {
            log: run_dir.log().context("open the log")?.into(),
            state: (before.into(), after.into()),
            state_draft: c_string("state.json.new")?,
            state_path: c_string("state.json")?,
        })
    }

    /// Only system calls, so that a signal handler may call it.
    fn write(&self, refused: &Line) {
        let mut line = Line::new();
        // Without a log or a last state, the process ends all the same.
        writeln!(line, "ERROR bascule_vmm: {}", refused.text()).ok();
        rustix::io::write(&self.log, line.bytes()).ok();
        self.write_state(refused).ok();
    }

    fn write_state(&self, refused: &Line) -> rustix::io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR | Mode::RGRP | Mode::ROTH;
        let draft: &CStr = &self.state_draft;
        let file = rustix::fs::open(draft, flags, mode)?;
        let (before, after) = &self.state;
        for part in [before.as_slice(), refused.bytes(), after] {
            rustix::io::write(&file, part)?;
        }
        rustix::fs::rename(draft, self.state_path.as_c_str())
    }
}

/// One line of text in a fixed space. What does not fit is cut off.
struct Line {
    bytes: [u8; LINE_BYTES],
    length: usize,
}

impl Line {
    const fn new() -> Self {
        Self {
            bytes: [0; LINE_BYTES],
            length: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    fn text(&self) -> &str {
        std::str::from_utf8(self.bytes()).unwrap_or_default()
    }
}

impl fmt::Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let end = self.length + text.len();
        let room = self.bytes.get_mut(self.length..end).ok_or(fmt::Error)?;
        room.copy_from_slice(text.as_bytes());
        self.length = end;
        Ok(())
    }
}

/// `siginfo_t` of a SIGSYS (sigaction(2)).
#[repr(C)]
struct RefusedCall {
    signal: c_int,
    errno: c_int,
    code: c_int,
    call_address: *mut c_void,
    call: c_int,
    architecture: c_uint,
}

/// Handles SIGSYS in the thread whose call was refused.
extern "C" fn on_refused(_: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a `siginfo_t` of at least this size, aligned for it, which lives until the
    // handler returns.
    let call = unsafe { (*info.cast::<RefusedCall>()).call };
    // SAFETY: with SA_SIGINFO the kernel passes the interrupted context here, which lives as long.
    let registers = unsafe { (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
    let argument = |register: c_int| {
        let index = usize::try_from(register).unwrap_or_default();
        registers.get(index).copied().unwrap_or_default()
    };
    let mut text = Line::new();
    let (first, second) = (argument(libc::REG_RDI), argument(libc::REG_RSI));
    write!(
        text,
        "system call {call} ({first:#x}, {second:#x}, ...) is not one that this process may make"
    )
    .ok();
    if let Some(report) = REPORT.get() {
        report.write(&text);
    }
    std::process::abort();
}

/// Longer than the line of a call.
const LINE_BYTES: usize = 256;
/// Stands for the reason until there is one.
const REASON: &str = "REASON";
