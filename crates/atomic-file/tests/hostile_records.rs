//! Another user plants group records, destinations and staged files.
#![cfg(target_os = "linux")]

mod support;

use std::fs::{self, File};
use std::io::{self};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use atomic_file::{
    AtomicGroup, AtomicWriter, GroupCommitError, Preserve, RecoverError, recover, sweep,
};
use rstest::rstest;
use support::hostile::{
    MEMBERS, OTHER_USER, PRECIOUS, Place, SECRET, USER, as_other_user, as_user, become_user,
    open_to_all, plant, set_mode, staged_files,
};
use support::{Held, commit};
use test_machine::{FileSystem, LoopMount, needs};

/// Runs the job of `support::command` as a user other than root; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    if job == "sweep" {
        return support::traced(&dir, || {
            let report = sweep(&dir).unwrap();
            format!(
                "{} removed, {} kept",
                report.removed.len(),
                report.skipped.len()
            )
        });
    }
    if let Some(name) = job.strip_prefix("preserve ") {
        return support::traced(&dir, || {
            let options = AtomicWriter::options().preserve(Preserve::all());
            support::replace(&options, &dir.join(name))
        });
    }
    if job == "group that preserves" {
        return support::traced(&dir, || {
            let mut group = AtomicGroup::new();
            for name in MEMBERS {
                let options = AtomicWriter::options().preserve(Preserve::all());
                let writer = options.open(dir.join(name)).unwrap();
                writer.write_all_at(b"new", 0).unwrap();
                group.add(writer).unwrap();
            }
            support::group_state_of(group.commit())
        });
    }
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

/// Returns a record for files that the other user staged.
fn forged(dir: &Path, dest: &str) -> Vec<u8> {
    let staged = ".atomic-file-01234567-0123456789abcdef.stage";
    fs::write(dir.join(staged), "forged").unwrap();
    let mut bytes = b"ATOMGRP\n\x01\0\0\0\x01\0\0\0".to_vec();
    bytes.extend(fs::metadata(dir.join(staged)).unwrap().ino().to_le_bytes());
    bytes.extend(6u64.to_le_bytes());
    for name in [staged, dest] {
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend(name.as_bytes());
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
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

/// Root sweeps /tmp: another user's interrupted group must stay complete.
#[test]
fn a_sweep_by_root_keeps_files_of_another_users_group() {
    needs!(Root);
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    as_other_user(|| {
        let record = dir.join(".atomic-file-0123456789abcdef.group");
        fs::write(record, forged(&dir, "dest")).unwrap();
        fs::write(dir.join(".atomic-file-01234567-1.stage"), "an orphan").unwrap();
    });
    // It protects no file of this user.
    fs::write(dir.join(".atomic-file-01234567-2.stage"), "an orphan").unwrap();
    let report = sweep(&dir).unwrap();
    assert_eq!(
        (report.removed.len(), report.skipped.len()),
        (2, 1),
        "{report:?}"
    );
    assert!(
        report.skipped[0]
            .path
            .ends_with(".atomic-file-01234567-0123456789abcdef.stage")
    );
}

#[rstest]
#[case::that_name_nothing(b"", "200 removed, 0 kept")]
#[case::that_are_damaged(b"junk", "0 removed, 200 kept")]
fn a_sweep_limits_reads_of_other_users_records(#[case] begin: &[u8], #[case] expected: &str) {
    needs!(Root, Strace);
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    let trace = place.path("trace");
    as_other_user(|| {
        for number in 0..200 {
            let staged = format!(".atomic-file-01234567-{number:016x}.stage");
            fs::write(dir.join(staged), "").unwrap();
        }
    });
    // As large as the limit. One of them protects all files of the other user.
    as_other_user(|| {
        for number in 0..4 {
            let record = dir.join(format!(".atomic-file-{number:016x}.group"));
            fs::write(&record, begin).unwrap();
            File::options()
                .write(true)
                .open(&record)
                .unwrap()
                .set_len(4 << 20)
                .unwrap();
        }
    });
    let calls = "trace=openat,read,getdents64";
    let args = ["-o", trace.to_str().unwrap(), "-e", calls];
    let swept = || support::under_strace("sweep", &dir, &args).unwrap();
    assert_eq!(swept(), expected);
    let calls = fs::read_to_string(&trace).unwrap();
    let opened = |name: &str| calls.lines().filter(|call| call.contains(name)).count();
    for number in 0..4 {
        assert_eq!(opened(&format!("{number:016x}.group\"")), 1);
    }
    let listings = calls.lines().filter(|call| call.contains("getdents64("));
    assert!(
        listings.count() < 60,
        "there are fewer records than staged files"
    );
    assert!(bytes_read(&calls) < 17 << 20);
    // Further records are not read: they may name any file of the other user.
    as_other_user(|| {
        fs::write(dir.join(".atomic-file-01234567-1.stage"), "").unwrap();
        for number in 4..24 {
            let record = dir.join(format!(".atomic-file-{number:016x}.group"));
            File::create(record).unwrap().set_len(4 << 20).unwrap();
        }
    });
    fs::write(dir.join(".atomic-file-01234567-2.stage"), "ours").unwrap();
    assert!(swept().starts_with("1 removed, "), "ours");
    assert!(bytes_read(&fs::read_to_string(&trace).unwrap()) < 17 << 20);
}

/// Returns the sum of the results of all `read` calls in a trace.
fn bytes_read(calls: &str) -> u64 {
    let reads = calls.lines().filter(|call| call.contains(" read("));
    let returned = reads.filter_map(|call| call.rsplit_once("= ")?.1.parse::<u64>().ok());
    returned.sum()
}

/// Runs `job`, and kills it at its `nth` call of `call`.
fn die_at(job: &str, dir: &Path, call: &str, nth: usize) {
    let kill = format!("inject={call}:signal=KILL:when={nth}");
    let args = ["-o", "/dev/null", "-e", &kill];
    assert_eq!(support::under_strace(job, dir, &args), None);
}

/// A directory of the other user with the file `dir/dest`.
fn other_users_place(names: &[&str]) -> Place {
    let place = Place::new(0o755);
    let dir = place.path("dir");
    for name in names {
        fs::write(dir.join(name), "old").unwrap();
        set_mode(&dir.join(name), 0o644);
        std::os::unix::fs::chown(dir.join(name), Some(OTHER_USER), None).unwrap();
    }
    std::os::unix::fs::chown(&dir, Some(OTHER_USER), None).unwrap();
    place
}

/// Root's staged files belong to the preserved owner before they are renamed.
#[rstest]
fn an_owners_sweep_keeps_the_files_of_roots_group(#[values(0, 1)] renamed: usize) {
    needs!(Root, Strace);
    let place = other_users_place(&MEMBERS);
    let dir = place.path("dir");
    let nth = support::RENAMES_BEFORE_MEMBERS + 1 + renamed;
    die_at("group that preserves", &dir, "renameat", nth);
    let staged = staged_files(&place);
    as_other_user(|| {
        assert!(sweep(&dir).unwrap().removed.is_empty());
        for name in MEMBERS {
            AtomicWriter::open(dir.join(name))
                .unwrap()
                .discard()
                .unwrap();
        }
    });
    assert_eq!(staged_files(&place), staged);
    let report = recover(&dir).unwrap();
    let counts = (report.in_place.len(), report.completed.len());
    assert_eq!(counts, (renamed, MEMBERS.len() - renamed));
    assert_eq!(support::same_text(&dir, &MEMBERS), "new");
    let owner = |name| fs::metadata(dir.join(name)).unwrap().uid();
    assert_eq!(MEMBERS.map(owner), [OTHER_USER; 2]);
    assert_eq!(support::names(&dir), MEMBERS);
}

/// A record protects only the files of its own user, unless no other user can have written it.
#[rstest]
#[case::where_others_may_write(0o1777, false)]
#[case::where_its_record_is_obeyed_by_all(0o755, true)]
fn a_group_that_could_not_protect_its_files_is_refused(#[case] mode: u32, #[case] taken: bool) {
    needs!(Root);
    let place = Place::new(mode);
    let dir = place.path("dir");
    if mode == 0o755 {
        std::os::unix::fs::chown(&dir, Some(USER), None).unwrap();
    }
    let group = as_user(USER, || support::group(&dir, &MEMBERS, "new").unwrap());
    // A user with the capability to change owners.
    for staged in staged_files(&place) {
        std::os::unix::fs::chown(staged, Some(OTHER_USER), None).unwrap();
    }
    let committed = as_user(USER, || group.commit());
    match committed {
        Ok(()) => assert!(taken),
        Err(GroupCommitError::NothingReplaced { source, .. }) => {
            assert_eq!(source.kind(), io::ErrorKind::PermissionDenied);
            assert!(!taken, "{source}");
        }
        Err(other) => panic!("another error: {other:?}"),
    }
}

/// At the first sync the file belongs to this user, at the second to the preserved owner.
#[rstest]
#[case::while_the_bytes_are_synced(1, (0, 0o600))]
#[case::when_it_has_its_attributes(2, (OTHER_USER, 0o644))]
fn the_next_writer_removes_a_file_given_to_another_user(
    #[case] sync: usize,
    #[case] expected: (u32, u32),
) {
    needs!(Root, Strace);
    let place = other_users_place(&["dest"]);
    let dir = place.path("dir");
    for _ in 0..3 {
        die_at("preserve dest", &dir, "fsync", sync);
        let left = staged_files(&place);
        assert_eq!(left.len(), 1, "the next writer removes it: {left:?}");
        let stat = fs::metadata(&left[0]).unwrap();
        assert_eq!((stat.uid(), stat.mode() & 0o7777), expected);
    }
    commit(&AtomicWriter::options(), &dir.join("dest"), SECRET).unwrap();
    assert_eq!(support::names(&dir), ["dest"]);
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
