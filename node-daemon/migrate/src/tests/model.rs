//! The commit, explored exhaustively: the real [`Source`], [`Commit`] and [`ExpectCommit`] against
//! a volume whose requests may be lost, delayed without limit, decided twice, or refused at any moment,
//! a link that may break, and parties that may crash between any two steps.
//!
//! Each rule is then removed in turn ([`Mutation`]), and the exploration must find the harm.

use std::collections::BTreeSet;

use bascule_types::{AttemptId, Epoch, Generation, Owner, SlotId, VmUid, VolumeId};
use stateright::{Checker, Model, Property};

use crate::commit::{Commit, OwnershipRecord, Reply, Terms, Transfer, TransferRequest};
use crate::destination::{CommitEvent, CommitStep, ExpectCommit};
use crate::source::{Action, Attempt, Event, Phase, Source};
use crate::wire::{Abort, AbortReason, Committed, Features, Welcome};

const EPOCH: Epoch = Epoch(4);
const SOURCE: Owner = owner(1);
const DESTINATION: Owner = owner(2);
const THIRD: Owner = owner(3);
const ATTEMPT: AttemptId = AttemptId::from_bytes([1; 16]);
const RETRACTION: AttemptId = AttemptId::from_bytes([2; 16]);

const fn owner(slot: u16) -> Owner {
    Owner {
        slot: SlotId(slot),
        generation: Generation(1),
    }
}

/// A removed rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutation {
    SourceResumesWithoutAnswer,
    SourceResumesOnRefusal,
    SourceTerminatesWithoutAnswer,
    SourceHonoursFailureAfterRequest,
    SourceTellsBeforeTheAnswer,
    DestinationRunsWhenReady,
    DestinationRunsWhenStreamIsLost,
    DestinationDiscardsWhenStreamIsLost,
    DestinationIgnoresTheAttempt,
    CoordinatorIgnoresTheEpoch,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Source,
    source_crashed: bool,
    /// The source has passed the commit point.
    requested: bool,
    destination: Destination,
    link: bool,
    to_destination: Vec<ToDestination>,
    ready_on_its_way: bool,
    row: OwnershipRecord,
    /// Every request ever sent: any copy may still be decided, at any time.
    requests: BTreeSet<RequestKey>,
    /// The source's node lost its lease and joined again; its ownership was kept.
    rejoined: bool,
    /// A guest started by a node that took over from a fenced source.
    third_runs: bool,
}

type RequestKey = (Owner, Epoch, Owner, AttemptId);

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Destination {
    Receiving,
    Waiting(ExpectCommit),
    Orphaned(ExpectCommit),
    Running,
    Discarded,
    Crashed,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum ToDestination {
    Everything,
    Committed(Committed),
    Aborted,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    SourceAdvances,
    SourceFails,
    SourceCrashes,
    DestinationCrashes,
    LinkBreaks,
    DestinationReceives,
    DestinationNoticesTheLoss,
    DestinationReadsTheRow,
    SourceReceivesReady,
    /// The volume decides the source's present request and the answer arrives.
    Answer {
        lease: bool,
    },
    /// A copy of an earlier request is decided, and its reply is lost.
    LateCopy(RequestKey),
    NoAnswer,
    Rejoin,
    TakeOver(Owner),
}

struct CommitModel {
    mutation: Option<Mutation>,
}

const fn key(transfer: &Transfer) -> RequestKey {
    (transfer.from, transfer.epoch, transfer.to, transfer.attempt)
}

impl World {
    fn start() -> Self {
        let (source, _) = Source::begin(Attempt {
            vm: VmUid::from_bytes([9; 16]),
            attempt: ATTEMPT,
            retraction: RETRACTION,
            source: SOURCE,
            epoch: EPOCH,
            volume: VolumeId::from_bytes([8; 16]),
            destination: DESTINATION,
        });
        Self {
            source,
            source_crashed: false,
            requested: false,
            destination: Destination::Receiving,
            link: true,
            to_destination: Vec::new(),
            ready_on_its_way: false,
            row: OwnershipRecord {
                owner: Some(SOURCE),
                epoch: EPOCH,
                attempt: None,
            },
            requests: BTreeSet::new(),
            rejoined: false,
            third_runs: false,
        }
    }

    fn source_runs(&self) -> bool {
        use Phase::{Copying, Describing, Greeting, Returned};
        !self.source_crashed
            && matches!(
                self.source.phase(),
                Greeting | Describing | Copying | Returned
            )
    }

    fn runners(&self) -> usize {
        usize::from(self.source_runs())
            + usize::from(self.destination == Destination::Running)
            + usize::from(self.third_runs)
    }

    fn request(&self) -> Option<Transfer> {
        let committing = !self.source_crashed && self.source.phase() == Phase::Committing;
        // The machine repeats its request whenever there was no answer.
        let (_, action) =
            committing.then(|| self.source.clone().next(Event::Replied(Reply::NoAnswer)))?;
        match action {
            Action::RequestTransfer(
                TransferRequest::Transfer(transfer) | TransferRequest::Retract(transfer),
            ) => Some(transfer),
            _ => None,
        }
    }
}

impl CommitModel {
    fn is(&self, mutation: Mutation) -> bool {
        self.mutation == Some(mutation)
    }

    /// The coordinator's rule for a transfer (`Change::Transfer`).
    fn decide(&self, row: &mut OwnershipRecord, request: RequestKey, lease: bool) -> bool {
        let (from, epoch, to, attempt) = request;
        if row.attempt == Some(attempt) && row.epoch == epoch.next() {
            return true;
        }
        let epoch_fits = row.epoch == epoch || self.is(Mutation::CoordinatorIgnoresTheEpoch);
        if !lease || row.owner != Some(from) || !epoch_fits {
            return false;
        }
        *row = OwnershipRecord {
            owner: Some(to),
            epoch: row.epoch.next(),
            attempt: Some(attempt),
        };
        true
    }

    fn source_takes(&self, world: &mut World, event: Event) {
        let (source, action) = world.source.clone().next(event);
        world.source = source;
        self.act(world, &action);
    }

    fn act(&self, world: &mut World, action: &Action) {
        match action {
            Action::RequestTransfer(
                TransferRequest::Transfer(transfer) | TransferRequest::Retract(transfer),
            ) => {
                world.requested = true;
                world.requests.insert(key(transfer));
                if self.is(Mutation::SourceTellsBeforeTheAnswer) && transfer.to == DESTINATION {
                    self.tell(
                        world,
                        ToDestination::Committed(Committed {
                            epoch: EPOCH.next(),
                            owner: DESTINATION,
                        }),
                    );
                }
            }
            Action::Depart(commit) => self.tell(world, ToDestination::Committed(*commit)),
            Action::KeepRunning(_) | Action::Resume { .. } => {
                self.tell(world, ToDestination::Aborted);
            }
            _ => {}
        }
    }

    fn tell(&self, world: &mut World, message: ToDestination) {
        if world.link && !world.to_destination.contains(&message) {
            world.to_destination.push(message);
        }
    }

    fn return_to(&self, world: &mut World) {
        // A source that breaks a rule: it runs as if it had not sent the request.
        world.source = World::start().source.next(Event::Failed(failure())).0;
    }

    fn source_advances(&self, world: &mut World) {
        let event = match world.source.phase() {
            Phase::Greeting => Event::Welcomed(Welcome {
                version: 1,
                streams: 1,
                features: Features(0),
                destination: DESTINATION,
                restore_estimate: std::time::Duration::ZERO,
            }),
            Phase::Describing => Event::RoundAcked(0),
            Phase::Copying => Event::Stop,
            Phase::Stopping => Event::Stopped,
            Phase::Sending => {
                self.tell(world, ToDestination::Everything);
                Event::AllSent
            }
            _ => return,
        };
        self.source_takes(world, event);
    }

    fn destination_steps(&self, world: &mut World, step: CommitStep) {
        world.destination = match step {
            CommitStep::Wait(waiting) => Destination::Waiting(waiting),
            CommitStep::QueryVolume(waiting) => Destination::Orphaned(waiting),
            CommitStep::Run { .. } => Destination::Running,
            CommitStep::Discard => Destination::Discarded,
        };
    }

    fn destination_receives(&self, world: &mut World) {
        let message = world.to_destination.remove(0);
        match (world.destination, message) {
            (Destination::Receiving, ToDestination::Everything) => {
                world.ready_on_its_way = world.link;
                world.destination = if self.is(Mutation::DestinationRunsWhenReady) {
                    Destination::Running
                } else {
                    Destination::Waiting(ExpectCommit::for_model(terms()))
                };
            }
            (Destination::Receiving, ToDestination::Aborted) => {
                world.destination = Destination::Discarded;
            }
            (Destination::Waiting(waiting), ToDestination::Committed(commit)) => {
                self.destination_steps(world, waiting.next(&CommitEvent::Committed(commit)));
            }
            (Destination::Waiting(waiting), ToDestination::Aborted) => {
                self.destination_steps(world, waiting.next(&CommitEvent::Aborted));
            }
            _ => {}
        }
    }

    fn destination_loses(&self, world: &mut World) {
        match world.destination {
            Destination::Receiving => world.destination = Destination::Discarded,
            Destination::Waiting(_) if self.is(Mutation::DestinationRunsWhenStreamIsLost) => {
                world.destination = Destination::Running;
            }
            Destination::Waiting(_) if self.is(Mutation::DestinationDiscardsWhenStreamIsLost) => {
                world.destination = Destination::Discarded;
            }
            Destination::Waiting(waiting) => {
                self.destination_steps(world, waiting.next(&CommitEvent::StreamLost));
            }
            _ => {}
        }
    }

    fn destination_reads(&self, world: &mut World) {
        if let Destination::Orphaned(waiting) = world.destination {
            let mut row = world.row;
            if self.is(Mutation::DestinationIgnoresTheAttempt) {
                row.attempt = Some(ATTEMPT);
            }
            self.destination_steps(world, waiting.next(&CommitEvent::Record(row)));
        }
    }

    fn answer(&self, world: &mut World, lease: bool) {
        let Some(request) = world.request() else {
            return;
        };
        let granted = self.decide(&mut world.row, key(&request), lease);
        let row = world.row;
        if !granted && self.is(Mutation::SourceResumesOnRefusal) && terms().transferred(&row) {
            return self.source_takes(world, Event::Replied(Reply::Refused(row)));
        }
        if !granted && self.is(Mutation::SourceResumesOnRefusal) {
            return self.return_to(world);
        }
        let reply = if granted {
            Reply::Granted(row)
        } else {
            Reply::Refused(row)
        };
        self.source_takes(world, Event::Replied(reply));
    }

    /// What happens if from now on nothing fails: everything that can go on does, until nothing
    /// changes any more.
    fn complete(&self, world: &World) -> World {
        let mut world = world.clone();
        for _ in 0..64 {
            let before = world.clone();
            if !world.source_crashed {
                if !world.link && world.source.phase().cancellable() {
                    self.source_takes(&mut world, Event::Failed(failure()));
                } else {
                    self.source_advances(&mut world);
                }
                self.answer(&mut world, true);
            }
            if !world.to_destination.is_empty() {
                self.destination_receives(&mut world);
            } else if !world.link || world.source_crashed {
                self.destination_loses(&mut world);
            }
            self.destination_reads(&mut world);
            if world.ready_on_its_way && !world.source_crashed {
                world.ready_on_its_way = false;
                self.source_takes(&mut world, Event::Ready);
            }
            // A destination that is gone is noticed as a broken link.
            if matches!(
                world.destination,
                Destination::Crashed | Destination::Discarded
            ) {
                world.link = false;
                world.to_destination.clear();
            }
            if world == before {
                return world;
            }
        }
        world
    }
}

fn terms() -> Terms {
    Terms {
        source: SOURCE,
        epoch: EPOCH,
        destination: DESTINATION,
        attempt: ATTEMPT,
    }
}

fn failure() -> Abort {
    Abort::new(AbortReason::Internal, "")
}

impl Model for CommitModel {
    type State = World;
    type Action = Step;

    fn init_states(&self) -> Vec<World> {
        vec![World::start()]
    }

    fn actions(&self, world: &World, steps: &mut Vec<Step>) {
        let alive = !world.source_crashed;
        if alive {
            steps.extend([Step::SourceAdvances, Step::SourceFails, Step::SourceCrashes]);
        }
        if world.link {
            steps.push(Step::LinkBreaks);
        }
        if !world.to_destination.is_empty() {
            steps.push(Step::DestinationReceives);
        }
        if (!world.link || world.source_crashed) && world.to_destination.is_empty() {
            steps.push(Step::DestinationNoticesTheLoss);
        }
        if world.destination != Destination::Crashed {
            steps.push(Step::DestinationCrashes);
        }
        steps.push(Step::DestinationReadsTheRow);
        if alive && world.ready_on_its_way {
            steps.push(Step::SourceReceivesReady);
        }
        if world.request().is_some() {
            steps.extend([
                Step::Answer { lease: true },
                Step::Answer { lease: false },
                Step::NoAnswer,
            ]);
        }
        steps.extend(world.requests.iter().copied().map(Step::LateCopy));
        if !world.rejoined && alive && world.row.owner == Some(SOURCE) {
            steps.push(Step::Rejoin);
        }
        // Only a source that is certainly gone is taken over from.
        if !alive
            && world
                .row
                .owner
                .is_some_and(|owner| owner.slot == SOURCE.slot)
        {
            steps.extend([Step::TakeOver(THIRD), Step::TakeOver(DESTINATION)]);
        }
    }

    fn next_state(&self, last: &World, step: Step) -> Option<World> {
        let mut world = last.clone();
        match step {
            Step::SourceAdvances => self.source_advances(&mut world),
            Step::SourceFails => {
                let requested = world.source.phase() == Phase::Committing;
                self.source_takes(&mut world, Event::Failed(failure()));
                if requested && self.is(Mutation::SourceHonoursFailureAfterRequest) {
                    self.return_to(&mut world);
                }
            }
            Step::SourceCrashes => {
                world.source_crashed = true;
                world.ready_on_its_way = false;
            }
            Step::DestinationCrashes => {
                world.destination = Destination::Crashed;
                world.to_destination.clear();
            }
            Step::LinkBreaks => {
                world.link = false;
                world.to_destination.clear();
                world.ready_on_its_way = false;
            }
            Step::DestinationReceives => self.destination_receives(&mut world),
            Step::DestinationNoticesTheLoss => self.destination_loses(&mut world),
            Step::DestinationReadsTheRow => self.destination_reads(&mut world),
            Step::SourceReceivesReady => {
                world.ready_on_its_way = false;
                self.source_takes(&mut world, Event::Ready);
            }
            Step::Answer { lease } => self.answer(&mut world, lease),
            Step::LateCopy(request) => {
                self.decide(&mut world.row, request, true);
            }
            Step::NoAnswer if self.is(Mutation::SourceResumesWithoutAnswer) => {
                self.return_to(&mut world);
            }
            Step::NoAnswer if self.is(Mutation::SourceTerminatesWithoutAnswer) => {
                self.source_takes(&mut world, Event::Replied(Reply::NoSuchVm));
            }
            Step::NoAnswer => self.source_takes(&mut world, Event::Replied(Reply::NoAnswer)),
            Step::Rejoin => {
                world.rejoined = true;
                world.row.owner = Some(Owner {
                    generation: Generation(2),
                    ..SOURCE
                });
            }
            Step::TakeOver(to) => {
                world.row = OwnershipRecord {
                    owner: Some(to),
                    epoch: world.row.epoch.next(),
                    attempt: None,
                };
                world.third_runs = true;
            }
        }
        (world != *last).then_some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(NEVER_TWO, |_, world: &World| world.runners() <= 1),
            Property::always(ONLY_THE_OWNER_RUNS, |_, world: &World| {
                let named = |slot| world.row.owner.is_some_and(|owner| owner.slot == slot);
                (!world.source_runs() || named(SOURCE.slot))
                    && (world.destination != Destination::Running || named(DESTINATION.slot))
            }),
            Property::always(NEVER_NONE, |model: &Self, world: &World| {
                let end = model.complete(world);
                let owner = end.row.owner.map(|owner| owner.slot);
                let destination_lives = end.destination != Destination::Crashed;
                match owner {
                    Some(slot) if slot == SOURCE.slot && !end.source_crashed => end.source_runs(),
                    Some(slot) if slot == DESTINATION.slot && destination_lives => {
                        end.destination == Destination::Running || end.third_runs
                    }
                    _ => true,
                }
            }),
            Property::always(
                BEFORE_THE_COMMIT_THE_SOURCE_KEEPS_IT,
                |model: &Self, world: &World| {
                    let failed = model.next_state(world, Step::SourceFails);
                    world.requested
                        || world.source_crashed
                        || failed.unwrap_or_else(|| world.clone()).source_runs()
                },
            ),
            Property::sometimes(
                "it commits by the source's Committed",
                |_, world: &World| world.link && world.destination == Destination::Running,
            ),
            Property::sometimes(
                "it commits by the ownership record alone",
                |_, world: &World| {
                    world.source_crashed
                        && !world.third_runs
                        && world.destination == Destination::Running
                },
            ),
            Property::sometimes("the source takes the ownership back", |_, world: &World| {
                world.requested && world.source_runs() && world.row.attempt == Some(RETRACTION)
            }),
            Property::sometimes("the source learns that it is gone", |_, world: &World| {
                world.source.phase() == Phase::Departed && world.row.attempt == Some(ATTEMPT)
            }),
        ]
    }
}

const NEVER_TWO: &str = "I2: the guest never runs twice";
const ONLY_THE_OWNER_RUNS: &str = "I2: only the owner runs the guest";
const NEVER_NONE: &str = "I5: the owner that lives runs the guest once nothing fails any more";
const BEFORE_THE_COMMIT_THE_SOURCE_KEEPS_IT: &str =
    "I5: a failure before the commit point is harmless";

#[test]
fn i2_i5_no_order_of_crashes_and_losses_leaves_two_guests_or_none() {
    let checker = CommitModel { mutation: None }
        .checker()
        .threads(2)
        .spawn_bfs()
        .join();
    let states = checker.unique_state_count();
    assert!(states > 500, "only {states} states were reached");
    checker.assert_properties();
}

#[test]
fn the_exploration_finds_the_harm_of_every_removed_rule() {
    use Mutation::{
        CoordinatorIgnoresTheEpoch, DestinationDiscardsWhenStreamIsLost,
        DestinationIgnoresTheAttempt, DestinationRunsWhenReady, DestinationRunsWhenStreamIsLost,
        SourceHonoursFailureAfterRequest, SourceResumesOnRefusal, SourceResumesWithoutAnswer,
        SourceTellsBeforeTheAnswer, SourceTerminatesWithoutAnswer,
    };
    for (mutation, harm) in [
        (SourceResumesWithoutAnswer, NEVER_TWO),
        (SourceResumesOnRefusal, NEVER_TWO),
        (SourceTerminatesWithoutAnswer, NEVER_NONE),
        (SourceHonoursFailureAfterRequest, NEVER_TWO),
        (SourceTellsBeforeTheAnswer, NEVER_TWO),
        (DestinationRunsWhenReady, ONLY_THE_OWNER_RUNS),
        (DestinationRunsWhenStreamIsLost, NEVER_TWO),
        (DestinationDiscardsWhenStreamIsLost, NEVER_NONE),
        (DestinationIgnoresTheAttempt, NEVER_TWO),
        (CoordinatorIgnoresTheEpoch, ONLY_THE_OWNER_RUNS),
    ] {
        let model = CommitModel {
            mutation: Some(mutation),
        };
        let checker = model.checker().threads(2).spawn_bfs().join();
        assert!(
            checker.discovery(harm).is_some(),
            "{mutation:?} goes unnoticed by {harm:?}"
        );
    }
}

#[test]
fn a_commit_begins_with_the_transfer_request() {
    let commit = Commit::begin(terms(), RETRACTION);
    let Some(TransferRequest::Transfer(transfer)) = commit.request() else {
        panic!("{commit:?}");
    };
    assert_eq!(key(&transfer), (SOURCE, EPOCH, DESTINATION, ATTEMPT));
}
