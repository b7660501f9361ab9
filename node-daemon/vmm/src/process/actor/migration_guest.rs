//! The actor's machine as a migration thread handles it: every step is a request to the actor.

use std::sync::Arc;

use bascule_types::Ownership;

use super::event::{ActorGone, ActorHandle, MigrationRequest, Reply};
use crate::MachineState;
use crate::migration::{Arrival, Guest, GuestError};
use crate::process::home_volume::VolumeClient;

/// The machine of a source.
pub(super) struct ActorGuest(pub(super) ActorHandle);

impl Guest for ActorGuest {
    fn pause(&mut self) -> Result<(), GuestError> {
        let done = request(&self.0, MigrationRequest::Pause)?;
        let paused = done.recv().map_err(|_| GuestError(ActorGone.to_string()))?;
        paused.map_err(GuestError)
    }

    fn save(&mut self) -> Result<Vec<u8>, GuestError> {
        request(&self.0, MigrationRequest::Save)
    }

    fn resume(&mut self, ownership: Option<Ownership>) -> Result<(), GuestError> {
        request(&self.0, |reply| {
            MigrationRequest::ResumeSource(ownership, reply)
        })
    }

    fn mark_in_doubt(&mut self) -> Result<(), GuestError> {
        request(&self.0, MigrationRequest::MarkInDoubt)
    }
}

/// The machine of a destination.
pub(super) struct ActorArrival {
    pub(super) actor: ActorHandle,
    pub(super) volume: Arc<VolumeClient>,
}

impl Arrival for ActorArrival {
    fn restore(&mut self, state: &[u8]) -> Result<(), GuestError> {
        let state = MachineState::decode(state).map_err(|error| GuestError(error.to_string()))?;
        let state = Box::new(state);
        request(&self.actor, |reply| MigrationRequest::Restore(state, reply))
    }

    fn take_over(&mut self, ownership: Ownership) -> Result<(), GuestError> {
        self.volume
            .open(ownership)
            .map_err(|error| GuestError(format!("{error:#}")))?;
        request(&self.actor, |reply| {
            MigrationRequest::TakeOver(ownership, reply)
        })
    }

    fn announce(&mut self) {
        if let Err(error) = request(&self.actor, MigrationRequest::Announce) {
            tracing::warn!(%error, "the guest's addresses were not announced");
        }
    }

    fn run(&mut self) -> Result<(), GuestError> {
        request(&self.actor, MigrationRequest::RunArrived)
    }
}

fn request<T>(
    actor: &ActorHandle,
    request: impl FnOnce(Reply<anyhow::Result<T>>) -> MigrationRequest,
) -> Result<T, GuestError> {
    match actor.migration(request) {
        Ok(done) => done.map_err(|error| GuestError(format!("{error:#}"))),
        Err(gone) => Err(GuestError(gone.to_string())),
    }
}
