//! SIGTERM and SIGINT: the host shuts down. The holder ignores them, and SIGHUP ends neither process.

use std::io;
use std::sync::Arc;

use nix::sys::signal::{SigSet, Signal};

use crate::keepalive::Shared;

/// Blocks the signals in this thread and in those that it starts.
///
/// # Errors
/// The system's.
pub fn block() -> nix::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals.thread_block()?;
    Ok(signals)
}

/// Waits for the signals on a thread of its own.
///
/// # Errors
/// When the thread cannot be started.
pub fn watch(signals: SigSet, shared: Arc<Shared>) -> io::Result<()> {
    let receive = move || {
        loop {
            match signals.wait() {
                Ok(Signal::SIGHUP) => {}
                Ok(signal) => {
                    tracing::info!(%signal, "ending once no volume with writers is enlisted");
                    shared.terminate();
                }
                Err(error) => {
                    tracing::error!(%error, "cannot wait for signals any more");
                    return;
                }
            }
        }
    };
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(receive)
        .map(drop)
}
