//! Recovery of group commits.

mod support;

use std::fs;
use std::path::PathBuf;

use atomic_file::{AtomicWriter, CommitError, CommitStep, GroupCommitError, OpenError};
use atomic_file::{RecoverError, recover, sweep};
use rstest::rstest;
use support::groups::{FILES, die_at_rename, killed_after, old_files, staged_files, stuck};
use support::{assert_names, commit, group, names, same_text};
use test_machine::needs;

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    match job.as_str() {
        "commit" => support::traced(&dir, || match group(&dir, &FILES, "new") {
            Err(error) => format!("not opened: {error}"),
            Ok(group) => support::group_state_of(group.commit()),
        }),
        other => panic!("no such job: {other}"),
    }
}

#[rstest]
fn recover_completes_a_published_group(#[values(0, 1)] renamed: usize) {
    needs!(Strace);
    let dir = killed_after(renamed);
    let report = recover(dir.path()).unwrap();
    assert_eq!(
        (report.in_place.len(), report.completed.len()),
        (renamed, 2 - renamed)
    );
    assert_eq!(same_text(dir.path(), &FILES), "new");
    assert_names(dir.path(), &FILES);
    let again = recover(dir.path()).unwrap();
    assert!(again.completed.is_empty() && again.in_place.is_empty());
}

#[test]
fn open_completes_a_published_group() {
    needs!(Strace);
    let dir = killed_after(1);
    let writer = AtomicWriter::open(dir.path().join("third")).unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "new");
    writer.discard().unwrap();
    assert_names(dir.path(), &FILES);
}

#[test]
fn a_group_commit_completes_a_published_group() {
    needs!(Strace);
    let dir = old_files();
    // Opened before the other process dies, committed afterwards.
    let ours = group(dir.path(), &FILES, "newer").unwrap();
    die_at_rename(dir.path(), 2);
    ours.commit().unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "newer");
    assert_names(dir.path(), &FILES);
}

/// A later recovery would replace the newer file by the group's older one.
#[test]
fn a_commit_first_completes_an_interrupted_group() {
    needs!(Strace);
    let dir = old_files();
    let writer = AtomicWriter::open(dir.path().join("memory")).unwrap();
    writer.write_all_at(b"newest", 0).unwrap();
    die_at_rename(dir.path(), 1);
    writer.commit().unwrap();
    recover(dir.path()).unwrap();
    assert_eq!(fs::read(dir.path().join("memory")).unwrap(), b"newest");
    assert_eq!(fs::read(dir.path().join("vcpu")).unwrap(), b"new");
    assert_names(dir.path(), &FILES);
}

#[test]
fn a_sweep_keeps_the_files_of_a_published_group() {
    needs!(Strace);
    let dir = killed_after(0);
    let report = sweep(dir.path()).unwrap();
    assert_eq!((report.removed.len(), report.skipped.len()), (0, 2));
    recover(dir.path()).unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "new");
}

#[test]
fn a_replaced_staged_file_is_not_renamed_by_recovery() {
    needs!(Strace);
    let dir = killed_after(0);
    let staged = staged_files(dir.path()).remove(1);
    // Create the replacement first, so that it gets another inode number.
    let other = dir.path().join("other");
    fs::write(&other, "new").unwrap();
    fs::rename(&other, &staged).unwrap();
    let error = stuck(recover(dir.path()));
    let RecoverError::StageChanged {
        stage: named,
        record,
        ..
    } = error
    else {
        panic!("another error: {error:?}");
    };
    assert_eq!(
        (named, record),
        (staged.clone(), support::record(dir.path()))
    );
    assert_eq!(
        same_text(dir.path(), &FILES),
        "old",
        "nor is any other member"
    );
    assert_eq!(fs::read(&staged).unwrap(), b"new");
}

/// In a copy, no inode number matches the record, so old and new files cannot be distinguished.
#[rstest]
fn recovery_never_guesses_in_a_copied_directory(#[values(0, 1)] renamed: usize) {
    needs!(Strace);
    let dir = killed_after(renamed);
    let copy = tempfile::tempdir().unwrap();
    for name in names(dir.path()) {
        fs::copy(dir.path().join(&name), copy.path().join(&name)).unwrap();
    }
    let before = names(copy.path());
    let error = stuck(recover(copy.path()));
    assert!(
        matches!(error, RecoverError::StageChanged { .. }),
        "{error:?}"
    );
    assert_eq!(names(copy.path()), before);
}

#[test]
fn a_directory_at_a_destination_blocks_only_its_group() {
    needs!(Strace);
    let dir = killed_after(1);
    let [memory, vcpu] = FILES.map(|name| dir.path().join(name));
    fs::remove_file(&vcpu).unwrap();
    fs::create_dir(&vcpu).unwrap();
    let before = names(dir.path());
    let error = stuck(recover(dir.path()));
    assert!(
        matches!(&error, RecoverError::DestinationIsDirectory { dest, .. } if *dest == vcpu),
        "{error:?}"
    );
    assert_eq!(names(dir.path()), before);
    // Other writers continue, alone and in groups.
    commit(&AtomicWriter::options(), &dir.path().join("third"), b"new").unwrap();
    let others = group(dir.path(), &["third", "fourth"], "newer").unwrap();
    others.commit().unwrap();
    assert_eq!(same_text(dir.path(), &["third", "fourth"]), "newer");
    // Writers to its members fail until a user resolves it.
    let error = AtomicWriter::open(&memory).unwrap_err();
    assert!(
        matches!(
            &error,
            OpenError::Recover {
                source: RecoverError::DestinationIsDirectory { .. },
                ..
            }
        ),
        "{error:?}"
    );
    fs::remove_dir(&vcpu).unwrap();
    recover(dir.path()).unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "new");
}

#[test]
fn a_stuck_group_blocks_writers_opened_earlier() {
    needs!(Strace);
    let dir = old_files();
    let memory = AtomicWriter::open(dir.path().join("memory")).unwrap();
    let ours = group(dir.path(), &["memory", "third"], "ours").unwrap();
    die_at_rename(dir.path(), 1);
    fs::remove_file(dir.path().join("vcpu")).unwrap();
    fs::create_dir(dir.path().join("vcpu")).unwrap();
    let error = memory.commit().unwrap_err();
    let is_recover = |step| step == CommitStep::Recover;
    assert!(
        matches!(error, CommitError::NotReplaced { step, .. } if is_recover(step)),
        "{error:?}"
    );
    let error = ours.commit().unwrap_err();
    assert!(
        matches!(error, GroupCommitError::NothingReplaced { step, .. } if is_recover(step)),
        "{error:?}"
    );
    assert_eq!(fs::read(dir.path().join("memory")).unwrap(), b"old");
    assert!(!dir.path().join("third").exists());
}

#[test]
fn a_member_replaced_later_stays_and_is_reported() {
    needs!(Strace);
    let dir = killed_after(1);
    let newer = dir.path().join("newer");
    fs::write(&newer, "newer").unwrap();
    fs::rename(&newer, dir.path().join("memory")).unwrap();
    let report = recover(dir.path()).unwrap();
    assert_eq!(report.superseded, [dir.path().join("memory")]);
    assert_eq!(report.completed, [dir.path().join("vcpu")]);
    assert_eq!(fs::read(dir.path().join("memory")).unwrap(), b"newer");
    assert_names(dir.path(), &FILES);
}

#[test]
fn recovering_an_ordinary_directory_changes_nothing() {
    let dir = old_files();
    let report = recover(dir.path()).unwrap();
    assert!(report.completed.is_empty() && report.swept.removed.is_empty() && !report.busy);
    commit(&AtomicWriter::options(), &dir.path().join("memory"), b"new").unwrap();
    assert_names(dir.path(), &FILES);
}

/// The protocol never removes a file that a record names.
#[rstest]
fn a_missing_staged_file_is_reported(#[values(0, 1)] renamed: usize) {
    needs!(Strace);
    let dir = old_files();
    die_at_rename(dir.path(), renamed + 1);
    let [memory, vcpu] = FILES.map(|name| dir.path().join(name));
    let texts = || FILES.map(|name| fs::read_to_string(dir.path().join(name)).unwrap());
    let stage_of_vcpu = {
        let hash = format!(".atomic-file-{:08x}-", crc32fast::hash(b"vcpu"));
        let is_its = |path: &PathBuf| path.to_string_lossy().contains(&hash);
        staged_files(dir.path()).into_iter().find(is_its).unwrap()
    };
    fs::remove_file(&stage_of_vcpu).unwrap();
    let (before, left) = (texts(), names(dir.path()));
    for _ in 0..2 {
        let error = stuck(recover(dir.path()));
        let RecoverError::StagesLost {
            lost,
            staged,
            in_place,
            record,
        } = error
        else {
            panic!("another error: {error:?}");
        };
        assert_eq!(lost, std::slice::from_ref(&vcpu));
        let (new, old) = match renamed {
            0 => (vec![], vec![memory.clone()]),
            _ => (vec![memory.clone()], vec![]),
        };
        assert_eq!((in_place, staged), (new, old));
        assert_eq!(record, support::record(dir.path()));
        assert_eq!((texts(), names(dir.path())), (before.clone(), left.clone()));
    }
    // Only writers to its own destinations fail until a user resolves it.
    commit(&AtomicWriter::options(), &dir.path().join("third"), b"new").unwrap();
    let error = AtomicWriter::open(&vcpu).unwrap_err();
    assert!(matches!(error, OpenError::Recover { .. }), "{error:?}");
    // As the error text says.
    fs::write(&memory, "old").unwrap();
    fs::remove_file(support::record(dir.path())).unwrap();
    sweep(dir.path()).unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "old");
    assert_names(dir.path(), &["memory", "third", "vcpu"]);
}

#[test]
fn a_group_without_staged_files_is_abandoned() {
    needs!(Strace);
    let dir = killed_after(0);
    for staged in staged_files(dir.path()) {
        fs::remove_file(staged).unwrap();
    }
    let report = recover(dir.path()).unwrap();
    assert_eq!(report.lost, FILES.map(|name| dir.path().join(name)));
    assert!(report.superseded.is_empty() && report.completed.is_empty());
    assert_eq!(same_text(dir.path(), &FILES), "old");
    assert_names(dir.path(), &FILES);
}

/// A member that was renamed and then removed is not a missing staged file.
#[test]
fn a_committed_member_may_be_removed_later() {
    needs!(Strace);
    let dir = killed_after(1);
    fs::remove_file(dir.path().join("memory")).unwrap();
    let report = recover(dir.path()).unwrap();
    assert_eq!(report.superseded, [dir.path().join("memory")]);
    assert_eq!(report.completed, [dir.path().join("vcpu")]);
}
