//! The host shuts down (SIGTERM or SIGINT): the guest's agent or its power button shuts it down, and a guest that has not
//! switched itself off when the VM's shutdown timeout has passed is stopped. In both cases its devices are
//! drained and its ownership is released, and the process exits. [`super::host_shutdown_progress`]
//! decides what is done when.

use bascule_ipc::vm::StopReason;

use super::event::{Event, HostShutdown};
use super::host_shutdown_progress::{Guest, Progress, Step};
use super::phase::Phase;
use super::vm_actor::VmActor;

impl VmActor {
    pub(super) fn host_shuts_down(&mut self, why: HostShutdown) {
        match (why, self.host_shutdown) {
            (HostShutdown::Requested, Progress::None) => {
                let limit = self.config.shutdown_timeout();
                tracing::info!(?limit, phase = self.phase.name(), "the host shuts down");
                self.host_shutdown = Progress::Requested;
                self.exit = true;
                self.start_timer();
            }
            (HostShutdown::Requested, _) => tracing::info!("the guest is shutting down already"),
            (HostShutdown::TimeIsUp, Progress::Stopping) => {}
            (HostShutdown::TimeIsUp, _) => self.host_shutdown = Progress::TimeIsUp,
        }
    }

    /// Without a thread for the timer the guest has no time.
    fn start_timer(&mut self) {
        let (actor, limit) = (self.handle(), self.config.shutdown_timeout());
        let spawned = std::thread::Builder::new()
            .name("shutdown-timer".to_owned())
            .spawn(move || {
                std::thread::sleep(limit);
                let told =
                    actor.request(|reply| Event::HostShutdown(HostShutdown::TimeIsUp, reply));
                if let Err(error) = told {
                    tracing::debug!(%error, "the shutdown timer is of no use any more");
                }
            });
        if let Err(error) = spawned {
            tracing::error!(%error, "cannot start the shutdown timer: the guest is stopped now");
            self.host_shutdown = Progress::TimeIsUp;
        }
    }

    /// The next step of the shutdown, if the last event made one possible.
    pub(super) fn continue_host_shutdown(&mut self) {
        match self.host_shutdown.next(self.shutdown_guest()) {
            Step::Wait => {}
            Step::Resume => match self.resume() {
                Ok(()) => self.continue_host_shutdown(),
                Err(error) => {
                    tracing::error!(error = format_args!("{error:#}"), "cannot resume the guest");
                    self.host_shutdown = Progress::Stopping;
                }
            },
            Step::PressButton => {
                self.host_shutdown = Progress::Pressed;
                if let Err(error) = self.shut_down_guest() {
                    let error = format_args!("{error:#}");
                    tracing::error!(error, "cannot press the power button: the guest is stopped");
                    self.stop_for_host();
                }
            }
            Step::Stop => {
                tracing::warn!(phase = self.phase.name(), "stopping the guest for the host");
                self.stop_for_host();
            }
        }
    }

    fn stop_for_host(&mut self) {
        self.host_shutdown = Progress::Stopping;
        drop(self.stop(StopReason::Requested));
    }

    fn shutdown_guest(&self) -> Guest {
        let moves = self.no_migration().is_err();
        match &self.phase {
            Phase::Running(_) if !moves => Guest::Running,
            Phase::Paused(_) if !moves => Guest::Paused,
            Phase::Running(_) | Phase::Paused(_) | Phase::Pausing(_) | Phase::Resetting(_) => {
                Guest::Busy
            }
            // It becomes a running guest, or fails.
            Phase::Incoming(_) if self.ownership.is_some() => Guest::Busy,
            Phase::Incoming(_) | Phase::Starting | Phase::ResetDelayed(_) => Guest::NotHere,
            Phase::InDoubt(_) | Phase::Ending(_) | Phase::Departed | Phase::Stopped(_) => {
                Guest::Gone
            }
        }
    }
}
