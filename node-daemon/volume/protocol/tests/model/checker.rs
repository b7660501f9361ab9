//! Runs a model and prints what it covered.

use std::time::{Duration, Instant};

use stateright::{Checker, HasDiscoveries, Model};

/// The bounds of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// In every test run.
    Small,
    /// With `BASCULE_MODEL=large`.
    Large,
}

impl Size {
    pub(crate) fn from_environment() -> Self {
        match std::env::var("BASCULE_MODEL") {
            Ok(size) if size == "large" => Self::Large,
            _ => Self::Small,
        }
    }

    pub(crate) fn pick<T>(self, small: T, large: T) -> T {
        match self {
            Self::Small => small,
            Self::Large => large,
        }
    }
}

/// Visits every state: every `always` must hold, and every `sometimes` must be reached.
pub(crate) fn holds<M>(name: &str, model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + std::fmt::Debug + std::hash::Hash + PartialEq + Send + Sync,
    M::Action: Clone + std::fmt::Debug + PartialEq + Send + Sync,
{
    let started = Instant::now();
    let checker = model.checker().threads(1).spawn_bfs().join();
    println!(
        "{name}: {} states, {} transitions, depth {}, {:.1} s",
        checker.unique_state_count(),
        checker.state_count(),
        checker.max_depth(),
        started.elapsed().as_secs_f32()
    );
    checker.assert_properties();
}

/// Searches for a counterexample to the named property; there must be one within 300 s.
pub(crate) fn is_caught<M>(name: &str, property: &'static str, model: M)
where
    M: Model + Send + Sync + 'static,
    M::State: Clone + std::fmt::Debug + std::hash::Hash + PartialEq + Send + Sync,
    M::Action: Clone + std::fmt::Debug + PartialEq + Send + Sync,
{
    let started = Instant::now();
    let checker = model
        .checker()
        .threads(1)
        .finish_when(HasDiscoveries::AllOf([property].into()))
        .timeout(Duration::from_secs(300))
        .spawn_bfs()
        .join();
    let states = checker.unique_state_count();
    let path = checker.discovery(property);
    assert!(
        path.is_some(),
        "{name}: no counterexample in {states} states"
    );
    println!(
        "{name}: counterexample after {states} states, {:.1} s: {:?}",
        started.elapsed().as_secs_f32(),
        path.map(|path| path.into_actions())
    );
}
