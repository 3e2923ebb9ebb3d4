//! Access control lists, which are extended attributes.

use std::ffi::OsStr;
use std::fs::File;
use std::io;

use xattr::FileExt as _;

use crate::acl::{Acl, PosixAcl};
use crate::sys::copy_xattr;

/// Returns whether an extended attribute is an access control list.
pub(crate) fn is_acl(name: &OsStr) -> bool {
    ACLS.iter().any(|acl| name == *acl)
}

/// The lists of POSIX and of NFS version 4.
const ACLS: [&str; 2] = ["system.posix_acl_access", "system.nfs4_acl"];

/// Returns the access control list of `file`.
pub(crate) fn acl_of(file: &File) -> io::Result<Acl> {
    let [posix, nfs4] = ACLS.map(|name| match file.get_xattr(name) {
        // The file system does not support such lists.
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(None),
        result => result,
    });
    Ok(match (posix?, nfs4?) {
        (Some(list), _) => PosixAcl::decode(&list).map_or(Acl::Unknown, Acl::Posix),
        // Over NFS version 4, every file has a list. Most have the entries of the mode only.
        (None, Some(list)) if !has_entries_of_mode_only(&list) => Acl::Unknown,
        (None, _) => Acl::Absent,
    })
}

/// Returns whether a list of NFS version 4 has only entries for the owner, the group and everyone.
///
/// RFC 7530, section 6.2.1: the number of entries, and for each of them its type, flags, mask, and
/// the length and text of the name, padded to 4 bytes. All numbers are big-endian.
fn has_entries_of_mode_only(list: &[u8]) -> bool {
    fn number(rest: &mut &[u8]) -> Option<u32> {
        let (number, tail) = rest.split_first_chunk()?;
        *rest = tail;
        Some(u32::from_be_bytes(*number))
    }
    let all = || {
        let mut rest = list;
        for _ in 0..number(&mut rest)? {
            for _type_flags_mask in 0..3 {
                number(&mut rest)?;
            }
            let length = number(&mut rest)? as usize;
            let name = rest.get(..length)?;
            if !matches!(name, b"OWNER@" | b"GROUP@" | b"EVERYONE@") {
                return Some(false);
            }
            rest = rest.get(length.next_multiple_of(4)..)?;
        }
        Some(true)
    };
    all().unwrap_or(false)
}

/// Copies the access control list of `from`, which is `list`, to `to`, with the permission bits of
/// `mode`. Removes it if `from` has none.
pub(crate) fn copy_acl(from: &File, list: &Acl, to: &File, mode: u32) -> io::Result<()> {
    if let Acl::Posix(list) = list {
        return to.set_xattr(ACLS[0], &list.with_mode(mode).encode());
    }
    for acl in ACLS {
        match copy_xattr(from, to, OsStr::new(acl)) {
            // The file system does not support such lists.
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            result => result?,
        }
    }
    Ok(())
}

/// Removes the access control list that a file inherited from its directory.
pub(crate) fn remove_acl(file: &File) -> io::Result<()> {
    let list = ACLS[0];
    match file.get_xattr(list) {
        Ok(Some(_)) => file.remove_xattr(list),
        Ok(None) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    /// Otherwise the list would grant its own permissions until the mode is set.
    #[test]
    fn a_list_is_copied_with_the_bits_of_the_mode() {
        let [old, new] = [(); 2].map(|()| tempfile::tempfile().unwrap());
        let list = crate::acl::tests::list(4, 6, 6);
        if old.set_xattr(ACLS[0], &list.encode()).is_err() {
            return test_machine::not_run(
                "a_list_is_copied_with_the_bits_of_the_mode",
                "a file system without lists",
            );
        }
        let found = acl_of(&old).unwrap();
        assert_eq!(found, Acl::Posix(list));
        copy_acl(&old, &found, &new, 0o610).unwrap();
        assert_eq!(crate::stat::stat_of(&new).unwrap().mode & 0o7777, 0o610);
        assert_eq!(acl_of(&new).unwrap().grants(0).members, 0);
    }

    #[rstest]
    #[case::of_the_mode(&["OWNER@", "GROUP@", "EVERYONE@"], true)]
    #[case::denies_a_user(&["OWNER@", "guest@example.org", "GROUP@", "EVERYONE@"], false)]
    #[case::empty(&[], true)]
    fn lists_of_nfs_are_compared_with_the_mode(#[case] names: &[&str], #[case] of_mode: bool) {
        let mut list = (names.len() as u32).to_be_bytes().to_vec();
        for name in names {
            list.extend([0; 12]);
            list.extend((name.len() as u32).to_be_bytes());
            list.extend(name.as_bytes());
            list.resize(list.len().next_multiple_of(4), 0);
        }
        assert_eq!(has_entries_of_mode_only(&list), of_mode);
        assert!(!has_entries_of_mode_only(&list[..list.len() - 1]), "cut");
    }
}
