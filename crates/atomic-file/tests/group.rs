//! Group commits.

mod support;

use std::fs;

use atomic_file::{AtomicGroup, AtomicWriter, CommitStep, GroupCommitError};
use atomic_file::{Ineligible, recover, sweep};
use rstest::rstest;
use support::groups::{FILES, old_files};
use support::{assert_names, group, same_text};
#[cfg(target_os = "linux")]
use test_machine::{FileSystem, needs};

#[test]
fn a_group_replaces_all_files_and_leaves_no_other_file() {
    let dir = old_files();
    let group = group(dir.path(), &FILES, "new").unwrap();
    assert_eq!((group.len(), group.is_empty()), (2, false));
    assert_eq!(same_text(dir.path(), &FILES), "old");
    group.commit().unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "new");
    assert_names(dir.path(), &FILES);
}

#[test]
fn an_empty_group_does_nothing() {
    let group = AtomicGroup::new();
    assert!(group.is_empty());
    group.commit().unwrap();
}

#[test]
fn a_dropped_or_discarded_group_leaves_no_file() {
    let dir = old_files();
    drop(group(dir.path(), &FILES, "new").unwrap());
    group(dir.path(), &FILES, "new").unwrap().discard().unwrap();
    assert_eq!(same_text(dir.path(), &FILES), "old");
    assert_names(dir.path(), &FILES);
}

#[rstest]
#[case::other_directory("other", Ineligible::OtherDirectory)]
#[case::staged_elsewhere("elsewhere", Ineligible::StagedElsewhere)]
#[case::the_same_destination("same", Ineligible::SameDestination)]
#[case::no_clobber("no clobber", Ineligible::NoClobber)]
fn an_ineligible_writer_is_returned(#[case] who: &str, #[case] expected: Ineligible) {
    let dir = tempfile::tempdir().unwrap();
    let other = dir.path().join("other");
    fs::create_dir(&other).unwrap();
    let mut group = AtomicGroup::new();
    group
        .add(AtomicWriter::open(dir.path().join("memory")).unwrap())
        .unwrap();
    let dest = dir.path().join("dest");
    let options = AtomicWriter::options();
    let writer = match who {
        "other" => options.open(other.join("dest")),
        "elsewhere" => options.staging_dir(&other).open(&dest),
        "same" => options.open(dir.path().join("memory")),
        _ => options.no_clobber(true).open(&dest),
    };
    let error = group.add(writer.unwrap()).unwrap_err();
    assert_eq!(error.reason, expected);
    error.writer.commit().expect("the directory is unchanged");
    assert_eq!(group.len(), 1);
}

#[cfg(target_os = "linux")]
#[test]
fn a_file_system_without_lasting_inode_numbers_is_refused() {
    needs!(Mount(FileSystem::EXFAT));
    let disk = test_machine::LoopMount::new(test_machine::FileSystem::EXFAT).unwrap();
    let writer = AtomicWriter::open(disk.path().join("memory")).unwrap();
    let error = AtomicGroup::new().add(writer).unwrap_err();
    assert_eq!(error.reason, Ineligible::NoInodeNumbers);
}

#[test]
fn a_directory_at_a_destination_fails_the_group() {
    let dir = old_files();
    let group = group(dir.path(), &["memory", "new"], "new").unwrap();
    fs::create_dir(dir.path().join("new")).unwrap();
    let error = group.commit().unwrap_err();
    let GroupCommitError::NothingReplaced {
        step: CommitStep::Destination,
        path,
        ..
    } = error
    else {
        panic!("{error:?}");
    };
    assert_eq!(path, dir.path().join("new"));
    assert_eq!(same_text(dir.path(), &FILES), "old");
    assert_names(dir.path(), &["memory", "new", "vcpu"]);
}

#[test]
fn a_replaced_staged_file_fails_the_group() {
    let dir = old_files();
    let memory = AtomicWriter::open(dir.path().join("memory")).unwrap();
    let vcpu = AtomicWriter::open(dir.path().join("vcpu")).unwrap();
    let temp = vcpu.staged_path().to_owned();
    let mut group = AtomicGroup::new();
    group.add(memory).unwrap();
    group.add(vcpu).unwrap();
    fs::remove_file(&temp).unwrap();
    fs::write(&temp, "forged").unwrap();
    let error = group.commit().unwrap_err();
    assert!(matches!(
        error,
        GroupCommitError::NothingReplaced {
            step: CommitStep::Check,
            ..
        }
    ));
    assert_eq!(same_text(dir.path(), &FILES), "old");
}

#[test]
fn racing_groups_over_the_same_files_never_mix() {
    let dir = old_files();
    std::thread::scope(|scope| {
        for id in 0..4 {
            let dir = dir.path();
            scope.spawn(move || {
                for round in 0..25 {
                    let text = format!("{id} {round}");
                    group(dir, &FILES, &text).unwrap().commit().unwrap();
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..100 {
                recover(dir.path()).expect("recovery leaves groups in progress alone");
                sweep(dir.path()).unwrap();
            }
        });
    });
    same_text(dir.path(), &FILES);
    assert_names(dir.path(), &FILES);
}

/// The file system provides neither a time of creation nor a handle.
#[cfg(target_os = "linux")]
#[test]
fn a_file_system_without_generations_is_refused() {
    use nix::mount::{MntFlags, MsFlags, mount, umount2};
    needs!(Root);
    let dir = tempfile::tempdir().unwrap();
    let (ramfs, none) = (Some("ramfs"), None::<&str>);
    mount(ramfs, dir.path(), ramfs, MsFlags::empty(), none).unwrap();
    let writer = AtomicWriter::open(dir.path().join("memory")).unwrap();
    let refused = AtomicGroup::new().add(writer).unwrap_err();
    assert_eq!(refused.reason, Ineligible::NoGenerations);
    let committed = refused.writer.commit();
    umount2(dir.path(), MntFlags::MNT_DETACH).unwrap();
    committed.unwrap();
}
