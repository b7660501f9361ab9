use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};
use tower_test::mock::Handle;

use super::*;

type Api = Handle<Request<Body>, Response<Body>>;

const TIMES: Times = Times {
    valid: Duration::from_secs(5),
};

fn election() -> (Election, Api) {
    let (service, api) = tower_test::mock::pair();
    let client = Client::new(service, "default");
    (
        Election::new(client, "bascule-system", "a", TIMES.valid),
        api,
    )
}

fn lease(holder: &str, renewed: &str) -> Lease {
    serde_json::from_value(document(holder, renewed)).unwrap()
}

fn document(holder: &str, renewed: &str) -> Value {
    json!({
        "apiVersion": "coordination.k8s.io/v1", "kind": "Lease",
        "metadata": {"name": LEASE, "resourceVersion": "7"},
        "spec": {
            "holderIdentity": holder, "leaseDurationSeconds": 5, "leaseTransitions": 3,
            "renewTime": format!("2026-01-01T00:00:{renewed}.000000Z"),
        },
    })
}

/// Answers the next request; returns its method and its body.
async fn answer(api: &mut Api, code: u16, body: Value) -> (String, Value) {
    let (request, send) = api.next_request().await.unwrap();
    let method = request.method().to_string();
    let sent = request.into_body().collect_bytes().await.unwrap();
    let response = Response::builder().status(code);
    let response = response.body(Body::from(body.to_string().into_bytes()));
    send.send_response(response.unwrap());
    (method, serde_json::from_slice(&sent).unwrap_or_default())
}

fn conflict() -> Value {
    json!({"kind": "Status", "status": "Failure", "code": 409, "reason": "Conflict", "message": "no"})
}

#[test]
fn a_lease_is_acquired_only_when_it_has_not_changed_for_its_duration() {
    let mut view = View::default();
    let start = Instant::now();
    let after = |seconds| start + Duration::from_secs(seconds);
    let mut step = |lease: &Lease, now| view.step(lease, "a", TIMES, now);
    // However old its renewal looks, by a clock that may be wrong.
    assert_eq!(step(&lease("b", "01"), start), Step::Wait);
    assert_eq!(step(&lease("b", "01"), after(4)), Step::Wait);
    assert_eq!(step(&lease("b", "02"), after(6)), Step::Wait);
    assert_eq!(step(&lease("b", "02"), after(10)), Step::Wait);
    assert_eq!(step(&lease("b", "02"), after(11)), Step::Acquire);
    assert_eq!(step(&lease("a", "02"), after(12)), Step::Renew);
    assert_eq!(step(&lease("c", "02"), after(13)), Step::Wait);
    assert_eq!(step(&lease("", "02"), after(13)), Step::Acquire);
}

/// During an upgrade, replicas with different durations meet.
#[test]
fn the_duration_that_counts_is_the_holders() {
    let mut view = View::default();
    let start = Instant::now();
    let mut held = lease("b", "01");
    held.spec.as_mut().unwrap().lease_duration_seconds = Some(15);
    view.step(&held, "a", TIMES, start);
    let after = |seconds| start + Duration::from_secs(seconds);
    assert_eq!(view.step(&held, "a", TIMES, after(14)), Step::Wait);
    assert_eq!(view.step(&held, "a", TIMES, after(15)), Step::Acquire);
}

#[test]
fn a_leader_steps_down_before_another_replica_may_acquire_the_lease() {
    let renewed = Instant::now();
    let until = renewed + TIMES.unrenewed_max();
    assert!(until < renewed + TIMES.valid);
    // Neither an attempt nor a pause outlasts that moment.
    for tenths in 0..33 {
        let now = renewed + Duration::from_millis(100 * tenths);
        assert!(TIMES.limit(now, Some(until)) <= until);
        assert!(now + TIMES.pause(false, now, Some(until)) <= until);
        assert!(now + TIMES.pause(true, now, Some(until)) <= until);
    }
    // The renewal that is due has almost the whole rest of that time.
    let due = renewed + TIMES.pause(true, renewed, Some(until));
    let limit = TIMES.limit(due, Some(until));
    assert!(limit.duration_since(due) + TIMES.valid / 20 >= until.duration_since(due));
    assert!(limit.duration_since(due) >= Duration::from_millis(1900));
}

#[tokio::test]
async fn a_change_of_holder_increments_lease_transitions() {
    let now = Timestamp::now();
    let old = lease("b", "01").spec.unwrap();
    let (election, _) = election();
    let transitions = |step| election.spec(&old, step, now).lease_transitions;
    assert_eq!(transitions(Step::Acquire), Some(4));
    assert_eq!(transitions(Step::Renew), Some(3));
}

#[tokio::test]
async fn a_leader_renews_with_one_request_and_reads_only_after_a_conflict() {
    let (election, mut api) = election();
    let mut view = View::default();
    let server = async {
        let (method, _) = answer(&mut api, 200, document("a", "01")).await;
        assert_eq!(method, "GET");
        for _ in 0..2 {
            let (method, sent) = answer(&mut api, 200, document("a", "02")).await;
            assert_eq!(method, "PUT");
            assert_eq!(sent["metadata"]["resourceVersion"], "7");
            assert_eq!(sent["spec"]["holderIdentity"], "a");
        }
        // Somebody has annotated it: still this replica's.
        for (expected, code, body) in [
            ("PUT", 409, conflict()),
            ("GET", 200, document("a", "02")),
            ("PUT", 200, document("a", "03")),
        ] {
            assert_eq!(answer(&mut api, code, body).await.0, expected);
        }
        // Another replica has acquired it.
        for (expected, code, body) in [("PUT", 409, conflict()), ("GET", 200, document("b", "04"))]
        {
            assert_eq!(answer(&mut api, code, body).await.0, expected);
        }
        let (method, _) = answer(&mut api, 200, document("b", "04")).await;
        assert_eq!(method, "GET");
    };
    let replica = async {
        for holds in [true, true, true, false, false] {
            assert_eq!(election.attempt(&mut view).await.unwrap(), holds);
        }
    };
    tokio::join!(server, replica);
}

/// A drain ends the leader's pod: the guests of that node must not wait for its Lease to expire.
#[tokio::test]
async fn a_leader_that_is_ended_gives_the_lease_up_and_another_replica_does_not() {
    let (election, mut api) = election();
    let server = async {
        let (method, _) = answer(&mut api, 200, document("a", "01")).await;
        assert_eq!(method, "GET");
        let (method, sent) = answer(&mut api, 200, document("", "01")).await;
        assert_eq!(method, "PUT");
        let given_up: Lease = serde_json::from_value(sent).unwrap();
        let step = View::default().step(&given_up, "b", TIMES, Instant::now());
        assert_eq!(step, Step::Acquire);
        assert_eq!(given_up.spec.unwrap().lease_transitions, Some(3));
        let (method, _) = answer(&mut api, 200, document("b", "01")).await;
        assert_eq!(method, "GET");
    };
    tokio::join!(server, async {
        election.release().await;
        election.release().await;
    });
}
