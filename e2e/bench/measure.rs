//! Figures of one live migration of the guest.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use bascule_e2e::{Console, Flow, GUEST, Network, Session};

/// Load of the guest during the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Load {
    /// Only polling and console ticks.
    Idle,
    /// 256 MiB rewritten continuously, as fast as possible.
    Rewriting,
}

/// Figures of one live migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    /// The longest gap between two console ticks of 1 ms.
    pub(crate) tick_gap: Duration,
    /// The longest gap between two packets of the 1 kHz flow.
    pub(crate) packet_gap: Duration,
    /// Packets of the flow that did not come back.
    pub(crate) packets_lost: u64,
    /// Downtime as the migrating program reports it.
    pub(crate) downtime: Duration,
    /// From the request to the end.
    pub(crate) total: Duration,
    /// Bytes sent.
    pub(crate) bytes: u64,
    /// CPU time of both processes, without guest code.
    pub(crate) cpu: Duration,
    /// Resident memory of the destination beyond guest RAM, where guest RAM is accounted separately.
    pub(crate) resident_kib: Option<u64>,
}

/// Figures that the migrating program reports.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Said {
    pub(crate) downtime: Duration,
    pub(crate) bytes: u64,
}

/// The watchers of one guest.
pub(crate) struct Watch {
    console: Console,
    session: Session,
    flow: Flow,
    started: Instant,
}

impl Load {
    /// The guest's command line.
    pub(crate) fn cmdline(self) -> String {
        let work = match self {
            Self::Idle => "",
            Self::Rewriting => "dirty=256M",
        };
        format!("ip={GUEST}/24 tick_ms=1 {work}")
    }
}

impl fmt::Display for Load {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Idle => "idle",
            Self::Rewriting => "256 MiB rewritten",
        })
    }
}

impl Watch {
    /// Waits until the guest runs under its load, and starts watching.
    pub(crate) fn start(network: &Network, console: Console, load: Load) -> Result<Self> {
        let mut session = Session::open(network, GUEST, BOOT_TIME)?;
        if load == Load::Rewriting {
            bascule_e2e::wait_for("two sweeps over the memory", BOOT_TIME, || {
                Ok((session.report()?.mem_pages > 2 * 65_536).then_some(()))
            })?;
        }
        let flow = Flow::start(network, GUEST)?;
        console.wait_ticks(300, BOOT_TIME)?;
        Ok(Self {
            console,
            session,
            flow,
            started: Instant::now(),
        })
    }

    /// Watches a little longer, checks that the guest reports no fault, and returns the figures.
    /// `total` is the duration of the migration, `cpu` its CPU time.
    pub(crate) fn finish(mut self, total: Duration, said: Said, cpu: Duration) -> Result<Outcome> {
        self.console.wait_ticks(300, BOOT_TIME)?;
        let tick_gap = self.console.gap_max(self.started);
        let flow = self.flow.finish()?;
        self.session.count().context("the session after the move")?;
        self.session.clean_report()?;
        self.console.check()?;
        Ok(Outcome {
            tick_gap,
            packet_gap: flow.gap_max,
            packets_lost: flow.lost,
            downtime: said.downtime,
            total,
            bytes: said.bytes,
            cpu,
            resident_kib: None,
        })
    }
}

impl Outcome {
    /// The median of each figure by itself.
    pub(crate) fn median(outcomes: &[Self]) -> Result<Self> {
        fn middle<T: Ord + Copy>(outcomes: &[Outcome], figure: fn(&Outcome) -> T) -> Result<T> {
            let mut figures: Vec<T> = outcomes.iter().map(figure).collect();
            figures.sort_unstable();
            figures.get(figures.len() / 2).copied().context("no run")
        }
        Ok(Self {
            tick_gap: middle(outcomes, |outcome| outcome.tick_gap)?,
            packet_gap: middle(outcomes, |outcome| outcome.packet_gap)?,
            packets_lost: middle(outcomes, |outcome| outcome.packets_lost)?,
            downtime: middle(outcomes, |outcome| outcome.downtime)?,
            total: middle(outcomes, |outcome| outcome.total)?,
            bytes: middle(outcomes, |outcome| outcome.bytes)?,
            cpu: middle(outcomes, |outcome| outcome.cpu)?,
            resident_kib: middle(outcomes, |outcome| outcome.resident_kib)?,
        })
    }
}

const BOOT_TIME: Duration = Duration::from_secs(60);
