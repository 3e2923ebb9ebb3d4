//! Destinations that become irreplaceable between `open` and the commit.
#![cfg(target_os = "linux")]

mod support;

use std::fs;
use std::os::unix::fs::chown;

use atomic_file::{AtomicWriter, CommitError, CommitStep, GroupCommitError, recover};
use rstest::rstest;
use support::hostile::{MEMBERS, OTHER_USER, Place, as_other_user, set_mode, staged_files};
use support::obstacles::{REFUSED_BY_THE_KERNEL, obstruct};
use support::{Held, assert_names, same_text};
use test_machine::needs;

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((_, dir)) = support::job() else {
        return;
    };
    support::traced(&dir, || {
        let group = support::group(&dir, &MEMBERS, "new").unwrap();
        support::group_state_of(group.commit())
    });
}

/// A directory that all users may write to, with files of the other user.
fn place() -> Place {
    let place = Place::new(0o777);
    for name in MEMBERS {
        let path = place.path("dir").join(name);
        fs::write(&path, "old").unwrap();
        set_mode(&path, 0o644);
        chown(&path, Some(OTHER_USER), Some(OTHER_USER)).unwrap();
    }
    place
}

fn not_run(test: &str, how: &str) {
    test_machine::not_run(test, &format!("no file can be {how} here"));
}

#[rstest]
fn a_group_with_an_irreplaceable_member_replaces_nothing(
    #[values(0, 1, 2, 3, 4, 5, 6, 7, 8, 9)] state: usize,
    #[values(0, 1)] member: usize,
) {
    const TEST: &str = "a_group_with_an_irreplaceable_member_replaces_nothing";
    needs!(Root);
    let states = [&REFUSED_BY_THE_KERNEL[..], &["a FIFO", "a socket"]].concat();
    let how = states[state];
    let place = place();
    let dir = place.path("dir");
    let group = as_other_user(|| support::group(&dir, &MEMBERS, "new").unwrap());
    let Some(obstruction) = obstruct(&dir.join(MEMBERS[member]), how) else {
        return not_run(TEST, how);
    };
    let error = as_other_user(|| group.commit()).unwrap_err();
    let GroupCommitError::NothingReplaced {
        step,
        path,
        leftovers,
        ..
    } = &error
    else {
        panic!("another error: {how}: {error:?}");
    };
    drop(obstruction);
    let other = dir.join(MEMBERS[1 - member]);
    assert_eq!(fs::read(&other).unwrap(), b"old");
    // No record is left that would block the other member.
    assert!(support::records(&dir).is_empty());
    let report = as_other_user(|| recover(&dir)).unwrap();
    assert!(report.completed.is_empty());
    as_other_user(|| support::commit(&AtomicWriter::options(), &other, b"newer")).unwrap();
    if !how.contains("directory") || how == "a directory" {
        assert_eq!(*step, CommitStep::Destination, "{how}");
        assert_eq!(*path, dir.join(MEMBERS[member]), "{how}");
        assert!(leftovers.is_empty(), "{leftovers:?}");
        assert_names(&dir, &MEMBERS);
    }
}

/// The record is written and synced by then.
#[rstest]
fn a_group_is_checked_right_before_it_is_published(
    #[values("immutable", "a mount point", "a FIFO")] how: &str,
) {
    const TEST: &str = "a_group_is_checked_right_before_it_is_published";
    const SYNC_OF_THE_RECORD: usize = MEMBERS.len() + 1;
    needs!(Root, Strace);
    let place = place();
    let dir = place.path("dir");
    let mut held = Held::start("group", &dir, "fsync", "delay_exit", SYNC_OF_THE_RECORD);
    held.wait_for_calls("fsync", SYNC_OF_THE_RECORD);
    let Some(obstruction) = obstruct(&dir.join(MEMBERS[1]), how) else {
        return not_run(TEST, how);
    };
    assert_eq!(held.release().as_deref(), Some("not replaced"));
    drop(obstruction);
    assert_eq!(same_text(&dir, &MEMBERS[..1]), "old");
    assert_names(&dir, &MEMBERS);
    support::commit(&AtomicWriter::options(), &dir.join(MEMBERS[0]), b"newer").unwrap();
}

/// Another user who may remove the staged file of a member cannot tear the group.
#[test]
fn a_group_without_a_staged_file_replaces_nothing() {
    needs!(Root, Strace);
    let place = place();
    let dir = place.path("dir");
    let sync_of_the_record = MEMBERS.len() + 1;
    let mut held = Held::start("group", &dir, "fsync", "delay_exit", sync_of_the_record);
    held.wait_for_calls("fsync", sync_of_the_record);
    let staged = staged_files(&place);
    assert_eq!(
        staged.len(),
        MEMBERS.len() + 1,
        "and the record: {staged:?}"
    );
    for file in staged
        .iter()
        .filter(|file| file.to_string_lossy().ends_with(".stage"))
    {
        fs::remove_file(file).unwrap();
    }
    assert_eq!(held.release().as_deref(), Some("not replaced"));
    assert_eq!(same_text(&dir, &MEMBERS), "old");
    assert_names(&dir, &MEMBERS);
}

#[rstest]
fn a_commit_onto_an_irreplaceable_file_replaces_nothing(
    #[values(0, 1, 2, 3, 4, 5, 6, 7)] state: usize,
    #[values(0, 1 << 20)] recycle: u64,
) {
    const TEST: &str = "a_commit_onto_an_irreplaceable_file_replaces_nothing";
    needs!(Root);
    let how = REFUSED_BY_THE_KERNEL[state];
    let place = place();
    let dir = place.path("dir");
    let dest = dir.join(MEMBERS[0]);
    let options = AtomicWriter::options().recycle(recycle);
    let writer = as_other_user(|| options.open(&dest)).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    let Some(obstruction) = obstruct(&dest, how) else {
        return not_run(TEST, how);
    };
    let error = as_other_user(|| writer.commit()).unwrap_err();
    let not_replaced = matches!(error, CommitError::NotReplaced { .. });
    assert!(not_replaced, "{how}: {error:?}");
    drop(obstruction);
    match how {
        "swap space" | "a directory" => {}
        _ => assert_eq!(fs::read(&dest).unwrap(), b"old"),
    }
    if !how.starts_with("in an") {
        assert_names(&dir, &MEMBERS);
    }
}

#[rstest]
fn a_destination_that_became_a_special_file_is_kept(
    #[values(false, true)] fifo: bool,
    #[values(false, true)] existed: bool,
    #[values(false, true)] recycle: bool,
) {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    if existed {
        fs::write(&dest, "old").unwrap();
    }
    let mut options = AtomicWriter::options();
    if recycle {
        options = options.recycle(1 << 20);
    }
    let writer = options.open(&dest).unwrap();
    if existed {
        fs::remove_file(&dest).unwrap();
    }
    if fifo {
        nix::unistd::mkfifo(&dest, nix::sys::stat::Mode::S_IRWXU).unwrap();
    } else {
        drop(std::os::unix::net::UnixListener::bind(&dest).unwrap());
    }
    let before = fs::symlink_metadata(&dest).unwrap().file_type();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            &error,
            CommitError::NotReplaced {
                step: CommitStep::Destination,
                leftover: None,
                source,
                ..
            } if source.to_string().contains("FIFO or socket")
        ),
        "{error:?}"
    );
    assert_eq!(fs::symlink_metadata(&dest).unwrap().file_type(), before);
    assert_names(dir.path(), &["dest"]);
}
