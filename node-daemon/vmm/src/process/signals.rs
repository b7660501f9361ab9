//! SIGTERM and SIGINT: the host shuts down, and the guest must too.
//!
//! No signal but SIGKILL ends the process as long as its guest runs. SIGHUP, which systemd may send along
//! with SIGTERM, has no effect.

use nix::sys::signal::{SigSet, Signal};

use super::actor::event::{ActorHandle, Event, HostShutdown};

/// Blocks the signals in this thread and in those that it starts.
pub(super) fn block() -> nix::Result<SigSet> {
    let signals = SigSet::from_iter([Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP]);
    signals.thread_block()?;
    Ok(signals)
}

/// Tells the actor of every signal, from a thread of its own.
pub(super) fn watch(signals: SigSet, actor: ActorHandle) -> std::io::Result<()> {
    let receive = move || {
        loop {
            match signals.wait() {
                Ok(Signal::SIGHUP) => tracing::info!("SIGHUP is ignored"),
                Ok(signal) => {
                    tracing::info!(%signal, "received");
                    let told =
                        actor.request(|reply| Event::HostShutdown(HostShutdown::Requested, reply));
                    if told.is_err() {
                        return;
                    }
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
