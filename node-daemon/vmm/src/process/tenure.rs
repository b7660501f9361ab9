//! Keeping the right to write while the node's lease comes and goes.
//!
//! A gate that closes because the lease lapsed opens when it is renewed; nothing is to be done. When
//! the node's slot re-joined in a new generation, the VM's row may have been kept in the same epoch:
//! the volume is asked, and writes go on under the new generation. If the row is somebody else's by
//! now, another node runs this guest: this process must end before it does anything more.

use std::sync::Arc;
use std::time::Duration;

use bascule_devices::disk::VolumeGate;
use bascule_types::{Epoch, Owner as Tenant};
use bascule_volume_gate::GateClosedReason;

use super::owner::OwnerHandle;
use super::volume::{Reopened, VolumeClient};

/// How often the gate page is looked at: it is shared memory and wakes nobody. A guest's writes
/// have waited for a whole lease by then, so that this adds little.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Exit status of a process whose VM belongs to somebody else.
pub(super) const EXIT_NOT_OURS: i32 = 70;

/// Starts the watching thread, which lives as long as the process.
pub(super) fn watch(
    gate: Arc<VolumeGate>,
    volume: Arc<VolumeClient>,
    owner: OwnerHandle,
) -> std::io::Result<()> {
    std::thread::Builder::new()
        .name("tenure".to_owned())
        .spawn(move || {
            loop {
                std::thread::sleep(LOOK_EVERY);
                let Some(GateClosedReason::OtherOwner { shown: Some(shown) }) =
                    gate.closed_reason()
                else {
                    continue;
                };
                let Ok(tenure) = owner.call(|owner| owner.tenure) else {
                    return;
                };
                if let Some((tenant, epoch)) = tenure
                    && tenant.slot == shown.slot
                    && tenant.generation < shown.generation
                {
                    rejoin(&gate, &volume, &owner, (shown, epoch));
                }
            }
        })?;
    Ok(())
}

fn rejoin(
    gate: &VolumeGate,
    volume: &VolumeClient,
    owner: &OwnerHandle,
    (tenant, epoch): (Tenant, Epoch),
) {
    match volume.reopen(tenant, epoch) {
        Ok(Reopened::Kept) => {
            let adopted = owner.call(move |owner| {
                let still_ours = owner.tenure.is_some_and(|(_, mine)| mine == epoch);
                if still_ours {
                    owner.begin_tenure((tenant, epoch));
                }
                still_ours
            });
            if let Ok(true) = adopted {
                gate.set_owner(tenant);
                tracing::info!(%tenant, %epoch, "the row was kept: writing goes on");
            }
        }
        Ok(Reopened::Lost(refusal)) => {
            tracing::error!(%refusal, "the VM belongs to somebody else: this process ends now");
            end_now(owner, &refusal);
        }
        Err(error) => tracing::info!(error = format_args!("{error:#}"), "cannot ask for the row"),
    }
}

/// Ends the process unless the owner has given the row up itself meanwhile.
#[expect(
    clippy::disallowed_methods,
    reason = "nothing may be drained or released: another node runs this guest"
)]
fn end_now(owner: &OwnerHandle, refusal: &str) {
    let what = format!("the VM's row is not this process's any more: {refusal}");
    let ours = owner.call(move |owner| {
        if owner.tenure.is_some() {
            owner.record_failure(what);
        }
        owner.tenure.is_some()
    });
    if let Ok(true) = ours {
        std::process::exit(EXIT_NOT_OURS);
    }
}
