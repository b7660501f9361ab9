//! Quick migration: the machine is saved as an image on its home volume.
//!
//! The image is the stream of a live migration: `Hello`, `Config`, one round of
//! `Memory`, `RoundEnd`, `State`, `StateEnd`. Its length and a CRC32C over all of it are in the
//! volume's metadata, and are checked before the guest runs.
//!
//! # States
//! ```text
//!  reserve ─► pause ─► write, flush ─► finish ═► transfer or release ─► Departed
//!     │          └────────┴─ failure: resume     └─ failure: retract, which begins a new epoch,
//!     └─ no room: the guest was never paused        and only then resume; or Lost (another owner)
//! ```
//!
//! # Guarantees
//! - A saved state belongs to the epoch in which it was saved and is restored only in the next one. So
//!   a guest that ran on after its state was complete (in a new epoch, see above) is never reverted.
//! - It is dropped before the guest runs: it is restored at most once.

mod image;
mod restore;

use bascule_ipc::vm::{MigrationPhase, VmConfig};
use bascule_ipc::volume::{Request, Response};
use bascule_migrate::commit::{Commit, OwnershipRecord, Terms, TransferRequest};
use bascule_migrate::source::retry_delay;
use bascule_migrate::wire::{Abort, AbortReason, Config, Features, Hello, VERSION_MAX};
use bascule_types::{
    Answer, AttemptId, Bytes, Change, Epoch, Owner, Ownership, SavedStateRow, SavedStateSum, VmUid,
    error_chain,
};

use super::apply::layout_of;
use super::control::MigrationControl;
use super::guest::Guest;
use super::outgoing::OutgoingEnd;
use super::ownership_client::{OwnershipAuthority, OwnershipClient, RecordAnswer};
use super::request::{Refused, describe};
use crate::machine::MachineHandle;
use crate::memory::{self, GuestMemory};
use crate::state;

pub use image::{ImageReader, ImageWriter, SavedArea};
pub use restore::{RestoreSavedError, restore_saved};

/// A requested quick migration.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub struct Quick {
    /// The VM to migrate.
    pub vm: VmUid,
    /// Chosen by the operator.
    pub attempt: AttemptId,
    /// The present owner: the source.
    pub from: Owner,
    pub epoch: Epoch,
    /// The next owner; none to release the VM for any node.
    pub to: Option<Owner>,
    /// Number of virtual CPUs.
    pub cpus: u16,
    /// Must be equal on both sides.
    pub description: Vec<u8>,
}

/// Bytes per page that an image has beside its contents: headers and runs. A run is 16 bytes and a page
/// may be a run of its own.
const OVERHEAD_BYTES_PER_PAGE: u64 = 20;

impl Quick {
    /// The quick migration that `config`'s machine would make.
    ///
    /// # Errors
    /// [`Refused`].
    pub fn new(
        config: &VmConfig,
        ownership: Ownership,
        attempt: AttemptId,
        to: Option<Owner>,
    ) -> Result<Self, Refused> {
        let Ownership { owner: from, epoch } = ownership;
        config.home.as_ref().ok_or(Refused::NoHome)?;
        if to.is_some_and(|to| to.slot == from.slot) {
            return Err(Refused::SameNode);
        }
        Ok(Self {
            vm: config.uid,
            attempt,
            from,
            epoch,
            to,
            cpus: config.cpus.into(),
            description: describe(config).map_err(Refused::Description)?,
        })
    }

    fn hello(&self, row: &OwnershipClient) -> Hello {
        Hello {
            version_min: VERSION_MAX,
            version_max: VERSION_MAX,
            streams: 1,
            offered: Features(0),
            required: Features(0),
            vm: self.vm,
            attempt: self.attempt,
            epoch: self.epoch,
            source: self.from,
            volume: row.volume(),
        }
    }

    fn config(&self, memory: &GuestMemory) -> Config {
        Config {
            vcpus: self.cpus,
            state_version: state::VERSION,
            layout: layout_of(memory),
            description: self.description.clone(),
            offered_mtus: Vec::new(),
        }
    }
}

/// The largest image of a machine with this memory.
#[must_use]
pub fn image_size(memory: &GuestMemory) -> Bytes {
    let Bytes(ram) = memory::size_of(memory);
    let overhead = ram / memory::PAGE_SIZE * OVERHEAD_BYTES_PER_PAGE;
    Bytes(ram + overhead + bascule_migrate::wire::STATE_BYTES_MAX + (1 << 20))
}

/// Saves a running machine to its volume and gives its ownership up. `area` opens the reserved extents
/// for writing.
pub fn migrate_quick(
    guest: &mut dyn Guest,
    machine: &MachineHandle,
    job: &Quick,
    row: &mut OwnershipClient,
    area: impl FnOnce(&SavedStateRow) -> Result<SavedArea, String>,
    control: &MigrationControl,
) -> OutgoingEnd {
    let mut driver = Driver {
        guest,
        machine,
        job,
        row,
        control,
    };
    match driver.save(area) {
        Ok(sum) => driver.commit(sum),
        Err(failure) => driver.resume_source(failure, None),
    }
}

struct Driver<'a> {
    guest: &'a mut dyn Guest,
    machine: &'a MachineHandle,
    job: &'a Quick,
    row: &'a mut OwnershipClient,
    control: &'a MigrationControl,
}

impl Driver<'_> {
    /// Up to the complete image on the disk, which is not recorded yet. A failure is harmless.
    fn save(
        &mut self,
        area: impl FnOnce(&SavedStateRow) -> Result<SavedArea, String>,
    ) -> Result<SavedStateSum, Abort> {
        let size = image_size(self.machine.memory());
        let reserved = self.change(&Change::ReserveSavedState {
            vm: self.job.vm,
            from: self.job.from,
            epoch: self.job.epoch,
            size,
        })?;
        let Answer::SavedState(reserved) = reserved else {
            return Err(internal("the volume reserved nothing"));
        };
        let area = area(&reserved).map_err(internal)?;
        self.control.enter(MigrationPhase::Stopping);
        self.guest.pause().map_err(|error| internal(error.0))?;
        let state = self.guest.save().map_err(|error| internal(error.0))?;
        let memory = self.machine.memory();
        let head = (self.job.hello(self.row), self.job.config(memory));
        let sum = image::write(area, memory, head, &state, self.control)
            .map_err(|error| internal(error_chain(&error)))?;
        self.guest
            .mark_in_doubt()
            .map_err(|error| internal(error.0))?;
        if !self.control.pass_commit_point() {
            return Err(Abort::new(
                AbortReason::Cancelled,
                "the migration was cancelled",
            ));
        }
        Ok(sum)
    }

    /// From here on a next owner may restore the image: the guest runs here again only in a new
    /// epoch.
    fn commit(mut self, sum: SavedStateSum) -> OutgoingEnd {
        self.control.enter(MigrationPhase::Committing);
        let SavedStateSum { length, crc32c } = sum;
        let finished = self.change(&Change::FinishSavedState {
            vm: self.job.vm,
            from: self.job.from,
            epoch: self.job.epoch,
            length,
            crc32c,
        });
        let terms = Terms {
            source: self.job.from,
            epoch: self.job.epoch,
            destination: self.job.to.unwrap_or(self.job.from),
            attempt: self.job.attempt,
        };
        let retraction = AttemptId::random();
        match (finished, self.job.to) {
            (Ok(_), Some(_)) => {
                let refused = internal("the volume refused to transfer the ownership");
                self.settle(Commit::begin(terms, retraction), refused)
            }
            (Ok(_), None) => self.release(),
            (Err(failure), _) => self.settle(Commit::give_up(terms, retraction), failure),
        }
    }

    /// Repeats the request until it is known which node owns the VM.
    fn settle(self, mut commit: Commit, failure: Abort) -> OutgoingEnd {
        let mut attempts = 0;
        while let Some(request) = commit.request() {
            let next = commit.next(self.row.request(&request));
            if next == commit {
                std::thread::sleep(retry_delay(attempts));
                attempts += 1;
            }
            if matches!(request, TransferRequest::Transfer(_)) && next != commit {
                tracing::debug!(?next, "reply to the transfer");
            }
            commit = next;
        }
        match commit {
            Commit::Committed { epoch } => self.departed(epoch),
            Commit::Resumed { owner, epoch } => {
                self.resume_source(failure, Some(Ownership::new(owner, epoch)))
            }
            Commit::Lost | Commit::Transferring(_) | Commit::Retracting(_) => {
                let what = "another node owns the VM";
                self.control
                    .end(MigrationPhase::Failed, Some(what.to_owned()));
                OutgoingEnd::Lost
            }
        }
    }

    /// Releases the ownership, and repeats the request until that is certain. The next owner restores
    /// the image.
    fn release(self) -> OutgoingEnd {
        let (vm, epoch) = (self.job.vm, self.job.epoch);
        let mut owner = self.job.from;
        for attempts in 0.. {
            // The guest is in doubt and never writes again: only then is a release a clean one.
            let close = Request::CloseVm { vm, owner, epoch };
            let closed = self.row.call(&close);
            let from = owner;
            let release = Request::Change(Change::Release { vm, from, epoch });
            match closed.and_then(|_| self.row.call(&release)) {
                Some(Response::Granted(_)) => break,
                Some(Response::Refused(refusal)) => {
                    tracing::warn!(%refusal, "the volume refused to release the ownership");
                    match self.row.record() {
                        // The node joined in a new generation, and the ownership was kept.
                        RecordAnswer::Record(OwnershipRecord {
                            owner: Some(now),
                            epoch: same,
                            ..
                        }) if now.slot == owner.slot && same == epoch => owner = now,
                        // Released by an earlier copy of the request, or owned by another node since.
                        RecordAnswer::Record(_) | RecordAnswer::NoRecord => break,
                        RecordAnswer::NoAnswer => {}
                    }
                }
                other => tracing::info!(?other, "the ownership is not released yet"),
            }
            std::thread::sleep(retry_delay(attempts));
        }
        self.departed(epoch)
    }

    fn departed(self, epoch: Epoch) -> OutgoingEnd {
        self.control.end(MigrationPhase::Completed, None);
        OutgoingEnd::Departed { epoch }
    }

    /// Resumes the guest, then gives the reserved extents back.
    fn resume_source(mut self, failure: Abort, ownership: Option<Ownership>) -> OutgoingEnd {
        if let Err(error) = self.guest.resume(ownership) {
            tracing::warn!(%error, "the guest could not be resumed");
        }
        let own = Ownership::new(self.job.from, self.job.epoch);
        let Ownership { owner: from, epoch } = ownership.unwrap_or(own);
        let vm = self.job.vm;
        if let Err(abort) = self.change(&Change::DropSavedState { vm, from, epoch }) {
            tracing::warn!(text = %abort.text, "the reserved extents were not given back");
        }
        let phase = match failure.reason {
            AbortReason::Cancelled => MigrationPhase::Cancelled,
            _ => MigrationPhase::Failed,
        };
        tracing::warn!(reason = ?failure.reason, text = %failure.text, "the quick migration failed");
        self.control.end(phase, Some(failure.text.clone()));
        OutgoingEnd::Kept { failure, ownership }
    }

    /// Requests a change, a bounded number of times.
    fn change(&mut self, change: &Change) -> Result<Answer, Abort> {
        self.row.request_change(change).map_err(internal)
    }
}

fn internal(text: impl Into<String>) -> Abort {
    Abort::new(AbortReason::Internal, text)
}
