//! A deterministic scheduler: real threads of which one runs at a time, and a clock that advances when
//! none can run. Which of several goes on is drawn from the seed, so a seed replays exactly.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Thread};
use std::time::Duration;

use rand::rngs::StdRng;
use rand::{RngExt as _, SeedableRng as _};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// What is killed and frozen together: a process of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Group {
    pub(crate) node: u8,
    pub(crate) process: u32,
}

/// The world outside all nodes.
pub(crate) const WORLD: Group = Group {
    node: u8::MAX,
    process: 0,
};

pub(crate) struct Scheduler {
    inner: Mutex<Inner>,
    over: Condvar,
}

struct Inner {
    now: u64,
    random: StdRng,
    tasks: BTreeMap<u64, Task>,
    running: Option<u64>,
    next: u64,
    frozen: BTreeMap<u8, u64>,
    held: BTreeMap<Group, u64>,
    failure: Option<String>,
    ending: bool,
    digest: u64,
}

struct Task {
    group: Group,
    state: State,
    killed: bool,
    /// Its thread, once it waits for its turn.
    thread: Option<Thread>,
}

#[derive(Clone, Copy)]
enum State {
    Ready,
    Blocked {
        until: u64,
        on: Option<usize>,
        /// In the kernel: a killed task goes on to the end of the wait.
        uninterruptible: bool,
    },
}

/// How a killed task unwinds.
struct Killed;

thread_local! {
    static ME: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

impl Scheduler {
    /// Runs `first` and all that it spawns until `first` returns. The error is the first panic.
    pub(crate) fn run(
        seed: u64,
        first: impl FnOnce(&Arc<Self>) + Send + 'static,
    ) -> Result<u64, String> {
        let _pinned = Pinned::new();
        let this = Arc::new(Self {
            inner: Mutex::new(Inner {
                now: 0,
                random: StdRng::seed_from_u64(seed),
                tasks: BTreeMap::new(),
                running: None,
                next: 1,
                frozen: BTreeMap::new(),
                held: BTreeMap::new(),
                failure: None,
                ending: false,
                digest: 0,
            }),
            over: Condvar::new(),
        });
        let scheduler = Arc::clone(&this);
        this.spawn(WORLD, "first", move || {
            first(&scheduler);
            scheduler.end(None);
        });
        this.pass_turn(this.lock());
        let mut inner = this.lock();
        while !inner.tasks.is_empty() {
            inner = this
                .over
                .wait(inner)
                .unwrap_or_else(PoisonError::into_inner);
        }
        match inner.failure.take() {
            Some(failure) => Err(failure),
            None => Ok(inner.digest),
        }
    }

    pub(crate) fn spawn(
        self: &Arc<Self>,
        group: Group,
        name: &str,
        run: impl FnOnce() + Send + 'static,
    ) {
        let mut inner = self.lock();
        let id = inner.next;
        inner.next += 1;
        let ending = inner.ending;
        inner.tasks.insert(
            id,
            Task {
                group,
                state: State::Ready,
                killed: ending,
                thread: None,
            },
        );
        drop(inner);
        let this = Arc::clone(self);
        Builder::new()
            .name(format!("{name}@{}", group.node))
            .stack_size(1 << 20)
            .spawn(move || {
                ME.set(id);
                let outcome = catch_unwind(AssertUnwindSafe(|| {
                    this.lock().task(id).thread = Some(std::thread::current());
                    this.await_turn(id);
                    run();
                }));
                if let Err(payload) = outcome
                    && !payload.is::<Killed>()
                {
                    this.end(Some(text(payload.as_ref())));
                }
                let mut inner = this.lock();
                inner.tasks.remove(&id);
                if inner.tasks.is_empty() {
                    this.over.notify_all();
                }
                this.pass_turn(inner);
            })
            .expect("a thread");
    }

    /// Ends the run: every task unwinds.
    fn end(&self, failure: Option<String>) {
        let mut inner = self.lock();
        if inner.failure.is_none() {
            inner.failure = failure;
        }
        inner.ending = true;
        for task in inner.tasks.values_mut() {
            task.killed = true;
            task.state = State::Ready;
        }
    }

    pub(crate) fn now(&self) -> u64 {
        self.lock().now
    }

    /// A number of `0..most`.
    pub(crate) fn below(&self, most: u64) -> u64 {
        self.lock().random.random_range(0..most.max(1))
    }

    /// True once in `n`.
    pub(crate) fn once_in(&self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Something that two runs of a seed must agree about.
    pub(crate) fn note(&self, what: u64) {
        let mut inner = self.lock();
        let mixed = inner.digest ^ what ^ inner.now.rotate_left(17);
        inner.digest = mixed.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(23);
    }

    pub(crate) fn sleep(&self, duration: Duration) {
        let until = self.now() + nanos(duration);
        self.block(None, until, false);
    }

    /// Lets others run, as a preemption does.
    pub(crate) fn preempt(&self) {
        let now = self.now();
        self.block(None, now, false);
    }

    /// Waits for [`Scheduler::wake`] of `on`, or until `until`.
    pub(crate) fn block(&self, on: Option<usize>, until: u64, uninterruptible: bool) {
        let me = ME.get();
        let mut inner = self.lock();
        if inner.task(me).killed && !std::thread::panicking() {
            drop(inner);
            resume_unwind(Box::new(Killed));
        }
        inner.task(me).state = State::Blocked {
            until,
            on,
            uninterruptible,
        };
        self.pass_turn(inner);
        self.await_turn(me);
    }

    /// Chooses the task that goes on. Its thread is woken outside the lock, which it takes at once.
    fn pass_turn(&self, mut inner: MutexGuard<'_, Inner>) {
        let thread = inner.choose();
        drop(inner);
        if let Some(thread) = thread {
            thread.unpark();
        }
    }

    fn await_turn(&self, me: u64) {
        let mut inner = self.lock();
        while inner.running != Some(me) {
            drop(inner);
            std::thread::park();
            inner = self.lock();
        }
        if inner.task(me).killed && !std::thread::panicking() {
            drop(inner);
            resume_unwind(Box::new(Killed));
        }
    }

    pub(crate) fn wake(&self, on: usize) {
        for task in self.lock().tasks.values_mut() {
            if matches!(task.state, State::Blocked { on: Some(key), .. } if key == on) {
                task.state = State::Ready;
            }
        }
    }

    /// Kills the tasks that match, and waits until they have unwound. `hard` ends waits in the kernel too:
    /// the node is reset.
    pub(crate) fn kill(&self, hard: bool, matches: impl Fn(Group) -> bool) {
        loop {
            let mut inner = self.lock();
            let mut left = false;
            for task in inner.tasks.values_mut().filter(|task| matches(task.group)) {
                left = true;
                task.killed = true;
                match task.state {
                    State::Blocked {
                        uninterruptible: true,
                        ..
                    } if !hard => {}
                    _ => task.state = State::Ready,
                }
            }
            drop(inner);
            if !left {
                return;
            }
            self.sleep(Duration::from_millis(1));
        }
    }

    /// No task of the node runs before `until`.
    pub(crate) fn freeze(&self, node: u8, until: u64) {
        self.lock().frozen.insert(node, until);
    }

    /// No task of the process runs before `until`.
    pub(crate) fn hold(&self, process: Group, until: u64) {
        self.lock().held.insert(process, until);
    }

    /// Whether the process is kept from running now.
    pub(crate) fn stands_still(&self, process: Group) -> bool {
        let inner = self.lock();
        let frozen = inner.frozen.get(&process.node).copied().unwrap_or(0);
        let held = inner.held.get(&process).copied().unwrap_or(0);
        frozen.max(held) > inner.now
    }

    /// Nothing stands still on the node any more.
    pub(crate) fn let_go(&self, node: u8) {
        let mut inner = self.lock();
        inner.frozen.remove(&node);
        inner.held.retain(|group, _| group.node != node);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    fn task(&mut self, id: u64) -> &mut Task {
        self.tasks.get_mut(&id).expect("the task")
    }

    /// When the task may run at the earliest.
    fn due(&self, task: &Task) -> u64 {
        let due = match task.state {
            State::Ready => self.now,
            State::Blocked { until, .. } => until,
        };
        let frozen = self.frozen.get(&task.group.node).copied().unwrap_or(0);
        let held = self.held.get(&task.group).copied().unwrap_or(0);
        if task.killed {
            due
        } else {
            due.max(frozen).max(held)
        }
    }

    /// Gives the turn to a task that can run, and advances the clock if there is none. The task's thread, if it waits.
    fn choose(&mut self) -> Option<Thread> {
        let first = self.tasks.values().map(|task| self.due(task)).min();
        let Some(first) = first else {
            self.running = None;
            return None;
        };
        self.now = self.now.max(first);
        let now = self.now;
        let due: Vec<u64> = (self.tasks.iter())
            .filter(|(_, task)| self.due(task) <= now)
            .map(|(id, _)| *id)
            .collect();
        let chosen = due[self.random.random_range(0..due.len())];
        self.running = Some(chosen);
        let task = self.task(chosen);
        task.state = State::Ready;
        task.thread.clone()
    }
}

/// One thread runs at a time: on one CPU they pass the turn several times faster than over two. The threads of a run
/// inherit its CPU from the one that starts it; runs side by side take the allowed CPUs in turn.
struct Pinned(Option<CpuSet>);

impl Pinned {
    fn new() -> Self {
        static RUNS: AtomicUsize = AtomicUsize::new(0);
        let allowed = sched_getaffinity(None).ok();
        if let Some(allowed) = &allowed {
            let cpus: Vec<usize> = (0..CpuSet::MAX_CPU)
                .filter(|cpu| allowed.is_set(*cpu))
                .collect();
            let mut one = CpuSet::new();
            one.set(cpus[RUNS.fetch_add(1, Ordering::Relaxed) % cpus.len()]);
            sched_setaffinity(None, &one).expect("one of the allowed CPUs");
        }
        Self(allowed)
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if let Some(allowed) = &self.0 {
            sched_setaffinity(None, allowed).expect("the CPUs of before");
        }
    }
}

fn text(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().cloned();
    text.or_else(|| payload.downcast_ref::<&str>().map(ToString::to_string))
        .unwrap_or_else(|| "a panic".to_owned())
}

pub(crate) fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX / 4)
}
