//! Permissions of directories.

use std::io;
use std::os::fd::AsFd;

use crate::stat::{Stat, stat_of};

/// Returns whether users other than the owner of `dir` and root may create files in it.
///
/// They may if the mode grants write permission to all users or to the group. Every group counts as
/// other users, also the owner's private group and that of root: the system's lists of users and
/// groups do not name all processes that have a group. A process may have the group as its primary
/// one, without a name, in a container, or by a password of the group. If the directory has an
/// access control list of POSIX, the group bits are the upper bound of its entries.
///
/// This crate applies this rule to decide which links are followed, which group records are
/// trusted, and which replaced files are a source of attributes. A directory that a umask of 002
/// made writable for its owner's group is private again after `chmod g-w`. The access control lists
/// of macOS are not checked.
///
/// # Errors
/// Returns the errors of `fstat(2)`.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// let dir = std::fs::File::open(dir.path())?;
/// assert!(!atomic_file::others_may_write(&dir)?, "a temporary directory is its owner's");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn others_may_write(dir: impl AsFd) -> io::Result<bool> {
    Ok(others_may_create(&stat_of(dir)?))
}

pub(crate) fn others_may_create(dir: &Stat) -> bool {
    const GROUP_OR_OTHERS_WRITE: u32 = 0o022;
    dir.mode & GROUP_OR_OTHERS_WRITE != 0
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, fchown};

    use super::*;
    use rstest::rstest;
    use test_machine::needs;

    /// Users and groups without names.
    const USER: u32 = 812_345;
    const GROUP: u32 = 823_456;

    fn directory(mode: u32) -> (tempfile::TempDir, File) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), Permissions::from_mode(mode)).unwrap();
        let open = File::open(dir.path()).unwrap();
        (dir, open)
    }

    #[rstest]
    #[case::owner_only(0o700, USER, GROUP, false)]
    #[case::others_read(0o755, USER, GROUP, false)]
    #[case::a_group_writes(0o775, USER, GROUP, true)]
    #[case::a_group_writes_and_names_are_protected(0o3775, USER, GROUP, true)]
    #[case::a_group_writes_to_a_directory_of_root(0o2775, 0, GROUP, true)]
    #[case::the_owners_own_group_writes(0o775, USER, USER, true)]
    #[case::the_own_group_of_a_user_with_a_name_writes(0o775, 1, 1, true)]
    #[case::the_group_of_root_writes(0o775, USER, 0, true)]
    #[case::the_group_of_root_writes_to_a_directory_of_root(0o775, 0, 0, true)]
    #[case::all_but_the_group_write(0o757, USER, USER, true)]
    #[case::all_write(0o1777, 0, 0, true)]
    fn others_may_write_by_mode_of_group_or_all(
        #[case] mode: u32,
        #[case] owner: u32,
        #[case] group: u32,
        #[case] expected: bool,
    ) {
        needs!(Root);
        let (_dir, open) = directory(0o700);
        fchown(&open, Some(owner), Some(group)).unwrap();
        open.set_permissions(Permissions::from_mode(mode)).unwrap();
        assert_eq!(others_may_write(&open).unwrap(), expected);
    }

    /// With a list, the group bits are the upper bound of all its entries.
    #[test]
    #[cfg(target_os = "linux")]
    fn an_acl_makes_group_bits_apply_to_other_users() {
        const TEST: &str = "an_acl_makes_group_bits_apply_to_other_users";
        /// `u::rwx,u:12345:rwx,g::r-x,m::rwx,o::---`, as Linux's `posix_acl_xattr.h` has it.
        const LIST: &[(u16, u16, u32)] = &[
            (0x01, 7, u32::MAX),
            (0x02, 7, 12345),
            (0x04, 5, u32::MAX),
            (0x10, 7, u32::MAX),
            (0x20, 0, u32::MAX),
        ];
        needs!(Root);
        let (dir, open) = directory(0o700);
        fchown(&open, Some(USER), Some(USER)).unwrap();
        assert!(!others_may_write(&open).unwrap());
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in LIST {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        let list = "system.posix_acl_access";
        if xattr::set(dir.path() as &std::path::Path, list, &bytes).is_err() {
            return test_machine::not_run(TEST, "a file system without lists");
        }
        assert!(others_may_write(&open).unwrap());
    }
}
