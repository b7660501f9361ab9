//! Restoring a machine from its image on the volume.

use bascule_ipc::vm::VmConfig;
use bascule_migrate::destination::{ExpectConfig, Machine, MemoryStep, StateStep};
use bascule_migrate::wire::{Abort, StreamId};
use bascule_migrate::{FrameBuffer, WireError};
use bascule_types::{Change, Epoch, Ownership, SavedStateRow};

use super::image::{ImageReader, SavedArea};
use crate::machine::PausedVm;
use crate::migration::apply::{Applier, layout_of};
use crate::migration::ownership_client::{OwnershipAuthority, OwnershipClient};
use crate::migration::request::describe;
use crate::state::{self, MachineState, StateError};

/// Why a saved state was not restored. The machine cannot be used again.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum RestoreSavedError {
    /// It was never completed.
    #[error("the saved state is not complete")]
    NotComplete,
    /// It is older than the last time that the guest ran.
    #[error("the saved state is of epoch {saved}, and the VM is in epoch {epoch}")]
    OtherEpoch {
        /// The epoch in which it was saved.
        saved: Epoch,
        epoch: Epoch,
    },
    /// It cannot be read.
    #[error("the saved state cannot be read")]
    Read(#[from] WireError),
    /// Its contents have changed.
    #[error("the saved state is corrupt: its checksum is {found:#010x} and not {expected:#010x}")]
    Corrupt {
        /// As computed.
        found: u32,
        /// As recorded.
        expected: u32,
    },
    /// It is of another machine, or not an image.
    #[error("the saved state does not fit: {}", .0.text)]
    DoesNotFit(Abort),
    /// Guest memory cannot be written.
    #[error("guest memory cannot be written")]
    Memory(#[from] vm_memory::GuestMemoryError),
    /// The device state is not readable.
    #[error(transparent)]
    State(#[from] StateError),
    /// The machine does not restore it.
    #[error(transparent)]
    Machine(#[from] crate::RestoreError),
    /// The configuration cannot be compared.
    #[error("the machine's configuration cannot be described")]
    Description(#[source] serde_json::Error),
    /// The volume does not drop it: it might be restored twice.
    #[error("the saved state is not dropped: {0}")]
    NotDropped(String),
}

/// Restores the state saved in the epoch before `ownership` in an incoming machine, and drops it from
/// the volume: the guest may then run.
///
/// # Errors
/// [`RestoreSavedError`].
pub fn restore_saved(
    vm: &mut PausedVm,
    config: &VmConfig,
    ownership: Ownership,
    saved: &SavedStateRow,
    area: SavedArea,
    client: &mut OwnershipClient,
) -> Result<(), RestoreSavedError> {
    let Ownership { owner, epoch } = ownership;
    let sum = saved.complete.ok_or(RestoreSavedError::NotComplete)?;
    if saved.epoch.next() != epoch {
        return Err(RestoreSavedError::OtherEpoch {
            saved: saved.epoch,
            epoch,
        });
    }
    let mut image = ImageReader::new(area, sum.length);
    let expected = (config.uid, client.volume(), saved.epoch);
    let state = read(vm, config, &mut image, expected)?;
    let (found, whole) = image.checksum();
    if found != sum.crc32c || !whole {
        return Err(RestoreSavedError::Corrupt {
            found,
            expected: sum.crc32c,
        });
    }
    vm.restore(MachineState::decode(&state)?)?;
    let drop = Change::DropSavedState {
        vm: config.uid,
        from: owner,
        epoch,
    };
    client
        .request_change(&drop)
        .map_err(RestoreSavedError::NotDropped)?;
    Ok(())
}

/// Reads memory into the machine; returns the device state.
fn read(
    vm: &PausedVm,
    config: &VmConfig,
    image: &mut ImageReader,
    expected: (bascule_types::VmUid, bascule_types::VolumeId, Epoch),
) -> Result<Vec<u8>, RestoreSavedError> {
    let memory = vm.handle().memory().clone();
    let machine = Machine {
        vcpus: config.cpus.into(),
        state_versions: (state::VERSION, state::VERSION),
        layout: layout_of(&memory),
        description: describe(config).map_err(RestoreSavedError::Description)?,
        // A saved guest is restored on any network: there is nothing else of it.
        interfaces: Vec::new(),
    };
    let not_it = RestoreSavedError::DoesNotFit;
    let mut frames = FrameBuffer::new(StreamId::FIRST);
    let phase = ExpectConfig::of_image(frames.receive(image)?, expected).map_err(not_it)?;
    let mut phase = phase
        .config(frames.receive(image)?, &machine)
        .map_err(not_it)?
        .resident();
    let mut applier = Applier::new(&memory);
    let mut state = loop {
        let mark = frames.mark();
        phase = match phase.frame(frames.receive(image)?, mark).map_err(not_it)? {
            MemoryStep::Apply(phase, batch) => {
                applier.apply(&batch)?;
                phase
            }
            MemoryStep::RoundEnded(phase, _)
            | MemoryStep::Ping(phase, _)
            | MemoryStep::Progress(phase, _) => phase,
            MemoryStep::State(state) => break state,
        };
    };
    loop {
        match state.frame(&frames.receive(image)?).map_err(not_it)? {
            StateStep::More(next) => state = next,
            StateStep::Complete(_, bytes) => return Ok(bytes),
        }
    }
}
