//! Makes the faults of a profile: at random times, and at the moments that the world reports.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bascule_types::SlotId;
use bascule_volume::peer_rpc::PeerRequest;
use bascule_volume::volume_context::VolumeContext;
use bascule_volume_format::AreaId;

use crate::profile::{Blow, Fault, Moment, Profile, Span};
use crate::scheduler::{Group, WORLD, nanos};
use crate::watchdog::watchdog_of;
use crate::world::{NODES, PEER_STEP, World, daemon_of};

/// The faults of a run.
pub(crate) struct Faults {
    pub(crate) profile: Profile,
    /// From when on they are made, and until when.
    made: Mutex<(u64, u64)>,
}

impl Faults {
    pub(crate) fn new(profile: Profile) -> Self {
        Self {
            profile,
            made: Mutex::new((u64::MAX, 0)),
        }
    }

    fn made(&self) -> (u64, u64) {
        *self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl World {
    /// Makes faults from now on. Returns when they end.
    pub(crate) fn make_faults(self: &Arc<Self>) -> u64 {
        let now = self.scheduler.now();
        let end = now + nanos(self.faults.profile.lasts);
        let mut made = self.faults.made.lock();
        **made.as_mut().unwrap_or_else(|error| error.get_mut()) = (now, end);
        drop(made);
        let world = Arc::clone(self);
        self.scheduler.spawn(WORLD, "faults", move || {
            loop {
                let pause = world.scheduler.below(nanos(world.faults.profile.pause));
                world.scheduler.sleep(Duration::from_nanos(pause));
                if world.scheduler.now() >= end {
                    return;
                }
                world.random_blow();
            }
        });
        end
    }

    fn random_blow(self: &Arc<Self>) {
        let node = self.some_node();
        let blows = &self.faults.profile.random;
        let chosen = self.scheduler.below(blows.len() as u64);
        if let Some(blow) = usize::try_from(chosen).ok().and_then(|n| blows.get(n)) {
            self.strike(node, blow);
        }
    }

    pub(crate) fn some_node(&self) -> u8 {
        u8::try_from(self.scheduler.below(u64::from(NODES))).unwrap_or(0)
    }

    /// Something of the node has come to `moment`: a fault may strike before it goes on.
    pub(crate) fn reached(self: &Arc<Self>, moment: Moment, node: u8) {
        let (from, end) = self.faults.made();
        let now = self.scheduler.now();
        if now < from || now >= end {
            return;
        }
        let strikes = self.faults.profile.strikes.iter();
        let mut strikes = strikes.filter(|(at, ..)| *at == moment);
        let Some((.., blow)) = strikes.find(|(_, often, _)| self.scheduler.once_in(*often)) else {
            return;
        };
        let (world, blow) = (Arc::clone(self), blow.clone());
        let strike = move || world.strike(node, &blow);
        self.scheduler.spawn(WORLD, "strike", strike);
        self.scheduler.sleep(Duration::from_micros(1));
    }

    fn strike(self: &Arc<Self>, node: u8, blow: &Blow) {
        for (fault, span) in &blow.faults {
            if self.nodes()[usize::from(node)].is_up {
                self.make_fault(node, *fault, *span);
            }
        }
    }

    fn make_fault(self: &Arc<Self>, node: u8, fault: Fault, (least, most): Span) {
        let ms = least + self.scheduler.below(most.saturating_sub(least));
        let lasts = Duration::from_millis(ms);
        let until = (self.scheduler.now() + nanos(lasts)).min(self.faults.made().1);
        match fault {
            Fault::KillVolume => self.kill_volume(node),
            Fault::KillGuests => {
                // Their writes are under way, if their path stalls.
                let pause = ms.min(3000);
                self.scheduler.sleep(Duration::from_millis(pause));
                for pid in self.guests_of(node) {
                    self.kill_process(node, pid);
                }
            }
            Fault::PowerCut => self.power_cycle(node),
            Fault::Freeze => self.scheduler.freeze(node, until),
            Fault::Stall => self.disk.stall(node, until),
            Fault::FailWrites => self.disk.fail_writes(node, until),
            Fault::LosePath => self.disk.lose_path(node, until),
            Fault::CutOff => self.nodes()[usize::from(node)].cut_off_until = until,
            Fault::Deaf => self.nodes()[usize::from(node)].deaf_until = until,
            Fault::HoldGuests => {
                for process in self.guests_of(node) {
                    self.scheduler.hold(Group { node, process }, until);
                }
            }
            Fault::HoldWatchdog => self.scheduler.hold(watchdog_of(node), until),
            Fault::HoldDaemon => self.scheduler.hold(daemon_of(node), until),
            Fault::KillWatchdog => self.kill_watchdog(node),
            Fault::KillHolder => self.kill_holder(node),
            Fault::Damage => self.damage(),
            Fault::Pause => self.scheduler.sleep(lasts),
        }
    }

    /// Whether gates are open, or may be, that no watchdog watches although a record names one.
    pub(crate) fn is_falsely_unwatched(&self, node: u8) -> bool {
        let (volume, is_watched) = {
            let nodes = self.nodes();
            let node = &nodes[usize::from(node)];
            (node.volume.clone(), node.is_watched())
        };
        let named = volume.is_some_and(|volume| volume.state().published_watchdog.may_name_one());
        named && !is_watched
    }

    /// The request may arrive once more, much later.
    pub(crate) fn duplicate(self: &Arc<Self>, to: u8, request: &PeerRequest) {
        let often = self.faults.profile.duplicates;
        if often == 0 || !self.scheduler.once_in(often) {
            return;
        }
        let (world, request) = (Arc::clone(self), request.clone());
        self.scheduler.spawn(WORLD, "duplicate", move || {
            let late = world.scheduler.below(20_000);
            world.scheduler.sleep(Duration::from_millis(late));
            let answer = move |context: &VolumeContext| context.answer_peer(request, PEER_STEP);
            drop(world.ask(to, answer, PEER_STEP));
        });
    }

    /// How long `bascule-watchdog` takes with a request that its client gives up meanwhile.
    pub(crate) fn answers_late(&self) -> Option<Duration> {
        let often = self.faults.profile.late_answers;
        let (from, end) = self.faults.made();
        let is_made = (from..end).contains(&self.scheduler.now());
        let late = often > 0 && is_made && self.scheduler.once_in(often);
        late.then(|| Duration::from_millis(1000 + self.scheduler.below(2000)))
    }

    fn kill_volume(&self, node: u8) {
        let pid = self.nodes()[usize::from(node)].volume_pid;
        if let Some(pid) = pid {
            self.kill_process(node, pid);
        }
    }

    /// The node is off at once, and on again later.
    pub(crate) fn power_cycle(self: &Arc<Self>, node: u8) {
        self.reset(node);
        let off = Duration::from_millis(2000 + self.scheduler.below(40_000));
        let later = Arc::clone(self);
        self.scheduler.spawn(WORLD, "power", move || {
            later.scheduler.sleep(off);
            let is_down = {
                let nodes = later.nodes();
                let node = &nodes[usize::from(node)];
                !node.is_up && !node.stays_off
            };
            if is_down {
                later.boot(node);
            }
        });
    }

    /// Damages a leader block or a checkpoint head: one that is provably obsolete, or the newest where the
    /// setup says so.
    fn damage(&self) {
        let superblock = self.disk.superblock();
        let slots = u64::from(superblock.slot_count);
        let slot = SlotId(u16::try_from(self.scheduler.below(slots)).unwrap_or(0));
        let lba = if self.scheduler.once_in(2) {
            superblock.leader_lba(slot)
        } else {
            let half = u8::from(self.scheduler.once_in(2));
            let area = AreaId { slot, half };
            superblock.area(area).head
        };
        self.disk.damage(lba, self.setup.damages_newest);
    }
}
