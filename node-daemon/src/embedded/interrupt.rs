//! Catches SIGINT, SIGTERM and SIGHUP, so that a command can clean up before it ends.

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Whether SIGINT, SIGTERM or SIGHUP has arrived. Without [`Interrupt::catch`] these signals end the
/// process as usual.
#[derive(Debug, Default)]
pub(super) struct Interrupt(Option<Caught>);

#[derive(Debug)]
struct Caught {
    arrived: Arc<AtomicBool>,
    /// Becomes readable when a signal arrives.
    wake: UnixStream,
}

impl Interrupt {
    /// From now on these signals no longer end the process.
    pub(super) fn catch() -> Result<Self> {
        let (wake, sender) = UnixStream::pair().context("make a socket pair")?;
        let arrived = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&arrived);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_io()
            .build()
            .context("start the runtime")?;
        let (mut interrupt, mut terminate, mut hangup) = {
            let _entered = runtime.enter();
            (
                signal(SignalKind::interrupt()).context("handle SIGINT")?,
                signal(SignalKind::terminate()).context("handle SIGTERM")?,
                signal(SignalKind::hangup()).context("handle SIGHUP")?,
            )
        };
        std::thread::Builder::new()
            .name("signals".to_owned())
            .spawn(move || {
                runtime.block_on(async {
                    tokio::select! {
                        _ = interrupt.recv() => {}
                        _ = terminate.recv() => {}
                        _ = hangup.recv() => {}
                    }
                });
                flag.store(true, Ordering::Release);
                // Closing its end makes `wake` readable.
                drop(sender);
            })
            .context("start a thread")?;
        Ok(Self(Some(Caught { arrived, wake })))
    }

    /// A descriptor that becomes readable when a signal arrives; none when signals are not caught.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.as_ref().map(|caught| caught.wake.as_fd())
    }

    /// Whether a signal has arrived.
    pub(super) fn arrived(&self) -> bool {
        (self.0.as_ref()).is_some_and(|caught| caught.arrived.load(Ordering::Acquire))
    }

    /// An error once a signal has arrived.
    pub(super) fn check(&self) -> Result<()> {
        if self.arrived() {
            bail!("interrupted");
        }
        Ok(())
    }
}
