//! A replaced file with preserved attributes grants no user more than before.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs;
use std::io::ErrorKind;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use atomic_file::{AtomicWriter, OpenError, Preserve};
use nix::errno::Errno;
use nix::libc;
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rstest::rstest;
use support::{assert_names, commit, dir_with_old};
use test_machine::needs;

const OWNER: u32 = 12345;
const GROUP: u32 = 23456;
const ACL: &str = "system.posix_acl_access";

/// Runs `job` on a thread with these file system IDs.
fn as_user<T: Send>(user: u32, group: u32, job: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            setfsgid(Gid::from_raw(group));
            setfsuid(Uid::from_raw(user));
            job()
        });
        user.join().unwrap()
    })
}

/// A list with these permissions of user `OWNER + 1`, the file's group, group `GROUP + 1`, the mask
/// and others.
fn list(user: u16, members: u16, group: u16, mask: u16, others: u16) -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (0x01u16, 6u16, NO_ID),
        (0x02, user, OWNER + 1),
        (0x04, members, NO_ID),
        (0x08, group, GROUP + 1),
        (0x10, mask, NO_ID),
        (0x20, others, NO_ID),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

/// What each of several users may do with a file: (user, group, may read, may write).
fn access(path: &Path) -> Vec<(u32, u32, bool, bool)> {
    let users = [OWNER, OWNER + 1, OWNER + 3];
    let groups = [OWNER + 2, GROUP, GROUP + 1, GROUP + 2];
    let mut found = Vec::new();
    for (user, group) in users
        .iter()
        .flat_map(|user| groups.map(|group| (*user, group)))
    {
        let open = |options: &fs::OpenOptions| options.open(path).is_ok();
        let [reads, writes] = as_user(user, group, || {
            let mut options = fs::OpenOptions::new();
            [
                open(options.read(true)),
                open(options.read(false).write(true)),
            ]
        });
        found.push((user, group, reads, writes));
    }
    found
}

/// The writer is the directory's owner `OWNER + 2`, who cannot keep the owner, the group or both.
#[rstest]
#[case::mode(None, &[0o604, 0o640, 0o644, 0o624, 0o646, 0o464, 0o066, 0o666, 0o060, 0o006])]
#[case::user_denied(Some((0, 6, 6, 6)), &[0o664, 0o646, 0o666])]
#[case::members_denied(Some((6, 0, 6, 6)), &[0o664, 0o646, 0o666])]
#[case::group_denied(Some((6, 6, 0, 6)), &[0o664, 0o646, 0o666])]
#[case::masked(Some((6, 6, 6, 4)), &[0o646, 0o666])]
fn no_user_gains_access_by_a_replacement(
    #[case] acl: Option<(u16, u16, u16, u16)>,
    #[case] modes: &[u32],
    #[values(Preserve::all(), Preserve::all().acl(false), Preserve::nothing().mode(true))]
    preserve: Preserve,
    #[values(OWNER, OWNER + 2)] owner: u32,
    #[values(OWNER + 2, GROUP)] group: u32,
) {
    const TEST: &str = "no_user_gains_access_by_a_replacement";
    needs!(Root);
    let (dir, dest) = dir_with_old();
    if xattr::set(&dest, ACL, &list(6, 6, 6, 6, 6)).is_err() {
        return test_machine::not_run(TEST, "a file system without lists");
    }
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    chown(dir.path(), Some(OWNER + 2), None).unwrap();
    for &mode in modes {
        fs::remove_file(&dest).unwrap();
        fs::write(&dest, "old").unwrap();
        chown(&dest, Some(owner), Some(group)).unwrap();
        fs::set_permissions(&dest, fs::Permissions::from_mode(mode)).unwrap();
        if let Some((user, members, other, mask)) = acl {
            let others = (mode & 0o7) as u16;
            xattr::set(&dest, ACL, &list(user, members, other, mask, others)).unwrap();
        }
        let before = access(&dest);
        let options = AtomicWriter::options().preserve(preserve.if_permitted(true));
        as_user(OWNER + 2, OWNER + 2, || {
            commit(&options, &dest, b"new").unwrap()
        });
        for (old, new) in before.iter().zip(access(&dest)) {
            assert!(
                (old.2 || !new.2) && (old.3 || !new.3),
                "{mode:o} became {:o}: {old:?} became {new:?}",
                fs::metadata(&dest).unwrap().mode() & 0o7777
            );
        }
        assert_eq!(fs::read(&dest).unwrap(), b"new");
    }
    assert_names(dir.path(), &["dest"]);
}

/// Takes a write lease, which makes other programs wait to open the file.
fn lease(file: &fs::File) {
    /// Linux's `include/uapi/asm-generic/fcntl.h`; libc has no constant for it.
    const F_SETSIG: libc::c_int = 10;
    let write = libc::c_int::from(libc::F_WRLCK);
    // The default signal of a broken lease would end this process.
    for (command, argument) in [(F_SETSIG, libc::SIGURG), (libc::F_SETLEASE, write)] {
        // SAFETY: the commands take an integer and no memory.
        let set = unsafe { libc::fcntl(file.as_raw_fd(), command, argument) };
        Errno::result(set).unwrap();
    }
}

#[test]
fn a_lease_on_the_old_file_is_named() {
    let dir = test_machine::recycling_dir();
    let dest = dir.path().join("dest");
    fs::write(&dest, "old").unwrap();
    let file = fs::File::options().read(true).write(true).open(&dest);
    let file = file.unwrap();
    lease(&file);
    let options = AtomicWriter::options().preserve(Preserve::all().if_permitted(true));
    let error = options.open(&dest).unwrap_err();
    let OpenError::NotPreserved { source, .. } = &error else {
        panic!("another error: {error:?}");
    };
    assert_eq!(source.source.kind(), ErrorKind::WouldBlock);
    let text = source.source.to_string();
    assert!(text.contains("lease"), "{text}");
    drop(file);
    commit(&options, &dest, b"new").unwrap();
    assert_names(dir.path(), &["dest"]);
}
