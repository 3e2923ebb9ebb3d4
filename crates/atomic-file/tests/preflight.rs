//! Failures of the commit that `open` detects.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::Path;

use atomic_file::{AtomicWriter, Obstacle, OpenError};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rstest::rstest;
use support::obstacles::{Attribute, Swap};
use support::{assert_names, commit, dir_with_old};
use test_machine::needs;

#[track_caller]
fn obstacle(dest: &Path) -> Obstacle {
    match AtomicWriter::open(dest).unwrap_err() {
        OpenError::CannotReplace { obstacle, .. } => obstacle,
        other => panic!("another error: {other:?}"),
    }
}

#[rstest]
#[case::immutable("i", "dest", Obstacle::Immutable)]
#[case::append_only("a", "dest", Obstacle::AppendOnly)]
#[case::in_an_immutable_directory("i", "", Obstacle::ImmutableDirectory)]
#[case::in_an_append_only_directory("a", "", Obstacle::AppendOnlyDirectory)]
fn attributes_that_forbid_a_rename_are_found_at_open(
    #[case] attribute: &'static str,
    #[case] of: &str,
    #[case] expected: Obstacle,
) {
    const TEST: &str = "attributes_that_forbid_a_rename_are_found_at_open";
    needs!(Root);
    let (dir, dest) = dir_with_old();
    let Some(set) = Attribute::set(attribute, &dir.path().join(of)) else {
        return test_machine::not_run(TEST, "no chattr, or a file system without attributes");
    };
    assert_eq!(obstacle(&dest), expected);
    drop(set);
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn an_append_only_staging_directory_is_found_at_open() {
    const TEST: &str = "an_append_only_staging_directory_is_found_at_open";
    needs!(Root);
    let (dir, dest) = dir_with_old();
    let staging = dir.path().join("staging");
    fs::create_dir(&staging).unwrap();
    let Some(set) = Attribute::set("a", &staging) else {
        return test_machine::not_run(TEST, "no chattr, or a file system without attributes");
    };
    let error = AtomicWriter::options().staging_dir(&staging).open(&dest);
    assert!(
        matches!(
            error,
            Err(OpenError::CannotReplace {
                obstacle: Obstacle::AppendOnlyDirectory,
                ..
            })
        ),
        "{error:?}"
    );
    drop(set);
    assert_names(&staging, &[]);
}

#[test]
fn a_mount_point_is_found_at_open() {
    needs!(Root);
    let (dir, dest) = dir_with_old();
    let other = dir.path().join("other");
    fs::write(&other, "other").unwrap();
    mount(
        Some(&other),
        &dest,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .unwrap();
    let found = std::panic::catch_unwind(|| obstacle(&dest));
    umount2(&dest, MntFlags::MNT_DETACH).unwrap();
    assert_eq!(found.unwrap(), Obstacle::MountPoint);
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
}

const OTHER_USER: u32 = 12345;

/// Runs `job` on a thread with that user's file system IDs.
fn as_other_user<T: Send>(job: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let other_user = scope.spawn(|| {
            setfsgid(Gid::from_raw(OTHER_USER));
            setfsuid(Uid::from_raw(OTHER_USER));
            job()
        });
        other_user.join().unwrap()
    })
}

/// Root and the owners may replace files that the sticky bit protects.
#[test]
fn a_sticky_directory_is_found_at_open() {
    needs!(Root);
    let (dir, dest) = dir_with_old();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    let owner = OTHER_USER + 1;
    chown(&dest, Some(owner), None).unwrap();
    as_other_user(|| {
        assert_eq!(obstacle(&dest), Obstacle::OthersInStickyDirectory { owner });
        commit(&AtomicWriter::options(), &dir.path().join("own"), b"new").unwrap();
        commit(&AtomicWriter::options(), &dir.path().join("own"), b"newer").unwrap();
    });
    // This does not apply without the sticky bit, to the directory's owner, or to root.
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    as_other_user(|| commit(&AtomicWriter::options(), &dest, b"new").unwrap());
    chown(&dest, Some(owner), None).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1755)).unwrap();
    chown(dir.path(), Some(OTHER_USER), None).unwrap();
    as_other_user(|| commit(&AtomicWriter::options(), &dest, b"newer").unwrap());
    chown(&dest, Some(owner), None).unwrap();
    commit(&AtomicWriter::options(), &dest, b"newest").unwrap();
}

#[test]
fn a_directory_without_write_permission_is_named_at_open() {
    needs!(Root);
    let (dir, dest) = dir_with_old();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let error = as_other_user(|| AtomicWriter::open(&dest).unwrap_err());
    let OpenError::NotWritable {
        dir: named, source, ..
    } = error
    else {
        panic!("another error: {error:?}");
    };
    assert_eq!(named, dir.path());
    assert_eq!(source.kind(), std::io::ErrorKind::PermissionDenied);
}

#[test]
fn a_name_that_is_too_long_is_found_at_open() {
    let dir = tempfile::tempdir().unwrap();
    let name = |len| dir.path().join("x".repeat(len));
    let error = AtomicWriter::open(name(256)).unwrap_err();
    let OpenError::Io { source, .. } = error else {
        panic!("another error: {error:?}");
    };
    assert_eq!(source.kind(), std::io::ErrorKind::InvalidFilename);
    commit(&AtomicWriter::options(), &name(255), b"new").unwrap();
}

/// The kernel drops the bit silently.
#[test]
fn a_set_group_id_bit_that_cannot_be_set_is_found_at_open() {
    needs!(Root);
    let (dir, dest) = dir_with_old();
    fs::remove_file(&dest).unwrap();
    // New files there have the directory's group, and the other user is not a member of it.
    chown(dir.path(), Some(OTHER_USER), Some(OTHER_USER + 1)).unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o2755)).unwrap();
    let mode = |mode| AtomicWriter::options().mode(mode);
    as_other_user(|| {
        let error = mode(0o2750).open(&dest).unwrap_err();
        assert!(matches!(error, OpenError::Io { .. }), "{error:?}");
        commit(&mode(0o750), &dest, b"new").unwrap();
    });
    assert_eq!(fs::metadata(&dest).unwrap().mode() & 0o7777, 0o750);
    assert_names(dir.path(), &["dest"]);
}

/// The kernel drops set-id bits at the first write.
#[rstest]
#[case(0o4711)]
#[case(0o2750)]
#[case(0o6555)]
#[case(0o444)]
#[case(0o000)]
fn a_file_has_its_mode_after_the_last_write(#[case] mode: u32, #[values(false, true)] group: bool) {
    needs!(Root);
    let dir = tempfile::tempdir().unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let dest = dir.path().join("dest");
    as_other_user(|| {
        let writer = AtomicWriter::options().mode(mode).open(&dest).unwrap();
        // Direct I/O reopens the file like this.
        let again = fs::File::options().write(true).open(writer.staged_path());
        again.expect("its owner may write to it until the commit");
        writer.write_all_at(b"new", 0).unwrap();
        support::commit_writer(writer, group);
    });
    assert_eq!(fs::metadata(&dest).unwrap().mode() & 0o7777, mode);
}

#[test]
fn swap_space_in_use_is_found_at_open() {
    const TEST: &str = "swap_space_in_use_is_found_at_open";
    needs!(Root);
    let dir = tempfile::tempdir().unwrap();
    // The kernel escapes these characters in octal.
    let dest = dir.path().join("a swap\\file");
    let Some(swap) = Swap::enable(&dest) else {
        return test_machine::not_run(TEST, "no swap space in files here");
    };
    assert_eq!(obstacle(&dest), Obstacle::Swap);
    drop(swap);
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
}

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    use nix::sys::resource::{Resource, setrlimit};
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    let hard = nix::sys::resource::getrlimit(Resource::RLIMIT_NOFILE)
        .unwrap()
        .1;
    let lowest = fs::File::open("/dev/null").unwrap();
    let lowest = std::os::fd::AsRawFd::as_raw_fd(&lowest) as u64;
    let mut said = Vec::new();
    for room in 0..8 {
        setrlimit(Resource::RLIMIT_NOFILE, lowest + room, hard).unwrap();
        if job == "few descriptors for a group" {
            said.push(match support::group(&dir, &["dest"], "new") {
                Err(_) => "not opened".to_owned(),
                Ok(group) => support::group_state_of(group.commit()),
            });
            continue;
        }
        let opened = AtomicWriter::open(&dest);
        said.push(match opened {
            Err(error) => error.to_string(),
            Ok(writer) => match writer.commit() {
                Ok(()) => "committed".to_owned(),
                Err(error) => format!("late: {error}"),
            },
        });
    }
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
    println!("\nREPORT {}", said.join("|"));
}

#[test]
fn too_few_descriptors_are_found_at_open() {
    let (dir, _) = dir_with_old();
    let said = support::report(support::command("few descriptors", dir.path())).unwrap();
    let said: Vec<_> = said.split('|').collect();
    assert!(said[0].contains("cannot open the directory"), "{said:?}");
    let is_of_the_listing = |said: &&str| said.contains("cannot list the directory");
    assert!(said.iter().any(is_of_the_listing), "{said:?}");
    assert_eq!(said.last(), Some(&"committed"));
    for said in said {
        assert!(!said.contains("group"), "{said}");
        assert!(!said.contains("late"), "{said}");
    }
    assert_names(dir.path(), &["dest"]);
}

/// `open` does not reserve the descriptors of a group commit.
#[test]
fn a_group_with_too_few_descriptors_replaces_nothing() {
    let (dir, dest) = dir_with_old();
    let job = support::command("few descriptors for a group", dir.path());
    let said = support::report(job).unwrap();
    let mut said: Vec<_> = said.split('|').collect();
    said.dedup();
    assert_eq!(said, ["not opened", "not replaced", "ok"]);
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_names(dir.path(), &["dest"]);
}
