//! Fault injection in an attempt. Without the feature `fault-injection`, and outside of this crate's own
//! tests, no fault is ever injected.

use std::io;

/// A step at which a fault may be injected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultPoint {
    /// Destination: the source has said hello.
    DestinationHello,
    /// Destination: a piece of its memory is about to be made resident.
    DestinationResident,
    /// Destination: the first memory has come.
    DestinationMemory,
    /// Destination: a round has ended, before it is acknowledged.
    DestinationRound,
    /// Destination: the state has come, before it is restored.
    DestinationState,
    /// Destination: restored, before `Ready` is sent.
    DestinationRestored,
    /// Destination: `Ready` was sent.
    DestinationReady,
    /// Source: the guest is stopped.
    SourceStopped,
    /// Source: `Ready` was received, before the transfer is requested.
    SourceReady,
    /// Source: the ownership was transferred, before `Committed` is sent.
    SourceCommitted,
}

impl FaultPoint {
    /// All points.
    pub const ALL: [Self; 10] = [
        Self::DestinationHello,
        Self::DestinationResident,
        Self::DestinationMemory,
        Self::DestinationRound,
        Self::DestinationState,
        Self::DestinationRestored,
        Self::DestinationReady,
        Self::SourceStopped,
        Self::SourceReady,
        Self::SourceCommitted,
    ];

    /// Its name in `BASCULE_FAULT`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::DestinationHello => "destination-hello",
            Self::DestinationResident => "destination-resident",
            Self::DestinationMemory => "destination-memory",
            Self::DestinationRound => "destination-round",
            Self::DestinationState => "destination-state",
            Self::DestinationRestored => "destination-restored",
            Self::DestinationReady => "destination-ready",
            Self::SourceStopped => "source-stopped",
            Self::SourceReady => "source-ready",
            Self::SourceCommitted => "source-committed",
        }
    }
}

/// What happens at a point.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FaultAction {
    /// The process is killed, as by the kernel.
    Kill,
    /// The step fails.
    Fail,
}

/// At most one fault.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Faults(Option<(FaultPoint, FaultAction)>);

impl Faults {
    /// No fault.
    pub const NONE: Self = Self(None);

    /// This one.
    #[cfg(any(test, feature = "fault-injection"))]
    #[must_use]
    pub const fn at(point: FaultPoint, action: FaultAction) -> Self {
        Self(Some((point, action)))
    }

    /// The one that the environment variable `BASCULE_FAULT` names, as `<point>=kill|fail`.
    #[cfg(feature = "fault-injection")]
    #[must_use]
    pub fn from_environment() -> Self {
        let text = std::env::var("BASCULE_FAULT").unwrap_or_default();
        let Some((name, action)) = text.split_once('=') else {
            return Self::NONE;
        };
        let point = FaultPoint::ALL
            .into_iter()
            .find(|point| point.name() == name);
        let action = match action {
            "kill" => FaultAction::Kill,
            _ => FaultAction::Fail,
        };
        Self(point.map(|point| (point, action)))
    }

    /// None: this build injects no faults.
    #[cfg(not(feature = "fault-injection"))]
    #[must_use]
    pub const fn from_environment() -> Self {
        Self::NONE
    }

    /// Passes a point.
    ///
    /// # Errors
    /// When the step is to fail.
    pub(super) fn pass(self, point: FaultPoint) -> io::Result<()> {
        match self.0 {
            Some((at, FaultAction::Fail)) if at == point => {
                Err(io::Error::other(format!("injected at {}", point.name())))
            }
            Some((at, FaultAction::Kill)) if at == point => {
                let me = rustix::process::getpid();
                rustix::process::kill_process(me, rustix::process::Signal::KILL)?;
                Ok(())
            }
            _ => Ok(()),
        }
    }
}
