//! Keeps the ownership when the node's lease lapses and is renewed.
//!
//! A gate that closes because the lease lapsed opens when the lease is renewed. When the node joined
//! the volume again in a new generation, the VM's ownership may have been kept in the same epoch: this
//! thread opens the volume again, and writes go on under the new generation. When another node owns the
//! VM by then, that node runs the guest: this process exits at once.

use std::sync::Arc;
use std::time::Duration;

use bascule_devices::disk::VolumeGate;
use bascule_types::Ownership;
use bascule_volume_gate::GateClosedReason;

use super::event::{ActorGone, ActorHandle, Event, OwnershipRequest, Reply};
use crate::process::home_volume::{Reopened, VolumeClient};

/// Poll interval of the gate page, which is shared memory without notification. Guest writes have
/// waited for a whole lease by then, so that the interval adds little.
const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// Exit status of a process that has lost its ownership.
const EXIT_OWNERSHIP_LOST: i32 = 70;

/// Starts the watching thread, which lives as long as the process.
pub(super) fn watch(
    gate: Arc<VolumeGate>,
    volume: Arc<VolumeClient>,
    actor: ActorHandle,
) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("ownership".to_owned())
        .spawn(move || {
            loop {
                std::thread::sleep(POLL_INTERVAL);
                let Some(GateClosedReason::OtherOwner { shown: Some(shown) }) =
                    gate.closed_reason()
                else {
                    continue;
                };
                let Ok(present) = request(&actor, OwnershipRequest::Get) else {
                    return;
                };
                if let Some(Ownership { owner, epoch }) = present
                    && owner.slot == shown.slot
                    && owner.generation < shown.generation
                {
                    rejoin(&gate, &volume, &actor, Ownership::new(shown, epoch));
                }
            }
        })?;
    Ok(())
}

fn rejoin(gate: &VolumeGate, volume: &VolumeClient, actor: &ActorHandle, ownership: Ownership) {
    match volume.reopen(ownership) {
        Ok(Reopened::Kept) => {
            let adopted = request(actor, |reply| OwnershipRequest::Adopt(ownership, reply));
            if let Ok(true) = adopted {
                gate.set_owner(ownership.owner);
                tracing::info!(%ownership, "the ownership was kept: writes go on");
            }
        }
        Ok(Reopened::Lost(refusal)) => {
            tracing::error!(%refusal, "another owner has the VM: this process exits now");
            exit_now(actor, &refusal);
        }
        Err(error) => tracing::info!(
            error = format_args!("{error:#}"),
            "the home volume cannot be opened again yet"
        ),
    }
}

/// Exits unless the actor has given the ownership up itself meanwhile.
#[expect(
    clippy::disallowed_methods,
    reason = "nothing may be drained or released: another node runs this guest"
)]
fn exit_now(actor: &ActorHandle, refusal: &str) {
    let what = format!("this process does not own the VM any more: {refusal}");
    let lost = request(actor, |reply| OwnershipRequest::Lost(what, reply));
    if let Ok(true) = lost {
        std::process::exit(EXIT_OWNERSHIP_LOST);
    }
}

fn request<T>(
    actor: &ActorHandle,
    request: impl FnOnce(Reply<T>) -> OwnershipRequest,
) -> Result<T, ActorGone> {
    actor.request(|reply| Event::Ownership(request(reply)))
}
