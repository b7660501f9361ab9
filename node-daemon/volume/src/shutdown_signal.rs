//! SIGTERM and SIGINT: requests to stop this process.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Result, anyhow};
use bascule_volume_gate::boot_time_now;
use rustix::event::{Timespec, poll};
use rustix::process::Signal;
use vmm_sys_util::signal::register_signal_handler;

static STOP_REQUESTED: AtomicBool = AtomicBool::new(false);

extern "C" fn note(_number: libc::c_int, _info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    STOP_REQUESTED.store(true, Ordering::Release);
}

/// Installs the handlers of SIGTERM and SIGINT.
///
/// # Errors
/// Those of `sigaction(2)`.
pub fn install() -> Result<()> {
    for signal in [Signal::TERM, Signal::INT] {
        register_signal_handler(signal.as_raw(), note)
            .map_err(|error| anyhow!("signal {}: {error}", signal.as_raw()))?;
    }
    Ok(())
}

/// Waits for a signal or until `done`, which is polled every 100 ms.
pub fn wait(done: impl Fn() -> bool) {
    while !done() && !wait_for(STEP) {}
}

/// Waits for a signal for at most `time`; returns whether one has arrived.
#[must_use]
pub fn wait_for(time: Duration) -> bool {
    let end = boot_time_now().after(time);
    loop {
        if STOP_REQUESTED.load(Ordering::Acquire) {
            return true;
        }
        let left = end.since(boot_time_now());
        if left.is_zero() {
            return false;
        }
        // A signal interrupts poll() only if the kernel delivers it to this thread; otherwise the
        // step ends after at most STEP.
        let step = Timespec::try_from(left.min(STEP)).ok();
        if poll(&mut [], step.as_ref()).is_err() {
            continue;
        }
    }
}

/// Bound on the delay of a signal that another thread received.
const STEP: Duration = Duration::from_millis(100);
