//! The live source: carries out what [`bascule_migrate::source`] and [`bascule_migrate::precopy`]
//! decide.
//!
//! They decide on which side the guest may run. This module ensures that before the commit point a
//! failure resumes the guest at once: every wait with a stopped guest ends at one deadline, and the
//! resume comes before any clean-up.

use std::sync::Arc;
use std::time::{Duration, Instant};

use bascule_ipc::vm::MigrationPhase;
use bascule_migrate::Frame;
use bascule_migrate::commit::{Reply, TransferRequest};
use bascule_migrate::precopy::{
    Controller, Decision, Fallback, FixedCost, Limits, Pacer, Rate, Round,
};
use bascule_migrate::source::{Action, Attempt, Event, Phase, Source, event_of, retry_delay};
use bascule_migrate::wire::{
    Abort, AbortReason, Config, Features, Hello, Progress, RoundEnd, STATE_BYTES_MAX,
    STATE_PIECE_BYTES_MAX, StateEnd,
};
use bascule_types::{AttemptId, Bytes, Epoch, Ownership, error_chain};

use super::apply::layout_of;
use super::channel::{Channel, lost, lost_frame};
use super::control::{MigrationControl, millis};
use super::copy::{Copier, CopyError};
use super::fault::FaultPoint;
use super::guest::Guest;
use super::ownership_client::OwnershipAuthority;
use super::request::Outgoing;
use crate::dirty::{DirtyBitmap, DirtyTracker};
use crate::machine::MachineHandle;
use crate::memory::PAGE_SIZE;
use crate::state;

mod channel_sink;
mod fixed_cost;
mod outcome;

use channel_sink::ChannelSink;

/// The outcome of a live migration at the source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OutgoingEnd {
    /// The guest was resumed here, unless it was stopped meanwhile.
    Kept {
        /// Why it was not moved.
        failure: Abort,
        /// The ownership in which it runs, if the attempt began a new one.
        ownership: Option<Ownership>,
    },
    /// The destination owns the VM; here the guest never runs again.
    Departed {
        /// The destination's epoch.
        epoch: Epoch,
    },
    /// Another node owns the VM, or it was deleted; here the guest never runs again.
    Lost,
}

struct Driver<'a> {
    job: &'a Outgoing,
    control: &'a MigrationControl,
    authority: &'a mut dyn OwnershipAuthority,
    guest: &'a mut dyn Guest,
    machine: MachineHandle,
    channel: Option<Channel>,
    copier: Copier,
    started: Instant,
    controller: Controller,
    pacer: Pacer,
    fixed: FixedCost,
    /// What is dirty and not sent yet.
    pending: DirtyBitmap,
    sent: Bytes,
    paced: Duration,
    round_took: Duration,
    /// What had been sent when the round began.
    sent_before: Bytes,
    /// When the guest was stopped, and when it must run again if nothing was decided.
    stopped: Option<(Instant, Instant)>,
    /// What the blackout consisted of.
    steps: Vec<(&'static str, Duration)>,
    attempts: u32,
}

/// Longest wait for a frame from the peer while the guest runs.
const PEER_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the guest is stopped at most beyond the downtime that was aimed at, before the commit
/// point. A prediction that is wrong by more than this is a failure.
const STOPPED_GRACE: Duration = Duration::from_millis(700);
/// Rounds of pre-copy at most.
const ROUNDS_MAX: u32 = 60;

/// Moves a running machine to another process. Returns when the outcome is known, which after the
/// commit request means: when the volume has answered.
pub fn migrate_live(
    guest: &mut dyn Guest,
    machine: MachineHandle,
    job: &Outgoing,
    authority: &mut dyn OwnershipAuthority,
    control: &MigrationControl,
) -> OutgoingEnd {
    let limits = Limits {
        downtime_max: Duration::from_millis(job.limits.downtime_ms_max),
        time_max: Duration::from_millis(job.limits.total_ms_max),
        rounds_max: ROUNDS_MAX,
        rate_max: job.limits.bytes_per_second_max.map(Rate),
        // The operator decides about a quick migration: it is an attempt of its own.
        fallback: Fallback::Fail,
    };
    let now = Instant::now();
    Driver {
        pending: DirtyBitmap::full(machine.memory()),
        copier: Copier::new(Arc::clone(machine.memory())),
        machine,
        guest,
        channel: None,
        started: now,
        controller: Controller::new(limits),
        pacer: Pacer::new(limits.rate_max),
        fixed: FixedCost::default(),
        sent: Bytes(0),
        paced: Duration::ZERO,
        round_took: Duration::ZERO,
        sent_before: Bytes(0),
        stopped: None,
        steps: Vec::new(),
        attempts: 0,
        job,
        control,
        authority,
    }
    .run()
}

impl Driver<'_> {
    fn run(mut self) -> OutgoingEnd {
        let (mut source, hello) = Source::begin(Attempt {
            vm: self.job.vm,
            attempt: self.job.attempt,
            retraction: AttemptId::random(),
            source: self.job.from,
            epoch: self.job.epoch,
            volume: self.authority.volume(),
            destination: self.job.to,
        });
        let mut event = self.greet(&hello);
        loop {
            let taken = event.unwrap_or_else(Event::Failed);
            let (next, action) = source.next(taken);
            source = next;
            self.show(source.phase());
            event = match action {
                Action::Depart(committed) => return self.depart(committed),
                Action::KeepRunning(cause) => return self.resume_source(cause, None),
                Action::Resume {
                    cause,
                    owner,
                    epoch,
                } => return self.resume_source(cause, Some(Ownership::new(owner, epoch))),
                Action::Terminate => return self.terminate(),
                Action::RequestTransfer(request) => Ok(self.request_transfer(&request)),
                before_commit => self.act(before_commit),
            };
        }
    }

    /// Actions before the commit point: each failure ends in `resume_source`.
    fn act(&mut self, action: Action) -> Result<Event, Abort> {
        match action {
            Action::Describe(features) => self.describe(features),
            Action::CopyRound(round) => self.copy_round(round),
            Action::AwaitMemory => self.await_memory(),
            Action::Decide(round) => self.decide(round),
            Action::StopGuest => self.stop(),
            Action::SendRemainder(round) => self.send_remainder(round),
            Action::AwaitReady => self.await_ready(),
            other => Err(internal(format!("{other:?} is not for the source to do"))),
        }
    }

    fn greet(&mut self, hello: &Hello) -> Result<Event, Abort> {
        let channel = Channel::connect(self.job.peer, &self.job.tls_dir)
            .map_err(|error| internal(error_chain(&error)))?;
        self.control.set_stream(channel.socket().ok());
        if self.control.is_cancelled() {
            return Err(cancelled());
        }
        channel
            .set_timeout(PEER_TIMEOUT)
            .map_err(|error| lost(&error))?;
        self.channel = Some(channel);
        self.send(&Frame::Hello(hello.clone()))?;
        let event = self.receive()?;
        if let Event::Welcomed(welcome) = &event {
            self.fixed.restore = welcome.restore_estimate;
        }
        Ok(event)
    }

    fn describe(&mut self, features: Features) -> Result<Event, Abort> {
        let offered_mtus = if features.contains(Features::OFFERED_MTUS) {
            self.job.offered_mtus.clone()
        } else {
            Vec::new()
        };
        self.send(&Frame::Config(Config {
            vcpus: self.job.cpus,
            state_version: state::VERSION,
            layout: layout_of(self.machine.memory()),
            description: self.job.description.clone(),
            offered_mtus,
        }))?;
        let accepted = self.receive()?;
        self.machine
            .dirty()
            .start()
            .map_err(|error| internal(error_chain(&error)))?;
        self.pending = self.fetch()?;
        Ok(accepted)
    }

    fn copy_round(&mut self, round: u32) -> Result<Event, Abort> {
        self.control.update(|status| status.rounds = round);
        let began = Instant::now();
        self.paced = Duration::ZERO;
        self.sent_before = self.sent;
        self.copy(round == 1, true)?;
        self.end_round(round)?;
        let acked = self.receive()?;
        self.round_took = began.elapsed();
        Ok(acked)
    }

    /// Once, after the first round. The guest runs meanwhile.
    fn await_memory(&mut self) -> Result<Event, Abort> {
        let began = Instant::now();
        let event = self.receive()?;
        tracing::info!(waited = ?began.elapsed(), "the destination's memory is resident");
        Ok(event)
    }

    fn decide(&mut self, round: u32) -> Result<Event, Abort> {
        let took = self.round_took;
        let sent = Bytes(self.sent.0 - self.sent_before.0);
        if self.controller.begin_dry_run(&self.fixed) {
            self.measure_fixed_cost(round)?;
        }
        self.pending = self.fetch()?;
        let finished = Round {
            sent,
            took,
            paced: self.paced,
            dirty: bascule_migrate::Pages(self.pending.count()),
        };
        let elapsed = self.started.elapsed();
        let decision = self.controller.round_ended(&finished, &self.fixed, elapsed);
        let predicted = self.controller.predict(finished.dirty, &self.fixed);
        let remaining = Bytes(self.pending.count() * PAGE_SIZE);
        self.control.update(|status| {
            status.remaining = remaining;
            status.downtime_ms_predicted = Some(millis(predicted));
        });
        tracing::info!(
            round,
            dirty = finished.dirty.0,
            sent = sent.0,
            ?took,
            ?predicted,
            rate = self.controller.rate().0,
            ?decision,
            "migration round"
        );
        let progress = Progress {
            round,
            sent: self.sent,
            remaining,
        };
        self.send(&Frame::Progress(progress))?;
        match decision {
            _ if self.control.is_cancelled() => Err(cancelled()),
            Decision::NextRound => Ok(Event::NextRound),
            Decision::Stop { .. } => Ok(Event::Stop),
            Decision::DoesNotConverge {
                predicted, cause, ..
            } => Err(Abort::new(
                AbortReason::NotConverging,
                format!(
                    "{cause}: stopping now would take {} ms, {} are allowed",
                    millis(predicted),
                    self.job.limits.downtime_ms_max
                ),
            )),
        }
    }

    fn stop(&mut self) -> Result<Event, Abort> {
        let now = Instant::now();
        let limit = Duration::from_millis(self.job.limits.downtime_ms_max);
        self.stopped = Some((now, now + limit + STOPPED_GRACE));
        self.pause()?;
        self.step("paused");
        self.fault(FaultPoint::SourceStopped)?;
        Ok(Event::Stopped)
    }

    fn send_remainder(&mut self, round: u32) -> Result<Event, Abort> {
        // The state first: saving it may write guest memory.
        let state = self.save()?;
        if state.len() as u64 > STATE_BYTES_MAX {
            return Err(internal(
                "the machine's state is longer than 16 MiB".to_owned(),
            ));
        }
        self.step("saved");
        let last = self.fetch()?;
        self.pending.merge(&last);
        self.within_stop()?;
        self.copy(false, false)?;
        self.step("memory sent");
        self.end_round(round)?;
        for piece in state.chunks(STATE_PIECE_BYTES_MAX) {
            self.within_stop()?;
            self.send(&Frame::State(piece))?;
        }
        self.send(&Frame::StateEnd(StateEnd {
            length: Bytes(state.len() as u64),
            crc32c: crc32c::crc32c(&state),
        }))?;
        Ok(Event::AllSent)
    }

    fn await_ready(&mut self) -> Result<Event, Abort> {
        self.within_stop()?;
        let event = self.receive()?;
        if event == Event::Ready {
            self.step("destination ready");
            self.fault(FaultPoint::SourceReady)?;
            self.guest
                .mark_in_doubt()
                .map_err(|error| internal(error.0))?;
            if !self.control.pass_commit_point() {
                return Err(cancelled());
            }
        }
        Ok(event)
    }

    /// After the commit point: sends the request once, and pauses if there was no answer.
    fn request_transfer(&mut self, request: &TransferRequest) -> Event {
        let reply = self.authority.request(request);
        if reply == Reply::NoAnswer {
            tracing::warn!(
                ?request,
                attempts = self.attempts,
                "the outcome of the commit is unknown"
            );
            std::thread::sleep(retry_delay(self.attempts));
            self.attempts = self.attempts.saturating_add(1);
        }
        Event::Replied(reply)
    }

    fn copy(&mut self, fresh: bool, guest_runs: bool) -> Result<(), Abort> {
        let machine = self.machine.clone();
        let tracker: &dyn DirtyTracker = machine.dirty().as_ref();
        let pending = std::mem::replace(&mut self.pending, DirtyBitmap::clean(machine.memory()));
        let deadline = self.stopped.map(|(_, deadline)| deadline);
        let mut sink = ChannelSink {
            channel: self
                .channel
                .as_mut()
                .ok_or_else(|| internal("no stream".to_owned()))?,
            control: self.control,
            pacer: guest_runs.then_some(&mut self.pacer),
            started: self.started,
            sent: &mut self.sent,
            paced: &mut self.paced,
            deadline,
        };
        let passed = self
            .copier
            .pass(&pending, guest_runs.then_some(tracker), fresh, &mut sink)
            .map_err(|error| match error {
                _ if self.control.is_cancelled() => cancelled(),
                CopyError::Sink(error) => lost(&error),
                other => internal(error_chain(&other)),
            })?;
        let bytes = self.sent;
        self.control.update(|status| status.bytes = bytes);
        tracing::debug!(?passed, "pages copied");
        Ok(())
    }

    fn end_round(&mut self, round: u32) -> Result<(), Abort> {
        let marks = vec![self.channel()?.sent_mark()];
        self.send(&Frame::RoundEnd(RoundEnd { round, marks }))
    }

    /// Notes how far the blackout is.
    fn step(&mut self, what: &'static str) {
        if let Some((stopped, _)) = self.stopped {
            self.steps.push((what, stopped.elapsed()));
        }
    }

    fn pause(&mut self) -> Result<(), Abort> {
        self.guest.pause().map_err(|error| internal(error.0))
    }

    fn save(&mut self) -> Result<Vec<u8>, Abort> {
        self.guest.save().map_err(|error| internal(error.0))
    }

    fn fetch(&self) -> Result<DirtyBitmap, Abort> {
        let dirty = self.machine.dirty();
        dirty.fetch().map_err(|error| internal(error_chain(&error)))
    }

    fn channel(&mut self) -> Result<&mut Channel, Abort> {
        let none = || internal("no stream".to_owned());
        self.channel.as_mut().ok_or_else(none)
    }

    fn send(&mut self, frame: &Frame<'_>) -> Result<(), Abort> {
        let sent = self.channel()?.send(frame).map_err(|error| lost(&error))?;
        self.sent.0 += sent;
        Ok(())
    }

    fn receive(&mut self) -> Result<Event, Abort> {
        loop {
            let frame = self
                .channel()?
                .receive()
                .map_err(|error| lost_frame(&error))?;
            if let Some(event) = event_of(&frame)? {
                return Ok(event);
            }
        }
    }

    /// Bounds the next wait by the rest of the time for which the guest may be stopped.
    fn within_stop(&mut self) -> Result<(), Abort> {
        let Some((_, deadline)) = self.stopped else {
            return Ok(());
        };
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Abort::new(
                AbortReason::Timeout,
                "the guest was stopped for longer than was predicted",
            ));
        }
        self.channel()?
            .set_timeout(left)
            .map_err(|error| lost(&error))
    }

    fn fault(&self, point: FaultPoint) -> Result<(), Abort> {
        self.job.faults.pass(point).map_err(|error| lost(&error))
    }

    fn show(&self, phase: Phase) {
        let shown = match phase {
            Phase::Greeting | Phase::Describing => MigrationPhase::Preparing,
            Phase::Copying | Phase::AwaitingMemory => MigrationPhase::PreCopy,
            Phase::Stopping | Phase::Sending | Phase::AwaitingReady => MigrationPhase::Stopping,
            Phase::Committing => MigrationPhase::Committing,
            Phase::Departed | Phase::Returned | Phase::Lost => return,
        };
        if self.control.status().phase != shown {
            self.control.enter(shown);
        }
    }
}

fn cancelled() -> Abort {
    Abort::new(AbortReason::Cancelled, "the migration was cancelled")
}

fn internal(text: String) -> Abort {
    Abort::new(AbortReason::Internal, text)
}
