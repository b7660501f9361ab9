//! A ring over a device of a simulation, which sees commands with their bytes instead of addresses.
#![expect(unsafe_code, reason = "commands take raw addresses")]

use std::collections::BTreeMap;
use std::fmt;
use std::io;
use std::time::Instant;

use super::{Command, HostRun, Ring};

/// A device that performs commands when it likes, and on a clock of its own.
pub trait SimulatedDevice: fmt::Debug {
    /// Takes a command; its completion carries `tag`.
    fn submit(&mut self, tag: u64, command: DeviceCommand);

    /// The next completion that is due.
    fn reap(&mut self) -> Option<(u64, io::Result<Transferred>)>;

    /// Returns when a completion is due. Called while a command is in flight.
    fn wait(&mut self);

    /// The process was killed: it waits for nothing, and completions are posted to nobody.
    fn is_killed(&self) -> bool;

    /// The present time, as a time after one that was taken at the beginning of the run.
    fn now(&self) -> Instant;
}

/// A command, as a device sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum DeviceCommand {
    /// Reads `length` bytes from `offset` on.
    Read { offset: u64, length: usize },
    /// Writes `bytes` at `offset`.
    Write { offset: u64, bytes: Vec<u8> },
    /// Makes what was written durable.
    Sync,
}

/// What a command that succeeded has done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transferred {
    /// Read these bytes: as many as were asked for, or fewer.
    Read(Vec<u8>),
    /// Written this many bytes.
    Written(usize),
}

/// A ring over a [`SimulatedDevice`].
#[derive(Debug)]
pub struct SimulatedRing<D> {
    /// The device.
    pub device: D,
    /// The commands in flight, with the memory that those which read fill.
    in_flight: BTreeMap<u64, Vec<HostRun>>,
    /// The next batch.
    pushed: Vec<(u64, DeviceCommand)>,
    in_flight_max: usize,
}

impl<D: SimulatedDevice> SimulatedRing<D> {
    /// A ring that has room for `in_flight_max` commands.
    pub fn new(device: D, in_flight_max: usize) -> Self {
        let in_flight = BTreeMap::new();
        Self {
            device,
            in_flight,
            pushed: Vec::new(),
            in_flight_max,
        }
    }
}

impl<D: SimulatedDevice> Ring for SimulatedRing<D> {
    fn has_room(&self) -> bool {
        self.in_flight.len() < self.in_flight_max
    }

    fn in_flight(&self) -> usize {
        if self.device.is_killed() {
            return 0;
        }
        self.in_flight.len() - self.pushed.len()
    }

    /// A write's bytes are read here.
    unsafe fn push(&mut self, command: Command<'_>, tag: u64) -> io::Result<()> {
        let (command, fills) = match command {
            Command::Read { runs, offset } => {
                let length = runs.iter().map(|run| run.length).sum();
                (DeviceCommand::Read { offset, length }, runs.to_vec())
            }
            Command::Write { runs, offset, .. } => {
                let bytes = runs.iter().flat_map(|run| bytes_of(*run)).collect();
                (DeviceCommand::Write { offset, bytes }, Vec::new())
            }
            Command::Sync => (DeviceCommand::Sync, Vec::new()),
        };
        let before = self.in_flight.insert(tag, fills);
        assert!(before.is_none(), "two commands with tag {tag}");
        self.pushed.push((tag, command));
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        for (tag, command) in std::mem::take(&mut self.pushed) {
            self.device.submit(tag, command);
        }
        Ok(())
    }

    fn reap(&mut self) -> Option<(u64, io::Result<usize>)> {
        let (tag, result) = self.device.reap()?;
        let fills = self.in_flight.remove(&tag)?;
        let result = result.map(|transferred| match transferred {
            Transferred::Read(bytes) => fill(&fills, &bytes),
            Transferred::Written(count) => count,
        });
        Some((tag, result))
    }

    fn acknowledge(&self) {}

    fn wait(&mut self) -> io::Result<()> {
        if self.in_flight() > 0 {
            self.device.wait();
        }
        Ok(())
    }

    fn now(&self) -> Instant {
        self.device.now()
    }
}

fn bytes_of(run: HostRun) -> Vec<u8> {
    let start = std::ptr::with_exposed_provenance::<u8>(run.address);
    let mut bytes = vec![0; run.length];
    // SAFETY: the caller of `push` promises that the run is mapped memory into which no reference exists, and
    // `bytes` is new memory of its length.
    unsafe { std::ptr::copy_nonoverlapping(start, bytes.as_mut_ptr(), run.length) };
    bytes
}

/// Copies `bytes` to the runs, one after the other. Returns how many.
fn fill(runs: &[HostRun], bytes: &[u8]) -> usize {
    let mut rest = bytes;
    for run in runs {
        let (here, later) = rest.split_at(rest.len().min(run.length));
        let start = std::ptr::with_exposed_provenance_mut::<u8>(run.address);
        // SAFETY: the caller of `push` promised that the run of a read is writable memory, mapped until this
        // completion, into which no reference exists; `here` is not longer than the run.
        unsafe { std::ptr::copy_nonoverlapping(here.as_ptr(), start, here.len()) };
        rest = later;
    }
    assert!(rest.is_empty(), "more bytes than were asked for");
    bytes.len()
}
