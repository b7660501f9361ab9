//! A client that has the guest write to its disk continuously and counts the acknowledged records.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};

use super::{ClusterVm, Talk};

/// Appends records until it is stopped or the session breaks; stopped when dropped.
#[derive(Debug)]
pub struct Writer {
    running: Arc<AtomicBool>,
    promised: Arc<AtomicU64>,
    thread: JoinHandle<()>,
}

impl ClusterVm<'_> {
    /// Starts writing.
    ///
    /// # Errors
    /// When the guest does not answer.
    pub fn writer(&self) -> Result<Writer> {
        let mut talk = self.talk()?;
        let running = Arc::new(AtomicBool::new(true));
        let promised = Arc::new(AtomicU64::new(talk.append()?));
        let (keep_on, number) = (Arc::clone(&running), Arc::clone(&promised));
        let thread = std::thread::Builder::new()
            .name("writer".into())
            .spawn(move || write(&mut talk, &keep_on, &number))
            .context("start a thread")?;
        Ok(Writer {
            running,
            promised,
            thread,
        })
    }
}

impl Writer {
    /// Stops and returns the number of the last acknowledged record.
    ///
    /// # Errors
    /// When the thread panicked.
    pub fn finish(self) -> Result<u64> {
        self.running.store(false, Ordering::Relaxed);
        let panicked = |_| anyhow!("the writer panicked");
        self.thread.join().map_err(panicked)?;
        Ok(self.promised.load(Ordering::Acquire))
    }
}

fn write(talk: &mut Talk, running: &AtomicBool, promised: &AtomicU64) {
    while running.load(Ordering::Relaxed) {
        // A broken session ends the acknowledged records.
        let Ok(number) = talk.append() else { return };
        promised.store(number, Ordering::Release);
    }
}
