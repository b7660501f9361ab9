//! Leader election through a `coordination.k8s.io` Lease, as client-go does it. Not related to the storage
//! lease of a node on a volume.
//!
//! It is an optimisation, not a safety mechanism: two leaders at once duplicate load, events and log lines,
//! and never a guest. What starts, moves or ends one is a `Change` that the volume's coordinator grants for one
//! owner and epoch, and that a node daemon asks for in its turn; names of pods and records are made from the
//! epoch, so that the second leader finds what the first has created. The duration may therefore be as short
//! as the API server's delays allow: it is how long nobody reacts when the leader's node is lost.
//!
//! Clocks are not compared: a replica takes the Lease over when it has not changed for its duration, counted
//! from the first read of its present content by the replica's own clock. `renewTime` is for readers only.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use bascule_crds::names::FIELD_MANAGER;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

/// One replica's candidacy. Clones are of the same replica.
#[derive(Clone, Debug)]
pub(crate) struct Election {
    api: Api<Lease>,
    identity: Arc<str>,
    times: Times,
}

/// The Lease's duration, and what follows from it.
#[derive(Clone, Copy, Debug)]
struct Times {
    valid: Duration,
}

/// What a replica knows of the Lease.
#[derive(Debug, Default)]
struct View {
    /// The Lease as this replica wrote it last; none while another write may have followed.
    written: Option<Lease>,
    /// The content that was read last, and when it was read first.
    seen: Option<(LeaseSpec, Instant)>,
    /// Until when this replica leads without a further renewal.
    leads_until: Option<Instant>,
    /// Whether the last attempt failed.
    failing: bool,
}

/// What to do with the Lease as last read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// This replica holds it.
    Renew,
    /// It has no holder, or expired: acquire it.
    Acquire,
    /// Another replica holds it.
    Wait,
}

impl Election {
    pub(crate) fn new(client: Client, namespace: &str, identity: &str, valid: Duration) -> Self {
        Self {
            api: Api::namespaced(client, namespace),
            identity: identity.into(),
            times: Times { valid },
        }
    }

    /// Acquires and renews until dropped; publishes in `leading_tx` whether this replica leads.
    /// It steps down after two thirds of the Lease's duration without a renewal, before another replica
    /// may acquire the Lease.
    pub(crate) async fn run(self, leading_tx: watch::Sender<bool>) {
        let mut view = View::default();
        loop {
            let started = Instant::now();
            let limit = self.times.limit(started, view.leads_until);
            let attempt = match timeout_at(limit, self.attempt(&mut view)).await {
                Ok(outcome) => outcome,
                Err(_) => Err(anyhow!("the API server does not respond")),
            };
            view.failing = match &attempt {
                Ok(holds) => {
                    view.leads_until = holds.then(|| started + self.times.unrenewed_max());
                    false
                }
                Err(error) => {
                    report(error, view.failing);
                    true
                }
            };
            let now = Instant::now();
            view.leads_until = view.leads_until.filter(|until| *until > now);
            publish(&leading_tx, view.leads_until.is_some());
            let renewed = matches!(attempt, Ok(true));
            let pause = self.times.pause(renewed, now, view.leads_until);
            sleep(pause).await;
        }
    }

    /// Gives the Lease up if this replica holds it, so that another one leads at its next look. To be called
    /// when nothing that only the leader does runs any more.
    pub(crate) async fn release(&self) {
        let limit = self.times.limit(Instant::now(), None);
        match timeout_at(limit, self.give_up()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => report(&error, false),
            Err(_) => report(&anyhow!("the API server does not respond"), false),
        }
    }

    async fn give_up(&self) -> Result<()> {
        let read = self.api.get_opt(LEASE).await.context("read the Lease")?;
        let Some(mut lease) = read.filter(|lease| holder(lease.spec.as_ref()) == &*self.identity)
        else {
            return Ok(());
        };
        lease.spec = lease.spec.map(|spec| LeaseSpec {
            holder_identity: None,
            renew_time: Some(MicroTime(crate::clock::timestamp())),
            ..spec
        });
        self.write(&lease).await.map(drop)
    }

    /// Whether this replica holds the Lease now.
    async fn attempt(&self, view: &mut View) -> Result<bool> {
        // Usually nobody else has written it: one request instead of two.
        if let Some(lease) = view.written.take()
            && self.put(view, lease, Step::Renew).await?
        {
            return Ok(true);
        }
        let Some(lease) = self.api.get_opt(LEASE).await.context("read the Lease")? else {
            return self.create(view).await;
        };
        match view.step(&lease, &self.identity, self.times, Instant::now()) {
            Step::Wait => Ok(false),
            step => self.put(view, lease, step).await,
        }
    }

    async fn create(&self, view: &mut View) -> Result<bool> {
        let spec = self.spec(
            &LeaseSpec::default(),
            Step::Acquire,
            crate::clock::timestamp(),
        );
        let lease = Lease {
            metadata: ObjectMeta {
                name: Some(LEASE.to_owned()),
                ..ObjectMeta::default()
            },
            spec: Some(spec),
        };
        view.written = unless_conflict(self.api.create(&params(), &lease).await)?;
        Ok(view.written.is_some())
    }

    /// Writes the Lease as this replica's, unless it was written or deleted since `lease` was read.
    async fn put(&self, view: &mut View, mut lease: Lease, step: Step) -> Result<bool> {
        let old = lease.spec.take().unwrap_or_default();
        lease.spec = Some(self.spec(&old, step, crate::clock::timestamp()));
        view.written = self.write(&lease).await?;
        Ok(view.written.is_some())
    }

    /// None if the Lease is not the one with `lease`'s resource version any more.
    async fn write(&self, lease: &Lease) -> Result<Option<Lease>> {
        unless_conflict(self.api.replace(LEASE, &params(), lease).await)
    }

    fn spec(&self, old: &LeaseSpec, step: Step, now: Timestamp) -> LeaseSpec {
        let acquired = step == Step::Acquire;
        LeaseSpec {
            holder_identity: Some(self.identity.to_string()),
            lease_duration_seconds: i32::try_from(self.times.valid.as_secs()).ok(),
            renew_time: Some(MicroTime(now)),
            acquire_time: if acquired {
                Some(MicroTime(now))
            } else {
                old.acquire_time.clone()
            },
            lease_transitions: Some(old.lease_transitions.unwrap_or(0) + i32::from(acquired)),
            ..LeaseSpec::default()
        }
    }
}

impl View {
    /// What to do with `lease`, whose read was complete at `now`.
    fn step(&mut self, lease: &Lease, identity: &str, times: Times, now: Instant) -> Step {
        let spec = lease.spec.clone().unwrap_or_default();
        let since = match &self.seen {
            Some((seen, since)) if *seen == spec => *since,
            _ => now,
        };
        let seconds = spec.lease_duration_seconds;
        let valid = seconds.and_then(|seconds| u64::try_from(seconds).ok());
        let valid = valid.map_or(times.valid, Duration::from_secs);
        let holder = holder(Some(&spec));
        let step = if holder == identity {
            Step::Renew
        } else if holder.is_empty() || now.duration_since(since) >= valid {
            Step::Acquire
        } else {
            Step::Wait
        };
        self.seen = Some((spec, since));
        step
    }
}

impl Times {
    /// A leader that has not renewed the Lease for this long steps down.
    fn unrenewed_max(self) -> Duration {
        self.valid * 2 / 3
    }

    /// When an attempt that starts `now` is given up: well before the Lease expires, and no later than a leader
    /// steps down. A busy API server or node is a more frequent reason for a late response than a lost connection, so
    /// one attempt has the whole time from a leader's next renewal to its end.
    fn limit(self, now: Instant, leads_until: Option<Instant>) -> Instant {
        let limit = now + self.valid * 2 / 5;
        leads_until.map_or(limit, |until| until.min(limit))
    }

    /// Until the next attempt: a write each quarter of the duration while this replica leads, a read each
    /// tenth while it waits, or when an attempt has failed. A random tenth more keeps replicas apart.
    fn pause(self, renewed: bool, now: Instant, leads_until: Option<Instant>) -> Duration {
        let pause = self.valid / if renewed { 4 } else { 10 };
        let jittered = pause + pause * rand::random_range(0..=100) / 1000;
        let left = leads_until.map(|until| until.duration_since(now));
        left.map_or(jittered, |left| left.min(jittered))
    }
}

fn holder(spec: Option<&LeaseSpec>) -> &str {
    let holder = spec.and_then(|spec| spec.holder_identity.as_deref());
    holder.unwrap_or_default()
}

fn params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

/// None when another replica has written, created or deleted the Lease meanwhile.
fn unless_conflict(outcome: kube::Result<Lease>) -> Result<Option<Lease>> {
    match outcome {
        Ok(lease) => Ok(Some(lease)),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
        Err(error) => Err(error).context("write the Lease"),
    }
}

/// The first of several failures in a row is a warning.
fn report(error: &anyhow::Error, again: bool) {
    let (error, text) = (format!("{error:#}"), "leader election fails");
    if again {
        tracing::debug!(error, text);
    } else {
        tracing::warn!(error, text);
    }
}

fn publish(leading_tx: &watch::Sender<bool>, leading: bool) {
    leading_tx.send_if_modified(|present| {
        let changed = *present != leading;
        if changed {
            tracing::info!(leading, "leadership changed");
        }
        *present = leading;
        changed
    });
}

const LEASE: &str = "bascule-operator";

#[cfg(test)]
mod tests;
