//! Another user plants group records, destinations and staged files.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use atomic_file::{AtomicGroup, AtomicWriter, RecoverError, recover};
use rstest::rstest;
use support::hostile::{
    MEMBERS, OTHER_USER, PRECIOUS, Place, SECRET, USER, as_other_user, as_user, become_user,
    die_at, forged, forged_for, open_to_all, other_users_place, plant, set_mode, staged_files,
};
use support::{Held, commit};
use test_machine::{FileSystem, LoopMount, needs};

/// Runs the job of `support::command` as a user other than root; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    become_user(USER);
    match job.as_str() {
        "group" => support::traced(&dir, || match support::group(&dir, &MEMBERS, "new") {
            Err(error) => format!("not opened: {error}"),
            Ok(group) => support::group_state_of(group.commit()),
        }),
        other => panic!("no such job: {other}"),
    }
}

#[rstest]
#[case::junk(b"junk".to_vec())]
#[case::empty(Vec::new())]
#[case::huge(vec![1; 5 << 20])]
fn a_planted_record_blocks_no_writer(
    #[case] bytes: Vec<u8>,
    #[values(".atomic-file-group", ".atomic-file-0123456789abcdef.group")] name: &str,
    #[values(false, true)] locked: bool,
) {
    needs!(Root);
    let place = Place::new(0o1777);
    let (dir, record) = (place.path("dir"), place.path("dir").join(name));
    let planted = as_other_user(|| {
        fs::write(&record, &bytes).unwrap();
        let file = File::open(&record).unwrap();
        if locked {
            file.lock().unwrap();
        }
        file
    });
    let dest = dir.join("dest");
    for _ in 0..2 {
        commit(&AtomicWriter::options().recycle(1 << 20), &dest, SECRET).unwrap();
    }
    let mut group = AtomicGroup::new();
    for name in ["dest", "state"] {
        let writer = AtomicWriter::open(dir.join(name)).unwrap();
        writer.write_all_at(SECRET, 0).unwrap();
        group.add(writer).unwrap();
    }
    group.commit().unwrap();
    let report = recover(&dir).unwrap();
    assert_eq!(report.foreign, std::slice::from_ref(&record));
    assert_eq!(fs::read(&record).unwrap(), bytes, "another user owns it");
    drop(planted);
}

/// The owner of `dest` is root, whose recovery could rename any file.
#[rstest]
#[case::a_file_of_their_own(false)]
#[case::a_hard_link_to_another_users_file(true)]
fn a_forged_record_renames_no_file(#[case] linked: bool, #[values(0o1777, 0o777)] mode: u32) {
    needs!(Root);
    let place = Place::new(mode);
    let dir = place.path("dir");
    fs::write(dir.join("dest"), PRECIOUS).unwrap();
    let record = dir.join(".atomic-file-0123456789abcdef.group");
    // A file of this user that all users may write to, elsewhere on the same file system.
    let ours = place.path("ours/open");
    fs::write(&ours, "").unwrap();
    open_to_all(&ours).unwrap();
    as_other_user(|| {
        let bytes = forged(&dir, "dest");
        if linked {
            fs::write(&ours, &bytes).unwrap();
            fs::hard_link(&ours, &record).unwrap();
        } else {
            fs::write(&record, &bytes).unwrap();
        }
    });
    assert_eq!(recover(&dir).unwrap().foreign, [record]);
    drop(AtomicWriter::open(dir.join("dest")).unwrap());
    assert_eq!(fs::read(dir.join("dest")).unwrap(), PRECIOUS);
}

#[test]
fn planting_a_destination_does_not_split_a_group() {
    needs!(Root, Strace);
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    let [memory, state] = MEMBERS.map(|name| dir.join(name));
    let second = support::RENAMES_BEFORE_MEMBERS + 2;
    let mut held = Held::start("group", &dir, "renameat", "delay_enter", second);
    held.wait_until(|| memory.exists());
    as_other_user(|| plant(&place, std::slice::from_ref(&state), "a file"));
    let said = held.release().unwrap();
    assert!(said.contains("DestinationTaken"), "{said}");
    let staged = staged_files(&place);
    for _ in 0..2 {
        let error = as_user(USER, || recover(&dir)).unwrap_err();
        let RecoverError::Stuck { first, others, .. } = error else {
            panic!("another error: {error:?}");
        };
        assert!(others.is_empty(), "{others:?}");
        let taken = matches!(
            &*first,
            RecoverError::DestinationTaken { dest, owner: OTHER_USER, .. } if *dest == state
        );
        assert!(taken, "{first:?}");
        assert_eq!(staged_files(&place), staged, "nothing is removed");
        assert_eq!(fs::read(&state).unwrap(), b"planted");
    }
    fs::remove_file(&state).unwrap();
    let report = as_user(USER, || recover(&dir)).unwrap();
    assert_eq!(
        (report.in_place, report.completed),
        (vec![memory], vec![state])
    );
    assert_eq!(support::same_text(&dir, &MEMBERS), "new");
    assert_eq!(support::names(&dir), MEMBERS);
}

/// In a private directory of another user, root trusts that user's records. They can only rename
/// files that the user could rename.
#[test]
fn a_trusted_record_renames_only_in_its_directory() {
    needs!(Root);
    let place = Place::new(0o1777);
    let home = place.path("dir/home");
    let record = home.join(".atomic-file-0123456789abcdef.group");
    as_other_user(|| {
        fs::create_dir(&home).unwrap();
        set_mode(&home, 0o755);
        fs::write(&record, forged(&home, "../../ours/victim")).unwrap();
    });
    recover(&home).unwrap_err();
    place.assert_ours_untouched();
    as_other_user(|| fs::write(&record, forged(&home, "own")).unwrap());
    assert_eq!(recover(&home).unwrap().completed, [home.join("own")]);
    // A record of root or of any other user is not the directory owner's.
    let bytes = as_other_user(|| forged(&home, "own"));
    fs::write(&record, bytes).unwrap();
    std::os::unix::fs::chown(&record, Some(OTHER_USER + 1), None).unwrap();
    assert_eq!(recover(&home).unwrap().foreign, [record]);
}

/// A process can be stopped, so root's commits must not wait for another user's process.
#[test]
fn another_users_group_in_progress_is_not_waited_for() {
    needs!(Root);
    let place = Place::new(0o1777);
    let home = place.path("dir/home");
    let record = home.join(".atomic-file-0123456789abcdef.group");
    let locked = as_other_user(|| {
        fs::create_dir(&home).unwrap();
        set_mode(&home, 0o755);
        fs::write(&record, forged(&home, "own")).unwrap();
        let locked = File::open(&record).unwrap();
        locked.lock().unwrap();
        locked
    });
    commit(&AtomicWriter::options(), &home.join("own"), b"root's").unwrap();
    let mut group = AtomicGroup::new();
    group
        .add(AtomicWriter::open(home.join("own")).unwrap())
        .unwrap();
    group.commit().unwrap();
    assert!(recover(&home).unwrap().busy);
    drop(locked);
}

/// A group of `USER` that was killed before it renamed a member.
fn killed_group_of_another_user(dir: &Path) {
    set_mode(dir, 0o777);
    for name in MEMBERS {
        fs::write(dir.join(name), "old").unwrap();
    }
    die_at(
        "group",
        dir,
        "renameat",
        support::RENAMES_BEFORE_MEMBERS + 1,
    );
    support::record(dir);
}

/// `vm.mem` has the inode number in the group's record, but is another file.
fn assert_root_commit_stays(dir: &Path, old: u64) {
    let memory = dir.join(MEMBERS[0]);
    assert_eq!(fs::metadata(&memory).unwrap().ino(), old);
    let report = as_user(USER, || recover(dir)).unwrap();
    assert_eq!(fs::read(&memory).unwrap(), SECRET);
    assert_eq!(report.superseded, [memory]);
    assert_eq!(report.completed, [dir.join(MEMBERS[1])]);
}

/// This file system stores no time of creation.
#[test]
fn a_commit_to_a_used_inode_number_is_not_undone() {
    needs!(Root, Strace, Mount(FileSystem::EXT4));
    let disk = LoopMount::new(FileSystem::EXT4_SMALL_INODES).unwrap();
    let dir = disk.path().join("dir");
    fs::create_dir(&dir).unwrap();
    set_mode(disk.path(), 0o755);
    fs::write(dir.join(MEMBERS[0]), "old").unwrap();
    assert!(
        fs::metadata(dir.join(MEMBERS[0]))
            .unwrap()
            .created()
            .is_err()
    );
    killed_group_of_another_user(&dir);
    let memory = dir.join(MEMBERS[0]);
    let inode = || fs::metadata(&memory).unwrap().ino();
    let old = inode();
    for _ in 0..100 {
        commit(&AtomicWriter::options(), &memory, SECRET).unwrap();
        if inode() == old {
            break;
        }
    }
    assert_root_commit_stays(&dir, old);
}

/// A recycled old file keeps its time of creation.
#[test]
fn a_recycled_file_does_not_match_a_pending_record() {
    needs!(Root, Strace);
    let place = Place::new(0o777);
    let dir = place.path("dir");
    killed_group_of_another_user(&dir);
    let memory = dir.join(MEMBERS[0]);
    let options = AtomicWriter::options().recycle(1 << 20);
    for bytes in [PRECIOUS, SECRET] {
        let writer = options.open(&memory).unwrap();
        support::write_whole(&writer, bytes).unwrap();
        writer.commit().unwrap();
    }
    let report = as_user(USER, || recover(&dir)).unwrap();
    assert_eq!(fs::read(&memory).unwrap(), SECRET);
    assert_eq!(report.superseded, [memory]);
}

/// Each group takes several syncs, and the directory's owner may plant any number.
#[rstest]
fn a_writer_completes_its_own_groups_and_few_others(#[values(false, true)] group: bool) {
    const PLANTED: u64 = 100;
    const MAX_OTHERS: usize = 16;
    needs!(Root);
    let place = other_users_place(&[]);
    let dir = place.path("dir");
    as_other_user(|| {
        for number in 0..=PLANTED {
            let staged = format!(".atomic-file-01234567-{number:016x}.stage");
            let dest = match number {
                PLANTED => MEMBERS[0].to_owned(),
                _ => format!("other{number}"),
            };
            let record = dir.join(format!(".atomic-file-{number:016x}.group"));
            fs::write(record, forged_for(&dir, &staged, &dest)).unwrap();
        }
    });
    let left = || support::records(&dir).len();
    let writer = AtomicWriter::open(dir.join(MEMBERS[0])).unwrap();
    let completed = fs::read(dir.join(MEMBERS[0])).unwrap();
    assert_eq!(completed, b"forged", "its own group is completed");
    assert_eq!(left(), PLANTED as usize - MAX_OTHERS);
    support::commit_writer(writer, group);
    let completed = PLANTED as usize - left();
    assert!(completed <= 4 * MAX_OTHERS, "{completed}");
    let report = recover(&dir).unwrap();
    assert_eq!(report.completed.len(), PLANTED as usize - completed);
    assert_eq!(left(), 0);
}
