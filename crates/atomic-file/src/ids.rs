//! Ids of users and groups, and whether two are the same.
//!
//! In a user namespace, `stat(2)` reports every owner that the namespace does not map as the same
//! id, the overflow id, which the namespace may also map to a user of its own. Two equal ids may
//! then be two users. So the ids here have no `==`.

use std::fmt;

/// A user, as `stat(2)` reports it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct UserId(u32);

/// A group, as `stat(2)` reports it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct GroupId(u32);

impl UserId {
    pub(crate) const ROOT: Self = Self(0);

    pub(crate) fn new(id: u32) -> Self {
        Self(id)
    }

    /// Returns whether both are certainly the same user.
    pub(crate) fn is(self, other: Self) -> bool {
        self.0 == other.0 && self.is_mapped()
    }

    pub(crate) fn is_any_of(self, others: &[Self]) -> bool {
        others.iter().any(|other| self.is(*other))
    }

    /// Returns whether the id certainly stands for one user.
    pub(crate) fn is_mapped(self) -> bool {
        !platform::may_be_unmapped(self.0, &platform::USERS)
    }

    /// Returns the id for system calls and messages. Not for comparing users.
    pub(crate) fn raw(self) -> u32 {
        self.0
    }
}

impl GroupId {
    pub(crate) fn new(id: u32) -> Self {
        Self(id)
    }

    /// Returns whether both are certainly the same group.
    pub(crate) fn is(self, other: Self) -> bool {
        self.0 == other.0 && self.is_mapped()
    }

    /// Returns whether the id certainly stands for one group.
    pub(crate) fn is_mapped(self) -> bool {
        !platform::may_be_unmapped(self.0, &platform::GROUPS)
    }

    /// Returns the id for system calls and messages. Not for comparing groups.
    pub(crate) fn raw(self) -> u32 {
        self.0
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "user {}", self.0)?;
        if !self.is_mapped() {
            f.write_str(", which stands for all users that this user namespace does not map")?;
        }
        Ok(())
    }
}

/// Returns whether two user ids, reported by `stat(2)` or `geteuid(2)`, certainly belong to the
/// same user.
///
/// In a user namespace of Linux, every user that the namespace does not map has the same id, the
/// overflow id (`/proc/sys/kernel/overflowuid`, by default 65534). Therefore the function returns
/// `false` for two overflow ids, even if the namespace maps that id, unless the namespace maps all
/// users. This crate compares all owners this way.
///
/// # Examples
/// ```
/// assert!(atomic_file::is_same_user(0, 0));
/// assert!(!atomic_file::is_same_user(0, 1000));
/// ```
#[must_use]
pub fn is_same_user(one: u32, other: u32) -> bool {
    UserId(one).is(UserId(other))
}

#[cfg(any(target_os = "linux", target_os = "android"))]
mod platform {
    use std::fs::read_to_string;
    use std::io::ErrorKind;
    use std::path::Path;
    use std::sync::OnceLock;

    pub(super) struct Kind {
        overflow: OnceLock<u32>,
        overflow_path: &'static str,
        map_path: &'static str,
    }

    pub(super) static USERS: Kind = Kind {
        overflow: OnceLock::new(),
        overflow_path: "/proc/sys/kernel/overflowuid",
        map_path: "/proc/self/uid_map",
    };

    pub(super) static GROUPS: Kind = Kind {
        overflow: OnceLock::new(),
        overflow_path: "/proc/sys/kernel/overflowgid",
        map_path: "/proc/self/gid_map",
    };

    /// Returns whether an id may stand for users or groups that the namespace does not map.
    pub(super) fn may_be_unmapped(id: u32, kind: &Kind) -> bool {
        // The map is read each time: a child of this process may enter another namespace.
        id == kind.overflow() && !maps_all(kind)
    }

    /// Returns whether this process's user namespace maps every id.
    fn maps_all(kind: &Kind) -> bool {
        match read_to_string(kind.map_path) {
            Ok(map) => covers_all(&map),
            // A kernel without user namespaces.
            Err(error) => error.kind() == ErrorKind::NotFound && Path::new("/proc/self").exists(),
        }
    }

    impl Kind {
        fn overflow(&self) -> u32 {
            /// The defaults of Linux's `include/linux/highuid.h`.
            const DEFAULT: u32 = 65534;
            *self.overflow.get_or_init(|| {
                let found = read_to_string(self.overflow_path).ok();
                found.map_or(DEFAULT, |id| id.trim().parse().unwrap_or(DEFAULT))
            })
        }
    }

    /// Returns whether a map of `user_namespaces(7)` covers all ids. Its ranges do not overlap.
    pub(super) fn covers_all(map: &str) -> bool {
        let length = |line: &str| line.split_whitespace().nth(2)?.parse::<u64>().ok();
        let mapped: u64 = map.lines().filter_map(length).sum();
        // The highest number is no id.
        mapped >= u64::from(u32::MAX)
    }
}

/// Other systems have no user namespaces.
#[cfg(not(any(target_os = "linux", target_os = "android")))]
mod platform {
    pub(super) struct Kind;

    pub(super) static USERS: Kind = Kind;
    pub(super) static GROUPS: Kind = Kind;

    pub(super) fn may_be_unmapped(_: u32, _: &Kind) -> bool {
        false
    }
}

#[cfg(test)]
#[cfg(any(target_os = "linux", target_os = "android"))]
mod tests {
    use rstest::rstest;

    use super::is_same_user;
    use super::platform::covers_all;

    #[rstest]
    #[case::all("         0          0 4294967295\n", true)]
    #[case::all_in_two_ranges("0 5 5\n5 0 4294967290\n", true)]
    #[case::one_user("0 1000 1\n", false)]
    #[case::a_container("0 100000 65536\n", false)]
    #[case::the_overflow_id("0 12345 1\n65534 165534 1\n", false)]
    #[case::not_written_yet("", false)]
    fn only_a_map_of_all_ids_makes_the_overflow_id_unambiguous(
        #[case] map: &str,
        #[case] all: bool,
    ) {
        assert_eq!(covers_all(map), all);
    }

    #[test]
    fn the_overflow_id_is_one_user_only_where_all_are_mapped() {
        let read = |path| std::fs::read_to_string(path).unwrap();
        let overflow = read("/proc/sys/kernel/overflowuid").trim().parse().unwrap();
        let all_are_mapped = covers_all(&read("/proc/self/uid_map"));
        assert_eq!(is_same_user(overflow, overflow), all_are_mapped);
    }
}
