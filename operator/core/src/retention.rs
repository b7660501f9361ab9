//! Which closed records are kept: the newest of every virtual machine, and no more.
//!
//! VirtualMachineMigrations and Failovers say what happened. Without a bound a cluster that moves
//! its guests every night fills etcd with them.

use crate::Moment;

/// A record that has come to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClosedRecord {
    /// What it is a record of.
    pub kind: RecordKind,
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
    /// The VirtualMachine; none when that does not exist any more.
    pub vm: Option<String>,
    /// When it was made.
    pub created: Moment,
}

/// What a record is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum RecordKind {
    /// A VirtualMachineMigration.
    Migration,
    /// A Failover.
    Failover,
}

/// The records that are to go: of each kind the newest [`RECORDS_KEPT`] of every virtual machine
/// stay, and as many in every namespace of virtual machines that are gone.
#[must_use]
pub fn expired(mut closed: Vec<ClosedRecord>) -> Vec<ClosedRecord> {
    closed.sort_by(|a, b| {
        let group =
            |record: &ClosedRecord| (record.kind, record.namespace.clone(), record.vm.clone());
        (group(a), b.created, &b.name).cmp(&(group(b), a.created, &a.name))
    });
    let mut expired = vec![];
    let groups =
        closed.chunk_by(|a, b| (a.kind, &a.namespace, &a.vm) == (b.kind, &b.namespace, &b.vm));
    for group in groups {
        expired.extend(group.iter().skip(RECORDS_KEPT).cloned());
    }
    expired
}

/// More than a person reads, and far more than the four attempts that one drain makes, which the
/// drain's own decisions count.
pub const RECORDS_KEPT: usize = 20;

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: RecordKind, vm: Option<&str>, n: u64) -> ClosedRecord {
        ClosedRecord {
            kind,
            namespace: "shop".to_owned(),
            name: format!("{}-{n:03}", vm.unwrap_or("gone")),
            uid: n.to_string(),
            vm: vm.map(str::to_owned),
            created: Moment(n),
        }
    }

    fn many(kind: RecordKind, vm: Option<&str>, count: u64) -> Vec<ClosedRecord> {
        (0..count).map(|n| record(kind, vm, n)).collect()
    }

    #[test]
    fn the_newest_of_every_virtual_machine_and_kind_are_kept() {
        let mut closed = many(RecordKind::Migration, Some("web"), 23);
        closed.extend(many(RecordKind::Failover, Some("web"), 20));
        closed.extend(many(RecordKind::Migration, Some("db"), 5));
        closed.reverse();
        let names: Vec<String> = expired(closed).into_iter().map(|r| r.name).collect();
        assert_eq!(names, ["web-002", "web-001", "web-000"]);
    }

    #[test]
    fn those_of_deleted_virtual_machines_share_one_allowance() {
        let mut closed = many(RecordKind::Migration, None, 21);
        let mut elsewhere = record(RecordKind::Migration, None, 0);
        elsewhere.namespace = "lab".to_owned();
        closed.push(elsewhere);
        let gone = expired(closed);
        assert_eq!(gone.len(), 1);
        assert_eq!(
            (gone[0].created, gone[0].namespace.as_str()),
            (Moment(0), "shop")
        );
    }

    #[test]
    fn what_goes_does_not_depend_on_the_order_of_a_list() {
        // Whole seconds are all that creation times have: the name decides between equals.
        let mut closed: Vec<ClosedRecord> = (0..25)
            .map(|n| ClosedRecord {
                created: Moment(1),
                ..record(RecordKind::Failover, Some("web"), n)
            })
            .collect();
        let one = expired(closed.clone());
        closed.reverse();
        assert_eq!(expired(closed), one);
        assert_eq!(one.len(), 5);
    }
}
