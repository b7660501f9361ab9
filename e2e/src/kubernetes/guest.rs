//! Guests of the scenarios: their boot sources, and sessions with them.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bascule_lab::Lab;
use bascule_lab::guest::{AGENTLET_PORT, GuestSession};
use bascule_lab::web::Source;
use bascule_probe_wire::{TCP_PORT, UDP_PORT};

use super::NAMESPACE;
use crate::{Flow, Session, probe};

/// What a tier's virtual machines run.
#[derive(Clone, Debug)]
#[expect(missing_docs, reason = "the field names say all")]
pub enum Guest {
    Probe {
        kernel: Source,
    },
    /// An unmodified Debian kernel with an initramfs.
    Debian {
        kernel: Source,
        initrd: Source,
    },
}

/// A TCP session with a guest, which numbers its responses.
#[derive(Debug)]
pub enum Talk {
    /// With the probe guest.
    Probe(Session),
    /// With the Debian guest.
    Debian(GuestSession),
}

impl Guest {
    pub(super) fn probe(lab: &Lab) -> Result<Self> {
        Ok(Self::Probe {
            kernel: lab.publish("probe", probe::build()?)?,
        })
    }

    pub(super) fn debian(lab: &Lab) -> Result<Self> {
        let sources = lab.publish_guest()?;
        Ok(Self::Debian {
            kernel: sources.kernel,
            initrd: sources.initrd,
        })
    }

    pub(super) fn document(&self, name: &str, address: Ipv4Addr, volume: &str) -> String {
        let source = |source: &Source| {
            format!(
                "{{http: {{url: \"{}\", sha256: {}}}}}",
                source.url, source.sha256
            )
        };
        let (boot, inside, memory, disk, downtime) = match self {
            Self::Probe { kernel } => (
                format!(
                    "    kernel: {}\n    cmdline: ip={address}/24 tick_ms=10 {}",
                    source(kernel),
                    probe::POWER_BUTTON
                ),
                "  guestAgent: true\n".to_owned(),
                "128Mi",
                "64Mi",
                // Many times the duration on an idle machine: slowness is not a failure.
                "2s",
            ),
            Self::Debian { kernel, initrd } => (
                format!(
                    "    kernel: {}\n    initrd: {}\n    cmdline: console=ttyS0 \
                     guest.ip={address}/24 guest.tick_ms=100",
                    source(kernel),
                    source(initrd)
                ),
                format!("  cloudInit: {{userData: \"{}\"}}\n", user_data(name)),
                "256Mi",
                "128Mi",
                // An emulated node encrypts some 4 MB/s (measured): the default of 300 ms is out of
                // reach there.
                "3s",
            ),
        };
        format!(
            "apiVersion: bascule.dev/v1alpha1
kind: VirtualMachine
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  volume: {volume}
  memory: {memory}
  boot:
{boot}
{inside}  disks:
  - {{name: data, size: {disk}, deletionPolicy: Delete}}
  interfaces:
  - {{name: lan, bridge: lan}}
  availability: {{migration: {{downtime: {downtime}}}}}
"
        )
    }

    pub(super) fn talk(&self, lab: &Lab, guest: Ipv4Addr) -> Result<Talk> {
        match self {
            Self::Probe { .. } => {
                let address = SocketAddr::from((guest, TCP_PORT));
                let mut session = Session::over(lab.connect(address, CONNECT_TIME)?)?;
                session.count()?;
                Ok(Talk::Probe(session))
            }
            Self::Debian { .. } => {
                let address = SocketAddr::from((guest, AGENTLET_PORT));
                let stream = lab.connect(address, CONNECT_TIME)?;
                let mut session = GuestSession::new(stream, ANSWER_TIME)?;
                session.ping()?;
                Ok(Talk::Debian(session))
            }
        }
    }

    pub(super) fn flow(&self, lab: &Lab, guest: Ipv4Addr) -> Result<Flow> {
        let (port, period) = match self {
            Self::Probe { .. } => (UDP_PORT, PROBE_PERIOD),
            Self::Debian { .. } => (AGENTLET_PORT, DEBIAN_PERIOD),
        };
        let socket = lab.hub().enter(move || -> Result<UdpSocket> {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).context("make a socket")?;
            socket
                .connect((guest, port))
                .context("connect the socket")?;
            Ok(socket)
        })??;
        Flow::over(socket, period)
    }
}

impl Talk {
    /// One round trip within the session. The guest numbers its responses, so that a restart and a
    /// lost or repeated request are detected.
    ///
    /// # Errors
    /// When the session breaks or the number is wrong.
    pub fn ping(&mut self) -> Result<()> {
        match self {
            Self::Probe(session) => session.count(),
            Self::Debian(session) => session.ping(),
        }
    }

    /// The guest of this virtual machine finds its own user data on cloud-init's disk. The probe guest, which has no
    /// such disk, is not asked.
    ///
    /// # Errors
    /// When it finds another or none.
    pub fn ensure_user_data(&mut self, name: &str) -> Result<()> {
        if let Self::Debian(session) = self {
            let found = session.user_data()?;
            ensure!(found == user_data(name), "the guest found {found:?}");
        }
        Ok(())
    }

    /// Has the guest verify its disks and memory; returns the number of its last record.
    ///
    /// # Errors
    /// When it found a fault.
    pub fn check(&mut self) -> Result<u64> {
        match self {
            Self::Probe(session) => Ok(session.clean_report()?.disk_ack),
            Self::Debian(session) => session.check(),
        }
    }

    /// Has the guest write one more record to its disk, flushed, and returns the number of the last
    /// acknowledged record. The probe guest writes continuously by itself.
    ///
    /// # Errors
    /// When the guest does not answer, or cannot write.
    pub fn append(&mut self) -> Result<u64> {
        match self {
            Self::Probe(session) => Ok(session.report()?.disk_ack),
            Self::Debian(session) => session.append(),
        }
    }
}

/// Of the tier with a Debian guest: differs between virtual machines.
fn user_data(name: &str) -> String {
    format!("#cloud-config of {name}")
}

const PROBE_PERIOD: Duration = Duration::from_millis(1);
/// A kernel under emulation is overloaded by 1,000 packets a second: measured during a drain, 70 % of
/// them were lost and the live migration did not converge.
const DEBIAN_PERIOD: Duration = Duration::from_millis(50);
const CONNECT_TIME: Duration = Duration::from_secs(2);
/// Longer than any blackout that a session should survive.
const ANSWER_TIME: Duration = Duration::from_secs(30);
