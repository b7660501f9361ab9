//! The records of the reservation pods that the operator has made, in the status of their VirtualMachine,
//! which tenants may not write.
//!
//! A record is written after its pod was made. An operator that ends in between leaves a pod without a record,
//! which the next one deletes (`bascule_operator_core::ForeignPod`).

use std::collections::BTreeSet;
use std::time::Duration;

use bascule_crds::{ReservationStatus, VirtualMachine};
use bascule_operator_core::{Moment, Purpose, ReservationRecord, SpecDigest};

/// The records of this VM: of this operator's memory, and those in the status that another one has left.
/// `pods` are the UIDs of the pods that exist.
///
/// A record outlives its pod only where its digest is still needed: it is that of the guest's spec until another
/// reservation was made for the guest.
pub(crate) fn known(
    vm: &VirtualMachine,
    memory: &[ReservationRecord],
    pods: &BTreeSet<String>,
    now: Moment,
) -> Vec<ReservationRecord> {
    let mut records = memory.to_vec();
    let status = vm.status.iter().flat_map(|status| &status.reservations);
    for recorded in status.filter_map(from_status) {
        if records.iter().all(|record| record.uid != recorded.uid) {
            records.push(recorded);
        }
    }
    // A pod that was made a moment ago may not have come with the watch yet.
    let lives = |record: &ReservationRecord| {
        pods.contains(&record.uid) || now.since(record.made) < WATCH_LATENCY_MAX
    };
    let current = records.iter().filter(|r| r.purpose == Purpose::Current);
    let last = current.max_by_key(|record| (lives(record), record.made));
    let last = last.map(|record| record.uid.clone());
    records.retain(|record| lives(record) || Some(&record.uid) == last.as_ref());
    records.sort_by(|a, b| (&a.name, &a.uid).cmp(&(&b.name, &b.uid)));
    records
}

/// The records as the status holds them.
pub(crate) fn status(records: &[ReservationRecord]) -> Vec<ReservationStatus> {
    let status = |record: &ReservationRecord| ReservationStatus {
        name: record.name.clone(),
        uid: record.uid.clone(),
        migration: match &record.purpose {
            Purpose::Current => None,
            Purpose::Migration(name) => Some(name.clone()),
        },
        spec_digest: hex(record.digest),
    };
    records.iter().map(status).collect()
}

/// None for a digest that is not one: no operator wrote it.
fn from_status(status: &ReservationStatus) -> Option<ReservationRecord> {
    Some(ReservationRecord {
        uid: status.uid.clone(),
        name: status.name.clone(),
        purpose: match &status.migration {
            None => Purpose::Current,
            Some(name) => Purpose::Migration(name.clone()),
        },
        digest: unhex(&status.spec_digest)?,
        made: Moment(0),
    })
}

fn hex(digest: SpecDigest) -> String {
    digest.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<SpecDigest> {
    let mut digest = [0; 32];
    for (n, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * n..2 * n + 2)?, 16).ok()?;
    }
    Some(SpecDigest(digest))
}

/// Far longer than a watch event takes.
const WATCH_LATENCY_MAX: Duration = Duration::from_secs(60);

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str, purpose: Purpose, made: u64) -> ReservationRecord {
        ReservationRecord {
            uid: uid.to_owned(),
            name: format!("web-e1-{uid}"),
            purpose,
            digest: SpecDigest([u8::try_from(made % 256).unwrap(); 32]),
            made: Moment(made),
        }
    }

    fn vm(records: &[ReservationRecord]) -> VirtualMachine {
        let mut vm: VirtualMachine = serde_json::from_value(serde_json::json!({
            "apiVersion": "bascule.dev/v1alpha1",
            "kind": "VirtualMachine",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {
                "memory": "512Mi", "volume": "san", "boot": {"kernel": {"hostFile": {"name": "k"}}},
            },
        }))
        .unwrap();
        vm.status = Some(bascule_crds::VirtualMachineStatus {
            reservations: status(records),
            ..Default::default()
        });
        vm
    }

    fn uids(records: &[ReservationRecord]) -> Vec<&str> {
        records.iter().map(|record| record.uid.as_str()).collect()
    }

    fn pods(uids: &[&str]) -> BTreeSet<String> {
        uids.iter().map(|&uid| uid.to_owned()).collect()
    }

    const LATER: Moment = Moment(1_000_000);

    #[test]
    fn records_round_trip_through_the_status() {
        let migration = Purpose::Migration("go".to_owned());
        let all = [record("a", Purpose::Current, 0), record("b", migration, 0)];
        let read = known(&vm(&all), &[], &pods(&["a", "b"]), LATER);
        assert_eq!(read, all);
    }

    /// A status that was read before the pod of a migration became that of the guest.
    #[test]
    fn the_operators_memory_is_newer_than_the_status() {
        let old = record("a", Purpose::Migration("go".to_owned()), 0);
        let promoted = record("a", Purpose::Current, 0);
        let read = known(
            &vm(&[old]),
            std::slice::from_ref(&promoted),
            &pods(&["a"]),
            LATER,
        );
        assert_eq!(read, [promoted]);
    }

    #[test]
    fn a_pod_that_was_just_made_is_not_forgotten_before_the_watch_brings_it() {
        let made = record("a", Purpose::Migration("go".to_owned()), LATER.0);
        let memory = std::slice::from_ref(&made);
        let soon = known(&vm(&[]), memory, &pods(&[]), Moment(LATER.0 + 1_000));
        assert_eq!(uids(&soon), ["a"]);
        let late = known(&vm(&[]), memory, &pods(&[]), Moment(LATER.0 + 60_000));
        assert!(late.is_empty());
    }

    /// The guest runs with the spec of its first reservation, also when a tenant deletes the pod.
    #[test]
    fn the_digest_of_a_guests_spec_outlives_its_pod_until_another_reservation_was_made() {
        let gone = record("a", Purpose::Current, 7);
        let read = known(&vm(std::slice::from_ref(&gone)), &[], &pods(&[]), LATER);
        assert_eq!((uids(&read), read[0].digest), (vec!["a"], gone.digest));
        let again = record("b", Purpose::Current, LATER.0 - 1);
        let read = known(&vm(&[gone]), &[again], &pods(&["b"]), LATER);
        assert_eq!(uids(&read), ["b"]);
    }
}
