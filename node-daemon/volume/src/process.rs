//! One process on one volume: takes over what an earlier process of this boot left, and names the threads
//! that it then consists of.

use std::sync::Arc;

use anyhow::{Context as _, Result, bail};
use bascule_volume_format::{OpenError, Report, Severity, Superblock, check_volume};
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
        verify_failed_volume(|| check_volume(&mut opened.device.handle()))?;
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
///
/// Another node may coordinate the volume meanwhile, and write between two reads of one check: what does not go
/// together then is no damage. Damage stays, so an error counts only if every one of [`CHECKS`] checks finds one. That no
/// error is found wrongly is of no consequence for what others write: their records are checked whenever they are read,
/// and this node's own failed write is either whole or absent.
fn verify_failed_volume(mut check: impl FnMut() -> Result<Report, OpenError>) -> Result<()> {
    let mut findings = Vec::new();
    for _ in 0..CHECKS {
        let report = check().context("verify the failed volume")?;
        if report.worst() != Some(Severity::Error) {
            return Ok(());
        }
        findings = report.findings;
    }
    bail!("the volume failed on this node and is damaged: {findings:?}")
}

/// Each takes longer than a coordinator's write; its next one is seldom as close. A guess.
const CHECKS: u32 = 3;

#[cfg(test)]
mod tests {
    use bascule_volume_format::Finding;

    use super::*;

    fn report(severity: Option<Severity>) -> Report {
        let finding = |severity| Finding {
            severity,
            text: "a row without its VM".to_owned(),
        };
        Report {
            findings: severity.map(finding).into_iter().collect(),
            ..Report::default()
        }
    }

    /// Regression: one check that a coordinator of another node had written into kept the process from starting.
    #[test]
    fn what_a_coordinator_writes_meanwhile_is_no_damage_and_damage_stays() {
        let errors = |count: u32| {
            let mut checks = 0;
            move || {
                checks += 1;
                let worst = if checks <= count {
                    Severity::Error
                } else {
                    Severity::Warning
                };
                Ok(report(Some(worst)))
            }
        };
        verify_failed_volume(|| Ok(report(None))).unwrap();
        verify_failed_volume(errors(2)).unwrap();
        let error = verify_failed_volume(errors(u32::MAX)).unwrap_err();
        assert!(
            error.to_string().contains("a row without its VM"),
            "{error}"
        );
        verify_failed_volume(|| Err(OpenError::NotAVolume)).unwrap_err();
    }
}
