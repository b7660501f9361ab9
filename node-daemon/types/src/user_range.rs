//! A range of user and group ids, as an administrator sets it aside.

use std::fmt;
use std::str::FromStr;

/// The ids from the first to the last, both included. Written `2000000000-2000065535`. The first one is a group that all
/// have in common, each further one a user and its main group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UserRange {
    first: u32,
    last: u32,
}

/// A text that is no range of user ids.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("expected FIRST-LAST, two ids between 1 and 4294967294, e.g. 2000000000-2000065535")]
pub struct ParseUserRangeError;

impl UserRange {
    /// Ids that neither systemd ("Users, Groups, UIDs and GIDs on systemd Systems"), nor OpenShift (1000000000 to
    /// 1999999999), nor the kubelet's user namespaces (from 65536 on) give away.
    pub const VMS: Self = Self {
        first: 2_000_000_000,
        last: 2_000_065_535,
    };

    /// From `first` on one group and `users` (at least one) users.
    #[must_use]
    pub const fn of(first: u32, users: u32) -> Self {
        let users = if users == 0 { 1 } else { users };
        Self {
            first,
            last: first.saturating_add(users),
        }
    }

    /// The group that all users have in common.
    #[must_use]
    pub const fn shared_group(self) -> u32 {
        self.first
    }

    /// Whether `id` is one of the users.
    #[must_use]
    pub const fn has_user(self, id: u32) -> bool {
        self.first < id && id <= self.last
    }

    /// Each user once, from the one on that `seed` falls on.
    pub fn users_from(self, seed: u32) -> impl Iterator<Item = u32> {
        let count = self.last - self.first;
        let begin = seed % count;
        let turns = (begin..count).chain(0..begin);
        turns.map(move |turn| self.first + 1 + turn)
    }
}

impl FromStr for UserRange {
    type Err = ParseUserRangeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let ids = text.split_once('-').and_then(|(first, last)| {
            let (first, last) = (first.parse().ok()?, last.parse().ok()?);
            // 0 is root, and the last id stands for none (setresuid(2)).
            (0 < first && first < last && last < u32::MAX).then_some(Self { first, last })
        });
        ids.ok_or(ParseUserRangeError)
    }
}

impl fmt::Display for UserRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.first, self.last)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_has_two_ids_at_least_and_neither_roots_nor_the_last_one() {
        assert_eq!(UserRange::VMS.to_string().parse(), Ok(UserRange::VMS));
        for bad in ["", "5", "5-5", "6-5", "0-5", "5-4294967295", "a-b"] {
            assert_eq!(bad.parse::<UserRange>(), Err(ParseUserRangeError), "{bad}");
        }
    }

    #[test]
    fn every_user_comes_once_from_any_seed_and_the_group_is_none_of_them() {
        let range = UserRange::of(3000, 3);
        for (seed, expected) in [
            (0, [3001, 3002, 3003]),
            (5, [3003, 3001, 3002]),
            (u32::MAX, [3001, 3002, 3003]),
        ] {
            assert_eq!(range.users_from(seed).collect::<Vec<_>>(), expected);
        }
        assert!(!range.has_user(range.shared_group()));
        assert!(range.has_user(3003) && !range.has_user(3004));
    }
}
