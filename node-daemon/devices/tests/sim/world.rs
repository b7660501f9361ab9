//! The event loop: the device, the guests that are due, and the faults.

use std::cell::RefCell;
use std::rc::Rc;

use bascule_devices::disk::Rules;

use crate::Ran;
use crate::device::{Bad, Device, Life, MS, SETTLE_NANOS};
use crate::guest::Guest;

pub(crate) struct World {
    device: Rc<RefCell<Device>>,
    guests: Vec<Guest>,
    /// Guests that were killed, until they start again: by when nothing of theirs lands any more. None while their
    /// last life is still in flight.
    killed: Vec<(usize, Life, Option<u64>)>,
    digest: u64,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    LosePath,
    BadPlace,
    FailWrites,
    Stall,
    CloseGate,
    Pause,
    Move,
    Kill,
    Reset,
    Repair,
}

/// Which faults there are, so that each has runs in which it is common.
const PROFILES: [&[Fault]; 5] = [
    &[
        Fault::LosePath,
        Fault::BadPlace,
        Fault::FailWrites,
        Fault::Stall,
        Fault::CloseGate,
        Fault::Pause,
        Fault::Move,
        Fault::Kill,
        Fault::Reset,
        Fault::Repair,
    ],
    &[
        Fault::LosePath,
        Fault::LosePath,
        Fault::CloseGate,
        Fault::Pause,
    ],
    &[Fault::BadPlace, Fault::BadPlace, Fault::Move],
    &[Fault::FailWrites, Fault::Move, Fault::Reset],
    &[Fault::LosePath, Fault::BadPlace, Fault::Repair, Fault::Kill],
];

impl World {
    pub(crate) fn new(seed: u64, rules: Rules) -> Self {
        let device = Rc::new(RefCell::new(Device::new(seed)));
        let guests = (0..GUESTS).map(|n| Guest::new(n, &device, rules)).collect();
        Self {
            device,
            guests,
            killed: Vec::new(),
            digest: 0,
        }
    }

    pub(crate) fn run(mut self) -> Ran {
        let profile = PROFILES[usize::try_from(self.below(PROFILES.len() as u64)).unwrap()];
        let mut next_fault = self.below(3000 * MS);
        while self.now() < LASTS {
            self.turn(next_fault);
            if self.now() >= next_fault {
                let fault = profile[usize::try_from(self.below(profile.len() as u64)).unwrap()];
                self.strike(fault);
                next_fault = self.now() + self.below(3000 * MS);
            }
        }
        self.calm_down();
        Ran {
            digest: self.digest,
            nanos: self.now(),
            requests: self.guests.iter().map(|guest| guest.completed).sum(),
        }
    }

    /// Everything that happens next, and the guests that are due then; nothing after `until`.
    fn turn(&mut self, until: u64) {
        let event = self.device.borrow().next_event();
        let dues = self.guests.iter().filter_map(Guest::due);
        let restarts = self.killed.iter().filter_map(|(.., at)| *at);
        let next = dues.chain(restarts).chain(event).chain([until]).min();
        let next = next.unwrap_or(until).max(self.now());
        self.device.borrow_mut().advance(next);
        let first = usize::try_from(self.below(GUESTS as u64)).unwrap();
        for n in (first..GUESTS).chain(0..first) {
            let due = self.guests[n].due().is_some_and(|at| at <= self.now());
            if due {
                self.guests[n].step();
            }
        }
        self.restart_killed();
        let completed = self.guests.iter().map(|guest| guest.completed).sum::<u64>();
        let mixed = self.digest ^ completed ^ self.now().rotate_left(17);
        self.digest = mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }

    fn strike(&mut self, fault: Fault) {
        let now = self.now();
        let guest = usize::try_from(self.below(GUESTS as u64)).unwrap();
        let lasts = 100 * MS + self.below(8000 * MS);
        let runs = self.guests[guest].runs();
        match fault {
            Fault::LosePath => {
                let back = self.device.borrow().lost_until;
                if back == 0 || back + PATH_STAYS < now {
                    self.device.borrow_mut().lose_path(lasts);
                }
            }
            Fault::BadPlace => self.damage(),
            Fault::FailWrites => self.device.borrow_mut().failing_until = now + lasts / 4,
            // A command that is under way when the path is back meets no second loss.
            Fault::Stall if self.device.borrow().lost_until + PATH_STAYS < now => {
                self.device.borrow_mut().stall(lasts / 2);
            }
            Fault::CloseGate => self.guests[guest].gate_closed_until = now + lasts,
            Fault::Pause if runs => {
                self.guests[guest].drain();
                self.guests[guest].stands_still_until = now + lasts;
            }
            Fault::Move => {
                self.guests[guest].move_away();
            }
            Fault::Kill if runs => self.kill(guest),
            Fault::Reset => {
                for n in 0..GUESTS {
                    if self.guests[n].runs() {
                        self.kill(n);
                    }
                }
                self.device.borrow_mut().reset();
                for (.., at) in &mut self.killed {
                    *at = Some(now + SETTLE_NANOS);
                }
            }
            Fault::Repair => self.device.borrow_mut().repair(guest),
            Fault::Stall | Fault::Pause | Fault::Kill => {}
        }
    }

    fn damage(&mut self) {
        let mut device = self.device.borrow_mut();
        let errnos = [
            libc::EIO,
            libc::EIO,
            libc::ENODATA,
            libc::EREMOTEIO,
            libc::EILSEQ,
            libc::ENOSPC,
        ];
        let errno = errnos[usize::try_from(device.below(6)).unwrap()];
        // Not the place by which the device is known to be there.
        let block = 1 + device.below(95);
        let (reads, writes) = (!device.once_in(3), !device.once_in(3));
        let bad = Bad {
            errno,
            reads,
            writes,
        };
        device.bad.insert(block, bad);
    }

    fn kill(&mut self, guest: usize) {
        let life = self.guests[guest].life();
        self.guests[guest].kill();
        self.killed.push((guest, life, None));
    }

    /// As the volume does: a killed writer's disk is opened when its lock has been free for the settle time, and that
    /// of an unclean one only after a reset of the node.
    fn restart_killed(&mut self) {
        let now = self.now();
        let device = Rc::clone(&self.device);
        let mut unclean = false;
        for (guest, life, at) in &mut self.killed {
            let device = device.borrow();
            if at.is_none() && !device.is_in_flight(*life) {
                *at = Some(now + SETTLE_NANOS);
                unclean |= self.guests[*guest].gate.has_failed();
            }
        }
        if unclean {
            self.strike(Fault::Reset);
        }
        let due = |at: Option<u64>| at.is_some_and(|at| at <= now);
        let (start, wait) = self.killed.drain(..).partition(|(.., at)| due(*at));
        self.killed = wait;
        let start: Vec<(usize, Life, Option<u64>)> = start;
        for (guest, ..) in start {
            self.guests[guest].start();
        }
    }

    /// Without faults, every request is answered.
    fn calm_down(&mut self) {
        {
            let mut device = self.device.borrow_mut();
            device.bad.clear();
            device.failing_until = 0;
        }
        for guest in &mut self.guests {
            guest.is_quiet = true;
        }
        let deadline = self.now() + ANSWERED_WITHIN;
        while !self.killed.is_empty() || self.guests.iter().any(|guest| guest.open() > 0) {
            let in_time = self.now() < deadline;
            let describe = || self.guests.iter().map(Guest::describe);
            assert!(
                in_time,
                "wedged at {}:\n{}",
                self.now(),
                describe().collect::<String>()
            );
            self.turn(deadline);
        }
        let settled = self.now() + 2 * SETTLE_NANOS;
        self.device.borrow_mut().advance(settled);
        self.guests.iter().for_each(Guest::check_acknowledged);
    }

    fn now(&self) -> u64 {
        self.device.borrow().now
    }

    fn below(&self, most: u64) -> u64 {
        self.device.borrow_mut().below(most)
    }
}

const GUESTS: usize = 4;
/// A minute.
const LASTS: u64 = 60_000 * MS;
/// Between the return of a path and its next loss.
const PATH_STAYS: u64 = 1000 * MS;
/// The longest outage, a held guest's wait, and overlapping writes that settle one after the other.
const ANSWERED_WITHIN: u64 = 120_000 * MS;
