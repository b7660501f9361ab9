//! One process on one volume: takes over what an earlier process of this boot left, and names the threads
//! that it then consists of.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bascule_volume_format::{Severity, Superblock, check_volume};
use bascule_volume_gate::{GateTakenOver, GateView, GateWriter};
use bascule_volume_protocol::Held;

use crate::block_device::SharedDevice;
use crate::coordinator::election;
use crate::host::Host;
use crate::volume_context::{ProcessConfig, VolumeContext, VolumeContextParts};
use crate::write_ledger::WriteLedger;
use crate::writer_table::WriterTable;
use crate::{heartbeat_renewal, peer_watch, slot_registration, writers};

/// An open volume whose gate page this process has locked.
#[derive(Debug)]
#[expect(missing_docs, reason = "as the fields of VolumeContext")]
pub struct Opened {
    pub device: Box<dyn SharedDevice>,
    pub superblock: Superblock,
    pub gate: GateWriter,
    /// What an earlier process left in the gate page.
    pub found: GateTakenOver,
    pub ledger: WriteLedger,
}

/// A process before its threads have started.
#[derive(Debug)]
pub struct Assembled {
    /// What the threads share.
    pub context: Arc<VolumeContext>,
    held: Option<Held>,
    sequence_sent: u64,
    ledger: WriteLedger,
}

/// The name of a thread, and what it does until the process stops.
pub type Thread = (&'static str, Box<dyn FnOnce(&VolumeContext) + Send>);

/// Builds the context with the lease, the sequence number and the writers that an earlier process of this
/// boot left.
///
/// # Errors
/// Those of the run directory, and when a volume that failed on this node is damaged.
pub fn assemble(config: ProcessConfig, host: Arc<dyn Host>, opened: Opened) -> Result<Assembled> {
    let view = match opened.found {
        GateTakenOver::Existing(view) => Some(view),
        GateTakenOver::Fresh => {
            // A fresh gate page: no process of this boot has been a writer yet.
            WriterTable::remove_all(&config.run_dir).context("clear the table of writers")?;
            None
        }
    };
    if view.is_some_and(|view| view.failed) {
        verify_failed_volume(opened.device.as_ref())?;
        opened.gate.clear_failed();
    }
    let now = host.now();
    let held = view.and_then(|view: GateView| {
        let owner = view.owner.filter(|_| view.lease_is_valid(now))?;
        let expiry = view.expiry;
        Some(Held { owner, expiry })
    });
    let writers =
        WriterTable::load(&config.run_dir, config.rules).context("read the table of writers")?;
    let context = VolumeContext::new(VolumeContextParts {
        config,
        superblock: opened.superblock,
        device: opened.device,
        host,
        gate: opened.gate,
        writers,
        joined: held.map(|held| held.owner),
    });
    Ok(Assembled {
        context: Arc::new(context),
        held,
        sequence_sent: view.map_or(0, |view| view.sequence_sent),
        ledger: opened.ledger,
    })
}

impl Assembled {
    /// The lease that an earlier process left, if it is valid.
    #[must_use]
    pub fn held(&self) -> Option<Held> {
        self.held
    }

    /// The threads of the process. [`crate::watchdog_client::refresh`] comes before them: the heartbeat
    /// publishes the watchdog's kind.
    #[must_use]
    pub fn threads(self) -> Vec<Thread> {
        let (held, sequence_sent, ledger) = (self.held, self.sequence_sent, self.ledger);
        vec![
            (
                "heartbeat",
                Box::new(move |context| heartbeat_renewal::run(context, held, sequence_sent)),
            ),
            ("peer-watch", Box::new(peer_watch::run)),
            ("registration", Box::new(slot_registration::run)),
            (
                "coordinator",
                Box::new(move |context| election::run(context, ledger)),
            ),
            ("writers", Box::new(writers::run)),
        ]
    }
}

/// An earlier process marked the volume as failed on this node: it is served again only if the
/// offline check finds no error.
fn verify_failed_volume(device: &dyn SharedDevice) -> Result<()> {
    let report = check_volume(&mut device.handle()).context("verify the failed volume")?;
    match report.worst() {
        Some(Severity::Error) => bail!(
            "the volume failed on this node and is damaged: {:?}",
            report.findings
        ),
        _ => Ok(()),
    }
}
