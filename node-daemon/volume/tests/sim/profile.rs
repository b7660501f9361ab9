//! Which faults a run makes, how dense, and at which moments: the profile that its seed draws. Faults at
//! random times alone meet rare conjunctions rarely; a profile makes one of them common.

use std::time::Duration;

use crate::scheduler::Scheduler;

/// A place in the world at which a fault can strike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// A process asks for its VM.
    Opening,
    /// A guest's write has passed the gate and is not submitted yet.
    Passed,
    /// The same, while no watchdog watches the volume and other nodes count on one.
    PassedUnwatched,
    /// `bascule-watchdog` has decided to pet its device, and has not done it.
    Petting,
    /// The same for the last time before the lease ends.
    PettingLast,
    /// The coordinator thread is about to write an election block.
    Electing,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// kill -9 of the volume's process.
    KillVolume,
    /// kill -9 of every guest of the node.
    KillGuests,
    PowerCut,
    /// The whole node stands still, but for its watchdog's device.
    Freeze,
    /// The path to the disk.
    Stall,
    /// Some writes fail, and land later.
    FailWrites,
    /// Every command of the node's guests fails; writes may land later.
    LosePath,
    /// From the other nodes.
    CutOff,
    /// `bascule-watchdog` does not answer.
    Deaf,
    /// The guests' processes stand still.
    HoldGuests,
    /// `bascule-watchdog` stands still.
    HoldWatchdog,
    /// The node's daemon stands still: what ends is not started again.
    HoldDaemon,
    /// kill -9 of `bascule-watchdog`.
    KillWatchdog,
    /// kill -9 of the process that holds the watchdog device open too.
    KillHolder,
    /// A block of the disk that is provably obsolete is damaged.
    Damage,
    /// None: the time until the next one of a blow.
    Pause,
}

/// What a swarm draws from. Not damage: a leader block that is damaged in the middle of its slot's election, or a head
/// between its area's first row and its next write, may be the newest, and only `bascule-volume repair` ends that.
const FAULTS: [Fault; 14] = [
    Fault::KillVolume,
    Fault::KillGuests,
    Fault::PowerCut,
    Fault::Freeze,
    Fault::Stall,
    Fault::FailWrites,
    Fault::LosePath,
    Fault::CutOff,
    Fault::Deaf,
    Fault::HoldGuests,
    Fault::HoldWatchdog,
    Fault::HoldDaemon,
    Fault::KillWatchdog,
    Fault::KillHolder,
];

impl Fault {
    /// How long it lasts at most, where it lasts.
    fn most(self) -> Duration {
        Duration::from_secs(match self {
            Self::FailWrites => 10,
            Self::CutOff => 30,
            // Longer, the device fires although nothing else is wrong.
            Self::HoldWatchdog | Self::HoldDaemon => 7,
            _ => 60,
        })
    }
}

/// Several faults at once.
#[derive(Clone, Debug)]
pub(crate) struct Blow {
    pub(crate) faults: Vec<(Fault, Span)>,
}

/// The shortest and the longest time, in milliseconds.
pub(crate) type Span = (u64, u64);

impl Blow {
    fn of(faults: &[(Fault, Span)]) -> Self {
        Self {
            faults: faults.to_vec(),
        }
    }

    fn one(fault: Fault) -> Self {
        let most = u64::try_from(fault.most().as_millis()).unwrap_or(0);
        Self::of(&[(fault, (0, most))])
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Profile {
    pub(crate) name: &'static str,
    /// How long faults are made.
    pub(crate) lasts: Duration,
    /// The longest pause between two blows at random times.
    pub(crate) pause: Duration,
    pub(crate) random: Vec<Blow>,
    /// Once in how many times a blow strikes at a moment.
    pub(crate) strikes: Vec<(Moment, u64, Blow)>,
    /// Of a failing path, one write in this many fails.
    pub(crate) fails_once_in: u64,
    /// What is under way at a reset lands, all of it and as late as it may.
    pub(crate) lands_last: bool,
    /// A request to another node arrives again later, once in this many; never if 0.
    pub(crate) duplicates: u64,
    /// `bascule-watchdog` carries a request out when its client has given it up, once in this many; never if 0.
    pub(crate) late_answers: u64,
    pub(crate) wishes: Wishes,
    /// The last check is made while one node stays off.
    pub(crate) one_stays_off: bool,
}

/// What operator and administrator ask for beyond their duty.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wishes {
    /// Between two looks at the VMs.
    pub(crate) look: Duration,
    /// Of the looks at a VM that stands still, once in how many it is taken over.
    pub(crate) takes_over_once_in: u64,
    /// Once in how many looks a VM is moved.
    pub(crate) move_once_in: u64,
    /// A move saves the guest's memory on the volume.
    pub(crate) saves: bool,
    /// As many other VMs as there is room for.
    pub(crate) fills_table: bool,
    /// The administrator confirms that nodes are dead: those that are off, and by mistake one that has just
    /// joined.
    pub(crate) confirms: bool,
    /// A guest that hangs is left alone.
    pub(crate) patient: bool,
    /// Of a lost node's VMs, one is taken over at once and the others hardly ever.
    pub(crate) dawdles: bool,
}

const DUTY: Wishes = Wishes {
    look: Duration::from_secs(1),
    takes_over_once_in: 2,
    move_once_in: 40,
    saves: false,
    fills_table: false,
    confirms: false,
    patient: false,
    dawdles: false,
};

const EAGER: Wishes = Wishes {
    look: Duration::from_millis(200),
    takes_over_once_in: 1,
    ..DUTY
};

/// A profile by its name, as far as it is not drawn from the seed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Every fault at random times.
    Mixed,
    /// Drawn from the seed.
    Swarm,
    /// Resets that come as late, and leave as much, as they may.
    LateResets,
    /// Election blocks that cannot be written, by processes that die.
    Elections,
    /// A watchdog's process that does not answer while writers come and go.
    DeafWatchdog,
    /// Nodes that come back after some of their VMs were taken over, and hasty confirmations.
    Returns,
    /// No room for any more rows.
    FullTable,
    /// Moves with saved memory, and requests that arrive twice.
    SavedStates,
    /// Old blocks that are damaged.
    Damage,
    /// Writes of guests that fail and land later.
    FailedWrites,
    /// Guests that live through a lapse of their node's lease, as its watchdog's process stops answering.
    Lapses,
    /// `bascule-watchdog` and its holder end and are started again, about the time when a lease ends.
    WatchdogRestarts,
    /// Requests to `bascule-watchdog` that are carried out after their clients have given them up.
    LateAnswers,
    /// Paths of guests that are lost, and come back.
    LostPaths,
}

pub(crate) const KINDS: [Kind; 14] = [
    Kind::Mixed,
    Kind::Swarm,
    Kind::LateResets,
    Kind::Elections,
    Kind::DeafWatchdog,
    Kind::Returns,
    Kind::FullTable,
    Kind::SavedStates,
    Kind::Damage,
    Kind::FailedWrites,
    Kind::Lapses,
    Kind::WatchdogRestarts,
    Kind::LateAnswers,
    Kind::LostPaths,
];

impl Kind {
    pub(crate) fn profile(self, scheduler: &Scheduler) -> Profile {
        match self {
            Self::Mixed => mixed(),
            Self::Swarm => swarm(scheduler),
            Self::LateResets => late_resets(),
            Self::Elections => elections(),
            Self::DeafWatchdog => deaf_watchdog(),
            Self::Returns => returns(),
            Self::FullTable => full_table(),
            Self::SavedStates => saved_states(),
            Self::Damage => damage(),
            Self::FailedWrites => failed_writes(),
            Self::Lapses => lapses(),
            Self::WatchdogRestarts => watchdog_restarts(),
            Self::LateAnswers => late_answers(),
            Self::LostPaths => lost_paths(),
        }
    }
}

fn mixed() -> Profile {
    use Fault::{CutOff, FailWrites, Freeze, KillGuests, KillVolume, PowerCut, Stall};
    let stalled_kill = Blow::of(&[(Stall, (0, 45_000)), (KillGuests, (0, 3000))]);
    let mut random = vec![Blow::one(KillGuests), stalled_kill];
    random.extend([KillVolume, PowerCut, Freeze, Stall, FailWrites, CutOff].map(Blow::one));
    Profile {
        name: "mixed",
        lasts: Duration::from_secs(240),
        pause: Duration::from_secs(12),
        random,
        strikes: Vec::new(),
        fails_once_in: 4,
        lands_last: false,
        duplicates: 0,
        late_answers: 0,
        wishes: DUTY,
        one_stays_off: false,
    }
}

fn swarm(scheduler: &Scheduler) -> Profile {
    let coin = || scheduler.once_in(2);
    let mut blows: Vec<Blow> = FAULTS
        .into_iter()
        .filter(|_| coin())
        .map(Blow::one)
        .collect();
    if blows.is_empty() {
        blows.push(Blow::one(Fault::Stall));
    }
    let any = |of: u64| usize::try_from(scheduler.below(of)).unwrap_or(0);
    let moments = [
        Moment::Opening,
        Moment::Passed,
        Moment::PassedUnwatched,
        Moment::Petting,
        Moment::PettingLast,
        Moment::Electing,
    ];
    let strike = |_| {
        let faults = FAULTS.len() as u64;
        let mut blow = Blow::one(FAULTS[any(faults)]);
        if coin() {
            blow.faults.extend(Blow::one(FAULTS[any(faults)]).faults);
        }
        let moment = moments[any(6)];
        let often = if moment == Moment::Passed { 200 } else { 4 };
        (moment, often, blow)
    };
    Profile {
        name: "swarm",
        lasts: Duration::from_secs(240),
        pause: Duration::from_secs([3, 12, 40][any(3)]),
        random: blows,
        strikes: (0..any(4)).map(strike).collect(),
        fails_once_in: [1, 4][any(2)],
        lands_last: coin(),
        duplicates: [0, 10][any(2)],
        late_answers: [0, 10][any(2)],
        wishes: Wishes {
            look: if coin() { DUTY.look } else { EAGER.look },
            takes_over_once_in: 2,
            move_once_in: [10, 40][any(2)],
            saves: coin(),
            fills_table: scheduler.once_in(8),
            confirms: coin(),
            patient: false,
            dawdles: scheduler.once_in(4),
        },
        // A node that names no watchdog, as after `Deaf`, is only taken over from once its administrator has
        // confirmed that it is off.
        one_stays_off: false,
    }
}

fn late_resets() -> Profile {
    use Fault::{HoldGuests, HoldWatchdog, Stall};
    Profile {
        name: "late resets",
        pause: Duration::from_secs(50),
        random: vec![
            Blow::of(&[(Stall, (60_000, 60_000))]),
            Blow::of(&[(Stall, (60_000, 60_000)), (HoldGuests, (1, 2000))]),
        ],
        strikes: vec![(
            Moment::PettingLast,
            1,
            Blow::of(&[(HoldWatchdog, (6900, 6990))]),
        )],
        lands_last: true,
        wishes: EAGER,
        ..mixed()
    }
}

fn elections() -> Profile {
    use Fault::{FailWrites, KillVolume, Pause, PowerCut};
    let failing = (FailWrites, (100, 2000));
    Profile {
        name: "elections",
        lasts: Duration::from_secs(150),
        pause: Duration::from_secs(6),
        random: [KillVolume, KillVolume, PowerCut].map(Blow::one).to_vec(),
        strikes: vec![
            (Moment::Electing, 4, Blow::of(&[failing])),
            (
                Moment::Electing,
                4,
                Blow::of(&[failing, (Pause, (0, 3)), (KillVolume, (0, 1))]),
            ),
        ],
        fails_once_in: 2,
        ..mixed()
    }
}

fn deaf_watchdog() -> Profile {
    use Fault::{Deaf, HoldGuests, KillGuests, Pause, Stall};
    Profile {
        name: "deaf watchdog",
        pause: Duration::from_secs(40),
        random: vec![
            // The volume is withdrawn, and not enlisted again when the path is back.
            Blow::of(&[
                (HoldGuests, (5000, 7000)),
                (Stall, (8000, 9000)),
                (Pause, (5500, 7900)),
                (Deaf, (8000, 12_000)),
            ]),
            Blow::of(&[(Deaf, (5000, 20_000)), (KillGuests, (0, 1))]),
        ],
        strikes: vec![
            (Moment::Opening, 3, Blow::of(&[(Deaf, (1000, 10_000))])),
            (
                Moment::PassedUnwatched,
                1,
                Blow::of(&[(HoldGuests, (50_000, 60_000)), (Stall, (45_000, 50_000))]),
            ),
        ],
        wishes: Wishes {
            move_once_in: 10,
            ..EAGER
        },
        ..mixed()
    }
}

fn returns() -> Profile {
    use Fault::{HoldGuests, PowerCut, Stall};
    Profile {
        name: "returns",
        pause: Duration::from_secs(50),
        random: vec![
            // Nothing is in flight: the node is not reset, and joins again.
            Blow::of(&[(HoldGuests, (50_000, 50_000)), (Stall, (29_000, 45_000))]),
            Blow::of(&[(HoldGuests, (9000, 9000)), (Stall, (5000, 8000))]),
            Blow::one(PowerCut),
        ],
        wishes: Wishes {
            confirms: true,
            dawdles: true,
            patient: true,
            ..EAGER
        },
        ..mixed()
    }
}

fn full_table() -> Profile {
    use Fault::{CutOff, Freeze, KillGuests, PowerCut};
    Profile {
        name: "full table",
        lasts: Duration::from_secs(60),
        random: [PowerCut, Freeze, KillGuests, CutOff]
            .map(Blow::one)
            .to_vec(),
        wishes: Wishes {
            fills_table: true,
            ..DUTY
        },
        one_stays_off: true,
        ..mixed()
    }
}

fn saved_states() -> Profile {
    Profile {
        name: "saved states",
        duplicates: 3,
        wishes: Wishes {
            saves: true,
            move_once_in: 4,
            ..DUTY
        },
        ..mixed()
    }
}

fn damage() -> Profile {
    use Fault::{Damage, KillVolume, PowerCut};
    Profile {
        name: "damage",
        lasts: Duration::from_secs(120),
        pause: Duration::from_secs(8),
        random: [Damage, KillVolume, PowerCut].map(Blow::one).to_vec(),
        ..mixed()
    }
}

fn failed_writes() -> Profile {
    use Fault::{FailWrites, HoldGuests, Pause, Stall};
    Profile {
        name: "failed writes",
        pause: Duration::from_secs(30),
        random: vec![
            Blow::of(&[(Stall, (20_000, 60_000))]),
            Blow::one(HoldGuests),
        ],
        strikes: vec![(
            Moment::Passed,
            150,
            Blow::of(&[
                (FailWrites, (50, 51)),
                (Pause, (10, 100)),
                (Stall, (50_000, 60_000)),
            ]),
        )],
        fails_once_in: 1,
        wishes: EAGER,
        ..mixed()
    }
}

fn lapses() -> Profile {
    let profile = deaf_watchdog();
    Profile {
        name: "lapses",
        pause: Duration::from_secs(15),
        wishes: Wishes {
            patient: true,
            ..profile.wishes
        },
        ..profile
    }
}

fn lost_paths() -> Profile {
    use Fault::{HoldGuests, KillGuests, LosePath, PowerCut, Stall};
    let often = Blow::of(&[(LosePath, (50, 5000))]);
    let mut random = vec![often.clone(), often];
    random.extend([LosePath, Stall, HoldGuests, KillGuests, PowerCut].map(Blow::one));
    Profile {
        name: "lost paths",
        lasts: Duration::from_secs(150),
        pause: Duration::from_secs(5),
        random,
        ..mixed()
    }
}

/// A withdrawal of a volume that has lapsed meets the enlistment that follows when the path is back.
fn late_answers() -> Profile {
    use Fault::{HoldDaemon, HoldGuests, KillVolume, Stall};
    Profile {
        name: "late answers",
        pause: Duration::from_secs(20),
        random: vec![Blow::of(&[
            (HoldGuests, (5000, 7000)),
            (Stall, (5000, 9000)),
        ])],
        strikes: vec![(
            Moment::PassedUnwatched,
            1,
            // Nobody enlists it again, nor renews its lease.
            Blow::of(&[
                (HoldGuests, (50_000, 60_000)),
                (HoldDaemon, (45_000, 50_000)),
                (KillVolume, (0, 1)),
            ]),
        )],
        late_answers: 2,
        wishes: Wishes {
            patient: true,
            ..EAGER
        },
        ..mixed()
    }
}

/// Relative to the last keepalive before the lease ends, up to a second before that.
fn watchdog_restarts() -> Profile {
    use Fault::{HoldDaemon, HoldWatchdog, KillHolder, KillWatchdog, Pause, Stall};
    let kill = (KillWatchdog, (0, 1));
    let late_keepalive = Blow::of(&[
        (HoldWatchdog, (6900, 8900)),
        (Pause, (7100, 16_000)),
        kill,
        (Pause, (1000, 7500)),
        kill,
    ]);
    let two_restarts = Blow::of(&[(Pause, (6500, 8000)), kill, (Pause, (6500, 7900)), kill]);
    let both_end = Blow::of(&[
        (Pause, (6500, 9900)),
        (HoldDaemon, (6500, 7900)),
        (KillHolder, (0, 1)),
        kill,
    ]);
    Profile {
        name: "watchdog restarts",
        pause: Duration::from_secs(40),
        random: vec![
            Blow::of(&[(Stall, (60_000, 60_000))]),
            Blow::of(&[kill]),
            Blow::of(&[(KillHolder, (0, 1))]),
        ],
        strikes: vec![
            (Moment::PettingLast, 3, late_keepalive),
            (Moment::PettingLast, 2, two_restarts),
            (Moment::PettingLast, 1, both_end),
            (Moment::Petting, 50, Blow::of(&[kill])),
        ],
        lands_last: true,
        wishes: EAGER,
        ..mixed()
    }
}
