//! Leader election through a `coordination.k8s.io` Lease. It is an optimisation, not a safety mechanism:
//! ownership is decided on the volumes, so two leaders at once duplicate load, events and log lines, and
//! never a guest. Not related to the storage lease of a node on a volume.

use std::time::Duration;

use anyhow::{Context, Result};
use bascule_crds::names::FIELD_MANAGER;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;

/// One replica's candidacy.
#[derive(Debug)]
pub(crate) struct Election {
    api: Api<Lease>,
    identity: String,
    valid: Duration,
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
            identity: identity.to_owned(),
            valid,
        }
    }

    /// Acquires and renews until dropped; publishes in `leading_tx` whether this replica leads.
    /// Measured by its own clock, it steps down after two thirds of the lease duration without a
    /// renewal, before another replica may acquire the Lease.
    pub(crate) async fn run(self, leading_tx: watch::Sender<bool>) {
        let mut renewed = tokio::time::Instant::now();
        loop {
            let started = tokio::time::Instant::now();
            match tokio::time::timeout(self.valid / 3, self.attempt()).await {
                Ok(Ok(true)) => {
                    renewed = started;
                    set(&leading_tx, true);
                }
                Ok(Ok(false)) => set(&leading_tx, false),
                Ok(Err(error)) => tracing::warn!(
                    error = format!("{error:#}"),
                    "cannot renew the leader election Lease"
                ),
                Err(_) => tracing::warn!(
                    "cannot renew the leader election Lease: the API server does not respond"
                ),
            }
            if renewed.elapsed() >= self.valid * 2 / 3 {
                set(&leading_tx, false);
            }
            tokio::time::sleep(self.valid / 5).await;
        }
    }

    async fn attempt(&self) -> Result<bool> {
        let now = crate::clock::timestamp();
        let Some(mut lease) = self.api.get_opt(LEASE).await.context("read the Lease")? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(LEASE.to_owned()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(&LeaseSpec::default(), Step::Acquire, now)),
            };
            return won(self.api.create(&params(), &lease).await);
        };
        let spec = lease.spec.take().unwrap_or_default();
        let step = self.step(&spec, now);
        if step == Step::Wait {
            return Ok(false);
        }
        lease.spec = Some(self.spec(&spec, step, now));
        // The resource version makes this fail with 409 if another replica wrote the Lease since.
        won(self.api.replace(LEASE, &params(), &lease).await)
    }

    fn step(&self, spec: &LeaseSpec, now: Timestamp) -> Step {
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        if holder == self.identity {
            return Step::Renew;
        }
        let seconds = i64::from(spec.lease_duration_seconds.unwrap_or(0));
        let expired = spec
            .renew_time
            .as_ref()
            .is_none_or(|at| now.as_second() > at.0.as_second().saturating_add(seconds));
        if holder.is_empty() || expired {
            Step::Acquire
        } else {
            Step::Wait
        }
    }

    fn spec(&self, old: &LeaseSpec, step: Step, now: Timestamp) -> LeaseSpec {
        let acquired = step == Step::Acquire;
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.valid.as_secs()).ok(),
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

fn params() -> PostParams {
    PostParams {
        field_manager: Some(FIELD_MANAGER.to_owned()),
        ..PostParams::default()
    }
}

fn won(outcome: kube::Result<Lease>) -> Result<bool> {
    match outcome {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 409 => Ok(false),
        Err(error) => Err(error).context("write the Lease"),
    }
}

fn set(leading_tx: &watch::Sender<bool>, leading: bool) {
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
mod tests {
    use super::*;

    fn election() -> Election {
        let (service, _) = tower_test::mock::pair::<
            http::Request<kube::client::Body>,
            http::Response<kube::client::Body>,
        >();
        let client = Client::new(service, "default");
        Election::new(client, "bascule-system", "a", Duration::from_secs(15))
    }

    fn held_by(who: &str, seconds_ago: i64, now: Timestamp) -> LeaseSpec {
        let at = Timestamp::from_second(now.as_second() - seconds_ago).unwrap();
        LeaseSpec {
            holder_identity: Some(who.to_owned()),
            lease_duration_seconds: Some(15),
            renew_time: Some(MicroTime(at)),
            ..LeaseSpec::default()
        }
    }

    #[tokio::test]
    async fn a_lease_is_acquired_only_after_it_has_expired() {
        let now = Timestamp::now();
        let election = election();
        assert_eq!(election.step(&held_by("b", 3, now), now), Step::Wait);
        assert_eq!(election.step(&held_by("b", 16, now), now), Step::Acquire);
        assert_eq!(election.step(&held_by("a", 3, now), now), Step::Renew);
        assert_eq!(election.step(&held_by("", 3, now), now), Step::Acquire);
        assert_eq!(election.step(&LeaseSpec::default(), now), Step::Acquire);
    }

    #[tokio::test]
    async fn a_change_of_holder_increments_lease_transitions() {
        let now = Timestamp::now();
        let old = LeaseSpec {
            lease_transitions: Some(3),
            ..held_by("b", 16, now)
        };
        let election = election();
        assert_eq!(
            election.spec(&old, Step::Acquire, now).lease_transitions,
            Some(4)
        );
        assert_eq!(
            election.spec(&old, Step::Renew, now).lease_transitions,
            Some(3)
        );
    }
}
