//! Who may write to a directory.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use nix::unistd::{Gid, Group, Uid, User};

use crate::directory::{Stat, stat_of};
use crate::sys;

/// Whether others than the owner of `dir` and root may create, and so plant, files in it.
///
/// They may where its mode lets everybody write, or its group, unless that group is root's or the
/// owner's private one. Private is a group of the owner's name that lists no other member; where
/// neither has a name, one with the owner's number. So a directory that a umask of 002 made
/// writable for a user's own group counts as that user's alone. Where the directory has an access
/// control list, the group's bits may stand for anybody, and it counts as others'.
///
/// This is the rule for all that this crate decides by it: which links are followed, which group
/// records are obeyed, which replaced files pass anything on. Lists of access control that macOS
/// keeps beside the mode are not looked at.
///
/// # Errors
/// Those of `fstat(2)`.
///
/// # Examples
/// ```
/// # let dir = tempfile::tempdir()?;
/// let dir = std::fs::File::open(dir.path())?;
/// assert!(!atomic_file::others_may_write(&dir)?, "a temporary directory is its owner's");
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn others_may_write(dir: impl AsFd) -> io::Result<bool> {
    let dir = dir.as_fd();
    Ok(others_may_create(dir, &stat_of(dir)?))
}

pub(crate) fn others_may_create(dir: BorrowedFd<'_>, stat: &Stat) -> bool {
    const OTHERS_WRITE: u32 = 0o002;
    const GROUP_WRITES: u32 = 0o020;
    if stat.mode & OTHERS_WRITE != 0 {
        return true;
    }
    stat.mode & GROUP_WRITES != 0 && (sys::has_acl(dir) || !is_private(stat.gid, stat.uid))
}

/// Whether nobody but root and the user `owner` is in the group `gid`, as far as its name and its list
/// of members tell.
fn is_private(gid: u32, owner: u32) -> bool {
    const ROOT: u32 = 0;
    let named = |group: &Group, name: &str| group.mem.iter().all(|member| member == name);
    let group = Group::from_gid(Gid::from_raw(gid));
    if gid == ROOT {
        return group.is_ok_and(|group| group.is_none_or(|group| named(&group, "root")));
    }
    match (User::from_uid(Uid::from_raw(owner)), group) {
        (Ok(Some(user)), Ok(Some(group))) => user.name == group.name && named(&group, &user.name),
        (Ok(None), Ok(None)) => gid == owner,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, Permissions};
    use std::os::unix::fs::{PermissionsExt as _, fchown};
    use std::path::Path;

    use super::*;
    use rstest::rstest;
    use test_machine::{Need, not_run};

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
    #[case::the_owners_own_group_writes(0o775, USER, USER, false)]
    #[case::the_group_of_root_writes(0o775, USER, 0, false)]
    #[case::all_but_the_group_write(0o757, USER, USER, true)]
    #[case::all_write(0o1777, 0, 0, true)]
    fn others_may_write_where_the_mode_or_a_shared_group_lets_them(
        #[case] mode: u32,
        #[case] owner: u32,
        #[case] group: u32,
        #[case] expected: bool,
    ) {
        if !Need::Root.met("others_may_write_where_the_mode_or_a_shared_group_lets_them") {
            return;
        }
        let (_dir, open) = directory(0o700);
        fchown(&open, Some(owner), Some(group)).unwrap();
        open.set_permissions(Permissions::from_mode(mode)).unwrap();
        assert_eq!(others_may_write(&open).unwrap(), expected);
    }

    /// The bits of the group are then the most that anyone in the list may do.
    #[test]
    #[cfg(target_os = "linux")]
    fn a_list_makes_the_bits_of_a_private_group_those_of_others() {
        const TEST: &str = "a_list_makes_the_bits_of_a_private_group_those_of_others";
        /// `u::rwx,u:12345:rwx,g::r-x,m::rwx,o::---`, as Linux's `posix_acl_xattr.h` has it.
        const LIST: &[(u16, u16, u32)] = &[
            (0x01, 7, u32::MAX),
            (0x02, 7, 12345),
            (0x04, 5, u32::MAX),
            (0x10, 7, u32::MAX),
            (0x20, 0, u32::MAX),
        ];
        if !Need::Root.met(TEST) {
            return;
        }
        let (dir, open) = directory(0o770);
        fchown(&open, Some(USER), Some(USER)).unwrap();
        assert!(!others_may_write(&open).unwrap());
        let mut bytes = 2u32.to_le_bytes().to_vec();
        for (tag, permissions, id) in LIST {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(permissions.to_le_bytes());
            bytes.extend(id.to_le_bytes());
        }
        let list = "system.posix_acl_access";
        if xattr::set(dir.path() as &Path, list, &bytes).is_err() {
            return not_run(TEST, "a file system without lists");
        }
        assert!(others_may_write(&open).unwrap());
    }
}
