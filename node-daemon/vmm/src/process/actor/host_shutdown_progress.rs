//! What a shutdown of the host asks of the guest next.
//!
//! ```text
//!                     button pressed            timeout
//!  None ─► Requested ────────────────► Pressed ─────────► TimeIsUp ─► Stopping
//!              ├── timeout ─────────────────────────────────▲            ▲
//!              └── the guest never ran here ─────────────────────────────┘
//! ```
//! A migration that is under way goes on meanwhile, because its guest loses nothing by it. A guest that
//! is paused on request is resumed, so that it can react.

use bascule_ipc::vm::StopReason;

/// How far the shutdown of the host is for this guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Progress {
    /// The host does not shut down.
    #[default]
    None,
    /// The guest is to be told.
    Requested,
    /// The power button was pressed.
    Pressed,
    /// The guest is to be stopped.
    TimeIsUp,
    /// The guest is being stopped.
    Stopping,
}

/// What is to be done next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    Wait,
    Resume,
    PressButton,
    Stop,
}

/// What the phase means for a shutdown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Guest {
    /// It runs, or is about to be paused.
    Running,
    /// It is paused and nothing else happens to it.
    Paused,
    /// A migration handles it, or it is in a phase that ends by itself.
    Busy,
    /// It has never run here, and another process still has it; or it waits to be reset.
    NotHere,
    /// It is off, on another node, or its fate is the volume's to tell.
    Gone,
}

impl Progress {
    /// The reason to report for a guest that ended by itself for `reason`. One that followed the power
    /// button did so on request: it must run again elsewhere, or here after the restart.
    pub(super) fn reason(self, reason: StopReason) -> StopReason {
        match reason {
            StopReason::GuestShutdown | StopReason::GuestReset if self != Self::None => {
                StopReason::Requested
            }
            other => other,
        }
    }

    /// The next step for a guest in this state.
    pub(super) fn next(self, guest: Guest) -> Step {
        match (self, guest) {
            (Self::None | Self::Stopping, _) | (_, Guest::Gone) => Step::Wait,
            (Self::TimeIsUp, _) | (_, Guest::NotHere) => Step::Stop,
            (Self::Pressed, _) | (Self::Requested, Guest::Busy) => Step::Wait,
            (Self::Requested, Guest::Paused) => Step::Resume,
            (Self::Requested, Guest::Running) => Step::PressButton,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GUESTS: [Guest; 5] = [
        Guest::Running,
        Guest::Paused,
        Guest::Busy,
        Guest::NotHere,
        Guest::Gone,
    ];

    #[test]
    fn a_guest_is_told_once_and_stopped_when_the_time_is_up() {
        let expected = [
            (Progress::None, [Step::Wait; 5]),
            (
                Progress::Requested,
                [
                    Step::PressButton,
                    Step::Resume,
                    Step::Wait,
                    Step::Stop,
                    Step::Wait,
                ],
            ),
            (
                Progress::Pressed,
                [Step::Wait, Step::Wait, Step::Wait, Step::Stop, Step::Wait],
            ),
            (
                Progress::TimeIsUp,
                [Step::Stop, Step::Stop, Step::Stop, Step::Stop, Step::Wait],
            ),
            (Progress::Stopping, [Step::Wait; 5]),
        ];
        for (progress, steps) in expected {
            assert_eq!(
                GUESTS.map(|guest| progress.next(guest)),
                steps,
                "{progress:?}"
            );
        }
    }

    /// With run policy OnFailure a VM whose guest has shut itself down is complete and never runs again.
    #[test]
    fn a_guest_that_followed_the_power_button_has_stopped_on_request() {
        for ended in [StopReason::GuestShutdown, StopReason::GuestReset] {
            assert_eq!(Progress::None.reason(ended.clone()), ended);
            assert_eq!(Progress::Pressed.reason(ended), StopReason::Requested);
        }
        let what = "triple fault".to_owned();
        let fault = StopReason::GuestFault { what };
        assert_eq!(Progress::Pressed.reason(fault.clone()), fault);
    }
}
