//! SIGTERM and SIGINT: the process should end.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use bascule_volume_gate::boot_time_now;
use rustix::event::{Timespec, poll};
use rustix::process::Signal;
use vmm_sys_util::signal::register_signal_handler;

static ASKED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_number: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    ASKED.store(true, Ordering::Release);
}

/// Notes SIGTERM and SIGINT from now on.
///
/// # Errors
/// The system's.
pub fn install() -> Result<()> {
    for signal in [Signal::TERM, Signal::INT] {
        register_signal_handler(signal.as_raw(), note)
            .map_err(|error| anyhow!("signal {}: {error}", signal.as_raw()))?;
    }
    Ok(())
}

/// Waits for a signal or until `done` says so.
pub fn wait(done: impl Fn() -> bool) {
    while !done() && !wait_for(STEP) {}
}

/// Waits for a signal for at most `time`; whether one came.
#[must_use]
pub fn wait_for(time: Duration) -> bool {
    let end = boot_time_now().after(time);
    loop {
        if ASKED.load(Ordering::Acquire) {
            return true;
        }
        let left = end.since(boot_time_now());
        if left.is_zero() {
            return false;
        }
        // A signal interrupts this if it meets this thread; if it meets another, the step ends.
        let step = Timespec::try_from(left.min(STEP)).ok();
        if poll(&mut [], step.as_ref()).is_err() {
            continue;
        }
    }
}

/// How long a signal that met another thread may go unnoticed.
const STEP: Duration = Duration::from_millis(100);
