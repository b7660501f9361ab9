//! The way of a sub-request to the device: what holds it back, the gate, the command.

use std::io;

use bascule_types::WriterState;

use super::super::job::SubRequestKind;
use super::super::ring::{Command, Ring};
use super::DiskEngine;

impl<R: Ring> DiskEngine<R> {
    /// Submits, as one batch, the sub-requests that may be submitted now. Returns how many.
    ///
    /// The gate is checked once per batch and last: between the check and the system call that submits the batch
    /// lie only the stores that fill in its commands.
    pub(super) fn submit(&mut self) -> io::Result<usize> {
        let mut count = self.push_probe()?;
        self.stats.stalled = false;
        if self.held_back.blocks(self.ring.now()) {
            self.stats.stalled = !self.ready.is_empty();
            return self.submit_batch(count, false);
        }
        let mut gate_is_open = None;
        let mut changes_the_device = false;
        while self.ring.has_room() {
            let writes = gate_is_open != Some(false);
            let Some(is_write) = self.ready.next_is_write(writes) else {
                break;
            };
            if is_write && !*gate_is_open.get_or_insert_with(|| self.gate_is_open()) {
                self.stats.stalled = true;
                continue;
            }
            let Some(key) = self.ready.take(is_write) else {
                break;
            };
            let Some(kind) = self.sub_requests.get(key).map(|own| own.kind) else {
                continue;
            };
            changes_the_device |= kind != SubRequestKind::Read;
            self.push(key)?;
            count += 1;
        }
        self.submit_batch(count, changes_the_device)
    }

    fn submit_batch(&mut self, count: usize, changes_the_device: bool) -> io::Result<usize> {
        if count == 0 {
            return Ok(0);
        }
        let submitted = self.ring.submit();
        if submitted.is_err() && changes_the_device {
            // Which commands the kernel has is unknown: the writes count as in flight for good.
            self.becomes_unclean();
        }
        submitted.map(|()| count)
    }

    /// Tells the gate that a write may be under way, before it samples the clock.
    fn gate_is_open(&mut self) -> bool {
        if !std::mem::replace(&mut self.told_begin, true) {
            self.disk.gate.write_begins();
        }
        self.disk.gate.is_open()
    }

    /// Tells the gate if no write is in flight any more.
    pub(super) fn tell_ended(&mut self) {
        if self.writes_in_flight == 0 && std::mem::take(&mut self.told_begin) {
            self.disk.gate.writes_ended();
        }
    }

    pub(super) fn becomes_unclean(&mut self) {
        self.stats.writer_state = WriterState::Unclean;
        self.disk.gate.write_failed();
    }

    #[expect(unsafe_code, reason = "io_uring takes raw addresses")]
    fn push(&mut self, key: usize) -> io::Result<()> {
        let Some(sub_request) = self.sub_requests.get(key) else {
            return Ok(());
        };
        let command = match sub_request.kind {
            SubRequestKind::Read => Command::Read {
                runs: &sub_request.runs,
                offset: sub_request.offset,
            },
            SubRequestKind::Write { durable } => Command::Write {
                runs: &sub_request.runs,
                offset: sub_request.offset,
                durable,
            },
            SubRequestKind::Sync => Command::Sync,
        };
        let tag = u64::try_from(key).map_err(io::Error::other)?;
        // SAFETY: the runs lie in guest memory, which `self.ram` keeps mapped (writable) and into
        // which no references are held, or in the job's bounce buffer, which is neither moved,
        // read nor dropped before its last command has completed. Dropping the engine waits for
        // all completions first.
        unsafe { self.ring.push(command, tag) }?;
        if sub_request.kind.is_write() {
            self.writes_in_flight += 1;
        }
        Ok(())
    }
}
