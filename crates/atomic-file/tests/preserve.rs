//! Preservation of attributes.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use atomic_file::{AtomicWriter, Attribute, OpenError, Preserve};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rstest::rstest;
use support::{assert_names, commit, dir_with_old};
use test_machine::{Need, needs};

const OWNER: u32 = 12345;
const GROUP: u32 = 23456;
const NOTE: &str = "user.note";
const ACL: &str = "system.posix_acl_access";

/// Runs `job` on a thread with that user's file system IDs.
fn as_user<T: Send>(uid: u32, job: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let user = scope.spawn(|| {
            setfsgid(Gid::from_raw(uid));
            setfsuid(Uid::from_raw(uid));
            job()
        });
        user.join().unwrap()
    })
}

/// `u::rw-,u:12346:rw-,g::---,m::rw-,o::---`, as Linux's `posix_acl_xattr.h` has it.
fn acl() -> Vec<u8> {
    const NO_ID: u32 = u32::MAX;
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in [
        (0x01u16, 6u16, NO_ID),
        (0x02, 6, OWNER + 1),
        (0x04, 0, NO_ID),
        (0x10, 6, NO_ID),
        (0x20, 0, NO_ID),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Creates `dest` with all attributes in a directory of user `OWNER + 2`. Returns `None` if the
/// file system does not support all of them.
fn with_attributes(test: &str) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    if !Need::Root.met(test) {
        return None;
    }
    let (dir, dest) = dir_with_old();
    chown(&dest, Some(OWNER), Some(GROUP)).unwrap();
    let set = xattr::set(&dest, NOTE, b"mine").and_then(|()| xattr::set(&dest, ACL, &acl()));
    if set.is_err() {
        test_machine::not_run(test, "a file system without attributes and lists");
        return None;
    }
    set_mode(dir.path(), 0o755);
    chown(dir.path(), Some(OWNER + 2), None).unwrap();
    Some((dir, dest))
}

#[derive(Debug, PartialEq)]
struct Found {
    owner: u32,
    group: u32,
    mode: u32,
    acl: bool,
    note: bool,
}

fn found(dest: &Path) -> Found {
    let stat = fs::metadata(dest).unwrap();
    let has = |name| xattr::get(dest, name).unwrap().is_some();
    Found {
        owner: stat.uid(),
        group: stat.gid(),
        mode: stat.mode() & 0o7777,
        acl: has(ACL),
        note: has(NOTE),
    }
}

#[rstest]
fn everything_is_preserved_on_request(#[values(false, true)] group: bool) {
    let Some((dir, dest)) = with_attributes("everything_is_preserved_on_request") else {
        return;
    };
    set_mode(&dest, 0o6771);
    let before = found(&dest);
    let acl_before = xattr::get(&dest, ACL).unwrap();
    let writer = AtomicWriter::options()
        .preserve(Preserve::all())
        .open(&dest)
        .unwrap();
    assert!(writer.not_preserved().is_empty());
    let staged = fs::metadata(writer.staged_path()).unwrap();
    assert_eq!(
        (staged.uid(), staged.mode() & 0o7777),
        (0, 0o600),
        "not yet"
    );
    writer.write_all_at(b"new", 0).unwrap();
    support::commit_writer(writer, group);
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_eq!(found(&dest), before);
    assert_eq!(xattr::get(&dest, ACL).unwrap(), acl_before);
    assert_names(dir.path(), &["dest"]);
}

#[rstest]
#[case::nothing(Preserve::nothing(), (0, 0, 0o600, false, false))]
#[case::owner(Preserve::nothing().owner(true), (OWNER, 0, 0o600, false, false))]
#[case::group(Preserve::nothing().group(true), (0, GROUP, 0o600, false, false))]
// The group bits belonged to the list and to another group.
#[case::mode(Preserve::nothing().mode(true), (0, 0, 0o600, false, false))]
#[case::xattrs(Preserve::nothing().xattrs(true), (0, 0, 0o600, false, true))]
#[case::all_but_the_mode(Preserve::all().mode(false), (OWNER, GROUP, 0o600, true, true))]
#[case::all_but_the_list(Preserve::all().acl(false), (OWNER, GROUP, 0o600, false, true))]
fn only_what_is_asked_for_is_preserved(
    #[case] preserve: Preserve,
    #[case] (owner, group, mode, acl, note): (u32, u32, u32, bool, bool),
) {
    let Some((_dir, dest)) = with_attributes("only_what_is_asked_for_is_preserved") else {
        return;
    };
    commit(&AtomicWriter::options().preserve(preserve), &dest, b"new").unwrap();
    let expected = Found {
        owner,
        group,
        mode,
        acl,
        note,
    };
    assert_eq!(found(&dest), expected);
}

/// The directory's owner may only replace the file.
#[test]
fn open_fails_if_preserving_is_not_permitted() {
    const TEST: &str = "open_fails_if_preserving_is_not_permitted";
    let Some((dir, dest)) = with_attributes(TEST) else {
        return;
    };
    set_mode(&dest, 0o664);
    let before = found(&dest);
    for (preserve, expected) in [
        (Preserve::all(), Attribute::Group),
        (Preserve::nothing().owner(true), Attribute::Owner),
        (Preserve::nothing().group(true), Attribute::Group),
    ] {
        let options = AtomicWriter::options().preserve(preserve);
        let error = as_user(OWNER + 2, || options.open(&dest).unwrap_err());
        let OpenError::NotPreserved { source, .. } = error else {
            panic!("another error: {error:?}");
        };
        assert_eq!(source.attribute, expected);
    }
    assert_eq!(found(&dest), before);
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn if_permitted_omits_and_reports_attributes() {
    const TEST: &str = "if_permitted_omits_and_reports_attributes";
    let Some((_dir, dest)) = with_attributes(TEST) else {
        return;
    };
    set_mode(&dest, 0o6775);
    let uid = OWNER + 2;
    as_user(uid, || {
        let preserve = Preserve::all().if_permitted(true);
        let writer = AtomicWriter::options()
            .preserve(preserve)
            .open(&dest)
            .unwrap();
        let lost: Vec<_> = writer
            .not_preserved()
            .iter()
            .map(|lost| &lost.attribute)
            .collect();
        assert_eq!(lost, [&Attribute::Group, &Attribute::Owner]);
        writer.commit().unwrap();
    });
    let after = found(&dest);
    assert_eq!((after.owner, after.group), (uid, uid));
    assert_eq!(
        after.mode, 0o750,
        "neither set-id bit, for the group what all others had, for others what the group had"
    );
    assert!(after.acl && after.note);
}

/// The writer cannot read the attributes of a file without read permission.
#[test]
fn attributes_that_cannot_be_read_are_named() {
    let Some((_dir, dest)) = with_attributes("attributes_that_cannot_be_read_are_named") else {
        return;
    };
    set_mode(&dest, 0o600);
    as_user(OWNER + 2, || {
        let preserve = Preserve::nothing().xattrs(true);
        let error = AtomicWriter::options()
            .preserve(preserve)
            .open(&dest)
            .unwrap_err();
        assert!(
            matches!(
                &error,
                OpenError::NotPreserved { source, .. } if source.attribute == Attribute::Xattrs
            ),
            "{error:?}"
        );
    });
}

/// The attributes at the time of the commit are preserved.
#[test]
fn a_mode_changed_after_open_is_preserved() {
    let (_dir, dest) = dir_with_old();
    let preserve = AtomicWriter::options().preserve(Preserve::nothing().mode(true));
    let writer = preserve.open(&dest).unwrap();
    set_mode(&dest, 0o440);
    writer.commit().unwrap();
    assert_eq!(fs::metadata(&dest).unwrap().mode() & 0o7777, 0o440);
}

#[test]
fn a_new_destination_preserves_nothing() {
    let (dir, _) = dir_with_old();
    let new = dir.path().join("new");
    let options = AtomicWriter::options()
        .preserve(Preserve::all())
        .mode(0o640);
    commit(&options, &new, b"new").unwrap();
    assert_eq!(fs::metadata(&new).unwrap().mode() & 0o7777, 0o640);
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    commit(
        &options.symlinks(atomic_file::Symlinks::Replace),
        &link,
        b"new",
    )
    .unwrap();
    assert_eq!(fs::metadata(&link).unwrap().mode() & 0o7777, 0o640);
}

/// New files in this directory inherit a list.
#[test]
fn a_file_without_an_acl_is_replaced_by_one_without() {
    const TEST: &str = "a_file_without_an_acl_is_replaced_by_one_without";
    needs!(Root);
    let (dir, dest) = dir_with_old();
    set_mode(&dest, 0o640);
    if xattr::set(dir.path(), "system.posix_acl_default", &acl()).is_err() {
        return test_machine::not_run(TEST, "a file system without lists");
    }
    let preserve = AtomicWriter::options().preserve(Preserve::all());
    commit(&preserve, &dest, b"new").unwrap();
    assert!(!found(&dest).acl);
    assert_eq!(found(&dest).mode, 0o640);
}

/// The inherited list would apply the group bits to other users.
#[rstest]
#[case::preserved(Preserve::nothing().mode(true), 0o600)]
#[case::preserved_with_the_group(Preserve::nothing().mode(true).group(true), 0o600)]
#[case::asked_for(Preserve::nothing(), 0o640)]
fn an_inherited_acl_does_not_extend_the_mode(#[case] preserve: Preserve, #[case] mode: u32) {
    const TEST: &str = "an_inherited_acl_does_not_extend_the_mode";
    needs!(Root);
    let (dir, dest) = dir_with_old();
    set_mode(&dest, 0o640);
    set_mode(dir.path(), 0o755);
    if xattr::set(dir.path(), "system.posix_acl_default", &acl()).is_err() {
        return test_machine::not_run(TEST, "a file system without lists");
    }
    let options = AtomicWriter::options().preserve(preserve).mode(mode);
    commit(&options, &dest, b"new").unwrap();
    assert_eq!(found(&dest).mode, 0o640);
    assert!(!found(&dest).acl);
    let listed = as_user(OWNER + 1, || fs::read(&dest));
    assert_eq!(
        listed.unwrap_err().kind(),
        std::io::ErrorKind::PermissionDenied
    );
}

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((_, dir)) = support::job() else {
        return;
    };
    support::traced(&dir, || {
        let preserve = Preserve::all().if_permitted(true);
        let options = AtomicWriter::options().preserve(preserve);
        support::replace(&options, &dir.join("dest"))
    });
}

/// The destination is replaced between the commit's `stat` and `open`.
#[test]
fn replacing_the_destination_does_not_fail_if_permitted() {
    needs!(Strace);
    let (dir, dest) = dir_with_old();
    let log = tempfile::NamedTempFile::new().unwrap();
    let path = log.path().to_str().unwrap();
    let args = ["-o", path, "-e", "trace=openat"];
    let done = support::under_strace("preserve", dir.path(), &args);
    assert_eq!(done.as_deref(), Some("ok"));
    // The number of the call in its thread.
    let calls = fs::read_to_string(path).unwrap();
    let of_thread = |line: &str| line.split(' ').next().unwrap().to_owned();
    let opens = |line: &str| line.contains("\"dest\", O_RDONLY");
    let last = calls.lines().rfind(|line| opens(line)).unwrap();
    let thread = of_thread(last);
    let calls: Vec<_> = calls
        .lines()
        .filter(|line| of_thread(line) == thread)
        .collect();
    let opened = calls.iter().filter(|line| opens(line)).count();
    let number = calls.iter().rposition(|line| opens(line)).unwrap() + 1;

    let mut held = support::Held::start("preserve", dir.path(), "openat", "delay_enter", number);
    held.wait_for_calls("\"dest\", O_RDONLY", opened);
    commit(&AtomicWriter::options(), &dest, b"other writer").unwrap();
    assert_eq!(held.release().as_deref(), Some("ok"));
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_eq!(fs::metadata(&dest).unwrap().mode() & 0o7777, 0o600);
}
