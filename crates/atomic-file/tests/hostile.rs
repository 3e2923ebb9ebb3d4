//! Another user changes names under a save's feet: nothing of what is saved gets to that user, and nothing else of ours is touched.
//!
//! The other user is a thread with that user's rights over files.
#![cfg(target_os = "linux")]

mod support;

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use atomic_file::{
    AtomicGroup, AtomicWriter, GroupCommitError, OpenError, Preserve, RecoverError, recover, sweep,
};
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, mkfifo, setfsgid, setfsuid};
use rstest::rstest;
use support::{Held, commit};
use test_machine::{LoopFs, LoopMount, Need, rounds};

const STRANGER: u32 = 12345;
/// Neither root nor the stranger.
const USER: u32 = 12346;
const MEMBERS: [&str; 2] = ["vm.mem", "vm.state"];
const SECRET: &[u8] = b"the guest's keys";
const PRECIOUS: &[u8] = b"precious";

/// Not a test of its own: what `support::command` runs, as another user than root.
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
                report.kept.len()
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

fn saves() -> usize {
    rounds(20, 100)
}

/// A directory that all may write to, in one that all may write to as well: `dir/dest` is saved to. What is in `ours` nobody means.
struct Place {
    root: tempfile::TempDir,
}

impl Place {
    fn new(mode: u32) -> Self {
        let root = tempfile::tempdir().unwrap();
        let place = Self { root };
        for (name, mode) in [("dir", mode), ("ours", 0o755)] {
            fs::create_dir(place.path(name)).unwrap();
            set_mode(&place.path(name), mode);
        }
        set_mode(place.root.path(), 0o777);
        for name in ["ours/dest", "ours/victim"] {
            fs::write(place.path(name), PRECIOUS).unwrap();
        }
        place
    }

    fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    fn assert_ours_untouched(&self) {
        assert_eq!(support::names(&self.path("ours")), ["dest", "victim"]);
        for name in ["ours/dest", "ours/victim"] {
            let stat = fs::metadata(self.path(name)).unwrap();
            assert_eq!(fs::read(self.path(name)).unwrap(), PRECIOUS, "{name}");
            assert_eq!((stat.mode() & 0o7777, stat.nlink()), (0o644, 1), "{name}");
        }
    }
}

fn open_to_all(path: &Path) -> io::Result<()> {
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))
}

fn set_mode(path: &Path, mode: u32) {
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
}

/// Has this thread access files as the stranger does.
fn become_stranger() {
    become_user(STRANGER);
}

fn become_user(uid: u32) {
    setfsgid(Gid::from_raw(uid));
    setfsuid(Uid::from_raw(uid));
    // It says the same user now, whom it was asked for in vain to change.
    assert_eq!(setfsuid(Uid::from_raw(uid)).as_raw(), uid);
}

/// Does `attack` as the stranger, and looks for the secret, over and over, while `save` is done.
fn under_attack<T>(place: &Place, attack: impl Fn(&Place) + Sync, save: impl FnOnce() -> T) -> T {
    let (done, attacks) = (AtomicBool::new(false), AtomicUsize::new(0));
    let over_and_over = |what: &dyn Fn()| {
        become_stranger();
        while !done.load(Ordering::Relaxed) {
            what();
        }
    };
    thread::scope(|scope| {
        let attacker = scope.spawn(|| {
            over_and_over(&|| {
                attack(place);
                attacks.fetch_add(1, Ordering::Relaxed);
            });
        });
        let spy = scope.spawn(|| over_and_over(&|| assert_no_secret(&place.path("dir"))));
        while attacks.load(Ordering::Relaxed) == 0 && !attacker.is_finished() {
            thread::yield_now();
        }
        let saved = save();
        done.store(true, Ordering::Relaxed);
        attacker.join().unwrap();
        spy.join().unwrap();
        saved
    })
}

/// Of the files in `dir` that this thread may read, none has it.
fn assert_no_secret(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = File::options()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(entry.path());
        let mut bytes = Vec::new();
        // Whatever may not be read, or is gone, tells nothing.
        if file.is_ok_and(|mut file| file.read_to_end(&mut bytes).is_ok()) {
            let found = bytes.windows(SECRET.len()).any(|bytes| bytes == SECRET);
            assert!(!found, "a stranger has read {:?}", entry.path());
        }
    }
}

/// The names of stages and spares, where there are any.
fn stages(place: &Place) -> Vec<PathBuf> {
    let is_stage = |name: &OsString| name.to_string_lossy().starts_with(".atomic-file-");
    let names = support::names(&place.path("dir")).into_iter();
    let dir = place.path("dir");
    names.filter(is_stage).map(|name| dir.join(name)).collect()
}

/// What a stranger puts in the place of names in a directory that all may write to. Each may fail: that is the point of it.
fn plant(place: &Place, names: &[PathBuf], what: &str) {
    for name in names {
        let _ = fs::remove_file(name);
        let _ = match what {
            "a link" => symlink(place.path("ours/victim"), name),
            "a hard link" => fs::hard_link(place.path("ours/victim"), name),
            "a file" => fs::write(name, "planted").and_then(|()| open_to_all(name)),
            "a fifo" => mkfifo(name, Mode::from_bits_truncate(0o666)).map_err(Into::into),
            other => panic!("{other} is nothing to plant"),
        };
    }
}

/// With a link to `ours` for a moment.
fn swap_directory(place: &Place) {
    let (dir, away) = (place.path("dir"), place.path("away"));
    if fs::rename(&dir, &away).is_ok() {
        symlink(place.path("ours"), &dir).unwrap();
        fs::remove_file(&dir).unwrap();
        fs::rename(&away, &dir).unwrap();
    }
}

#[rstest]
#[case::of_the_stage(stages)]
#[case::of_the_destination(|place: &Place| vec![place.path("dir/dest")])]
fn names_are_changed_for(
    #[case] of: fn(&Place) -> Vec<PathBuf>,
    #[values("a link", "a hard link", "a file", "a fifo")] what: &str,
    #[values(0, 1 << 20)] recycle: u64,
) {
    if !Need::Root.met("names_are_changed_for") {
        return;
    }
    let place = Place::new(0o777);
    let attack = |place: &Place| {
        let names = of(place);
        plant(place, &names, what);
        thread::yield_now();
        // For some saves to come through: in such a directory a stranger can see to it that none does.
        for name in names {
            let _ = fs::remove_file(name);
        }
        thread::sleep(Duration::from_micros(500));
    };
    let options = AtomicWriter::options().recycle(recycle);
    let save = || -> Result<(), Box<dyn Error>> {
        let writer = options.open(place.path("dir/dest"))?;
        writer.write_all_at(SECRET, 0)?;
        Ok(writer.commit()?)
    };
    under_attack(&place, attack, || {
        for _ in 0..saves() {
            // What a stranger may hinder fails now and then.
            let _ = save();
        }
    });
    // It may be what the stranger had put in the stage's place just before that was renamed: who may rename names can do the same after a commit.
    let _ = fs::remove_file(place.path("dir/dest"));
    save().expect("nobody is in the way any more");
    assert_eq!(fs::read(place.path("dir/dest")).unwrap(), SECRET);
    place.assert_ours_untouched();
}

#[test]
fn the_directory_is_changed_for_a_link() {
    if !Need::Root.met("the_directory_is_changed_for_a_link") {
        return;
    }
    let place = Place::new(0o755);
    let saved = under_attack(&place, swap_directory, || {
        let mut saved = 0;
        while saved < saves() {
            let dest = place.path("dir/dest");
            // Where it is away, there is nothing to be saved to; where the link is, that was asked for, and is no matter of this test.
            let Ok(dir) = File::open(place.path("dir")) else {
                continue;
            };
            let Ok(writer) = AtomicWriter::open(&dest) else {
                continue;
            };
            drop(dir);
            writer.write_all_at(SECRET, 0).unwrap();
            writer.commit().unwrap();
            saved += 1;
        }
        saved
    });
    assert_eq!(saved, saves());
}

#[rstest]
fn in_a_directory_where_names_are_their_owners_nothing_is_in_the_way(
    #[values("a link", "a hard link", "a file", "a fifo")] what: &str,
) {
    if !Need::Root.met("in_a_directory_where_names_are_their_owners_nothing_is_in_the_way") {
        return;
    }
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    fs::write(&dest, "old").unwrap();
    let attack = |place: &Place| {
        plant(place, &stages(place), what);
        plant(place, &[place.path("dir/dest")], what);
    };
    under_attack(&place, attack, || {
        for number in 0..saves() {
            let new = [SECRET, &number.to_ne_bytes()].concat();
            commit(&AtomicWriter::options(), &dest, &new).unwrap();
            assert_eq!(fs::read(&dest).unwrap(), new);
        }
    });
    place.assert_ours_untouched();
}

#[rstest]
#[case::a_link("a link")]
#[case::a_fifo("a fifo")]
fn a_first_save_to_a_name_that_a_stranger_has_taken_is_refused(#[case] what: &str) {
    if !Need::Root.met("a_first_save_to_a_name_that_a_stranger_has_taken_is_refused") {
        return;
    }
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    thread::scope(|scope| {
        scope.spawn(|| {
            become_stranger();
            plant(&place, std::slice::from_ref(&dest), what);
        });
    });
    let error = AtomicWriter::open(&dest).unwrap_err();
    let expected = match what {
        "a link" => matches!(
            error,
            OpenError::UntrustedSymlink {
                owner: STRANGER,
                ..
            }
        ),
        _ => matches!(error, OpenError::NotAFile { .. }),
    };
    assert!(expected, "{error:?}");
    place.assert_ours_untouched();
}

/// Does `attack` as the stranger, to its end.
fn as_stranger<T: Send>(attack: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let stranger = scope.spawn(|| {
            become_stranger();
            attack()
        });
        stranger.join().unwrap()
    })
}

#[rstest]
#[case::before_the_writer_is_opened(true)]
#[case::while_the_writer_writes(false)]
fn a_planted_file_passes_nothing_on(
    #[case] before: bool,
    #[values("a file", "a hard link")] what: &str,
    #[values(0o1777, 0o777)] mode: u32,
) {
    if !Need::Root.met("a_planted_file_passes_nothing_on") {
        return;
    }
    let place = Place::new(mode);
    open_to_all(&place.path("ours/victim")).unwrap();
    let dest = place.path("dir/dest");
    let planted = || as_stranger(|| plant(&place, std::slice::from_ref(&dest), what));
    if before {
        planted();
    }
    let preserve = Preserve::all();
    if before {
        let error = AtomicWriter::options()
            .preserve(preserve)
            .open(&dest)
            .unwrap_err();
        assert!(matches!(error, OpenError::NotPreserved { .. }), "{error:?}");
    }
    let writer = AtomicWriter::options()
        .preserve(preserve.if_permitted(true))
        .open(&dest)
        .unwrap();
    assert_eq!(writer.not_preserved().len(), if before { 5 } else { 0 });
    writer.write_all_at(SECRET, 0).unwrap();
    if !before {
        planted();
    }
    assert!(dest.exists(), "it was planted");
    writer.commit().unwrap();
    let stat = fs::metadata(&dest).unwrap();
    assert_eq!((stat.uid(), stat.mode() & 0o7777), (0, 0o600));
    as_stranger(|| assert_no_secret(&place.path("dir")));
}

/// In a directory that is not sticky, a stranger may put another file in the place of one of ours.
#[test]
fn a_file_put_in_the_place_of_ours_passes_nothing_on() {
    if !Need::Root.met("a_file_put_in_the_place_of_ours_passes_nothing_on") {
        return;
    }
    let place = Place::new(0o777);
    open_to_all(&place.path("ours/victim")).unwrap();
    let dest = place.path("dir/dest");
    for (if_permitted, what) in [
        (true, "a file"),
        (true, "a hard link"),
        (false, "a hard link"),
    ] {
        let _ = fs::remove_file(&dest);
        fs::write(&dest, "old").unwrap();
        let preserve = Preserve::all().if_permitted(if_permitted);
        let options = AtomicWriter::options().preserve(preserve);
        let writer = options.open(&dest).unwrap();
        assert!(writer.not_preserved().is_empty());
        // So that no new file gets the inode number.
        let old = File::open(&dest).unwrap();
        as_stranger(|| plant(&place, std::slice::from_ref(&dest), what));
        writer.write_all_at(SECRET, 0).unwrap();
        assert_eq!(writer.commit().is_ok(), if_permitted, "{what}");
        as_stranger(|| assert_no_secret(&place.path("dir")));
        drop(old);
    }
}

/// The hash in the names of the files staged for `dest`.
fn hash_of(dest: &Path) -> String {
    let writer = AtomicWriter::open(dest).unwrap();
    let name = writer.temp_path().file_name().unwrap().to_str().unwrap();
    name.split('-').nth(2).unwrap().to_owned()
}

#[test]
fn another_users_files_take_no_name_from_a_writer() {
    if !Need::Root.met("another_users_files_take_no_name_from_a_writer") {
        return;
    }
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    let hash = hash_of(&dest);
    as_stranger(|| {
        for number in 0..4096 {
            for name in [
                format!("{hash}-{number:x}"),
                format!("{hash}-{number:016x}"),
            ] {
                fs::write(
                    place.path("dir").join(format!(".atomic-file-{name}.stage")),
                    "",
                )
                .unwrap();
            }
        }
    });
    // Root could remove what is in its way.
    thread::scope(|scope| {
        let another = scope.spawn(|| {
            become_user(STRANGER + 1);
            for recycle in [0, 1 << 20, 1 << 20] {
                commit(&AtomicWriter::options().recycle(recycle), &dest, SECRET).unwrap();
            }
        });
        another.join().unwrap();
    });
    assert_eq!(fs::read(&dest).unwrap(), SECRET);
}

#[test]
fn no_two_staged_files_have_the_same_name() {
    let place = Place::new(0o700);
    let dest = place.path("dir/dest");
    let mut seen = std::collections::HashSet::new();
    for _ in 0..100 {
        let writer = AtomicWriter::open(&dest).unwrap();
        assert!(seen.insert(writer.temp_path().to_owned()));
    }
}

#[rstest]
#[case::junk(b"junk".to_vec())]
#[case::empty(Vec::new())]
#[case::huge(vec![1; 5 << 20])]
fn a_planted_record_holds_no_one_up(
    #[case] bytes: Vec<u8>,
    #[values(".atomic-file-group", ".atomic-file-0123456789abcdef.group")] name: &str,
    #[values(false, true)] locked: bool,
) {
    if !Need::Root.met("a_planted_record_holds_no_one_up") {
        return;
    }
    let place = Place::new(0o1777);
    let (dir, record) = (place.path("dir"), place.path("dir").join(name));
    let planted = as_stranger(|| {
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
    assert_eq!(
        fs::read(&record).unwrap(),
        bytes,
        "it is not ours to remove"
    );
    drop(planted);
}

/// A record as a group of `of` would have it, for files that the stranger staged.
fn forged(dir: &Path, dest: &str) -> Vec<u8> {
    let stage = ".atomic-file-01234567-0123456789abcdef.stage";
    fs::write(dir.join(stage), "forged").unwrap();
    let mut bytes = b"ATOMGRP\n\x01\0\0\0\x01\0\0\0".to_vec();
    bytes.extend(fs::metadata(dir.join(stage)).unwrap().ino().to_le_bytes());
    bytes.extend(6u64.to_le_bytes());
    for name in [stage, dest] {
        bytes.extend((name.len() as u16).to_le_bytes());
        bytes.extend(name.as_bytes());
    }
    bytes.extend(crc32fast::hash(&bytes).to_le_bytes());
    bytes
}

/// The owner of `dest` is root, whose recovery could rename anything.
#[rstest]
#[case::a_file_of_their_own(false)]
#[case::a_hard_link_to_a_file_of_ours(true)]
fn a_forged_record_has_nothing_renamed(#[case] linked: bool, #[values(0o1777, 0o777)] mode: u32) {
    if !Need::Root.met("a_forged_record_has_nothing_renamed") {
        return;
    }
    let place = Place::new(mode);
    let dir = place.path("dir");
    fs::write(dir.join("dest"), PRECIOUS).unwrap();
    let record = dir.join(".atomic-file-0123456789abcdef.group");
    // A file of ours that all may write to, kept somewhere on the same file system.
    let ours = place.path("ours/open");
    fs::write(&ours, "").unwrap();
    open_to_all(&ours).unwrap();
    as_stranger(|| {
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

/// As that user, to its end.
fn as_user<T: Send>(uid: u32, job: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let user = scope.spawn(|| {
            become_user(uid);
            job()
        });
        user.join().unwrap()
    })
}

#[test]
fn no_stranger_splits_a_group_by_planting_a_destination() {
    const TEST: &str = "no_stranger_splits_a_group_by_planting_a_destination";
    if !Need::Root.met(TEST) || !Need::Strace.met(TEST) {
        return;
    }
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    let [memory, state] = MEMBERS.map(|name| dir.join(name));
    let second = support::RENAMES_BEFORE_MEMBERS + 2;
    let mut held = Held::start("group", &dir, "renameat", "delay_enter", second);
    held.wait_until(|| memory.exists());
    as_stranger(|| plant(&place, std::slice::from_ref(&state), "a file"));
    let said = held.release().unwrap();
    assert!(said.contains("DestinationTaken"), "{said}");
    let staged = stages(&place);
    for _ in 0..2 {
        let error = as_user(USER, || recover(&dir)).unwrap_err();
        let RecoverError::Stuck { first, others, .. } = error else {
            panic!("another error: {error:?}");
        };
        assert!(others.is_empty(), "{others:?}");
        let taken = matches!(
            &*first,
            RecoverError::DestinationTaken { dest, owner: STRANGER, .. } if *dest == state
        );
        assert!(taken, "{first:?}");
        assert_eq!(stages(&place), staged, "nothing is removed");
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

/// In a directory that is the stranger's alone root obeys the stranger's records: they cause no more
/// than the stranger can do there. No name leads out of it.
#[test]
fn a_record_in_its_owners_directory_stays_in_it() {
    if !Need::Root.met("a_record_in_its_owners_directory_stays_in_it") {
        return;
    }
    let place = Place::new(0o1777);
    let home = place.path("dir/home");
    let record = home.join(".atomic-file-0123456789abcdef.group");
    as_stranger(|| {
        fs::create_dir(&home).unwrap();
        set_mode(&home, 0o755);
        fs::write(&record, forged(&home, "../../ours/victim")).unwrap();
    });
    recover(&home).unwrap_err();
    place.assert_ours_untouched();
    as_stranger(|| fs::write(&record, forged(&home, "own")).unwrap());
    assert_eq!(recover(&home).unwrap().completed, [home.join("own")]);
    // The record of root, or of anyone else, is not its owner's.
    let bytes = as_stranger(|| forged(&home, "own"));
    fs::write(&record, bytes).unwrap();
    std::os::unix::fs::chown(&record, Some(STRANGER + 1), None).unwrap();
    assert_eq!(recover(&home).unwrap().foreign, [record]);
}

/// A process can be stopped; root's commits must not depend on one of another user.
#[test]
fn a_living_record_of_another_user_is_not_waited_for() {
    if !Need::Root.met("a_living_record_of_another_user_is_not_waited_for") {
        return;
    }
    let place = Place::new(0o1777);
    let home = place.path("dir/home");
    let record = home.join(".atomic-file-0123456789abcdef.group");
    let locked = as_stranger(|| {
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

/// As a process that waits for the lock of an orphaned file would keep it from being swept.
#[test]
fn no_other_user_can_lock_a_staged_file() {
    if !Need::Root.met("no_other_user_can_lock_a_staged_file") {
        return;
    }
    let place = Place::new(0o1777);
    let writer = AtomicWriter::options()
        .mode(0o666)
        .open(place.path("dir/dest"))
        .unwrap();
    let opened = as_stranger(|| File::open(writer.temp_path()).map(drop));
    assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    writer.commit().unwrap();
    as_stranger(|| File::open(place.path("dir/dest")).map(drop)).unwrap();
}

/// Root sweeps /tmp: the files of another user's interrupted group are that user's to complete.
#[test]
fn a_sweep_by_root_keeps_what_another_users_group_names() {
    if !Need::Root.met("a_sweep_by_root_keeps_what_another_users_group_names") {
        return;
    }
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    as_stranger(|| {
        let record = dir.join(".atomic-file-0123456789abcdef.group");
        fs::write(record, forged(&dir, "dest")).unwrap();
        fs::write(dir.join(".atomic-file-01234567-1.stage"), "an orphan").unwrap();
    });
    // It protects nothing of ours.
    fs::write(dir.join(".atomic-file-01234567-2.stage"), "an orphan").unwrap();
    let report = sweep(&dir).unwrap();
    assert_eq!(
        (report.removed.len(), report.kept.len()),
        (2, 1),
        "{report:?}"
    );
    assert!(
        report.kept[0]
            .path
            .ends_with(".atomic-file-01234567-0123456789abcdef.stage")
    );
}

#[rstest]
#[case::that_name_nothing(b"", "200 removed, 0 kept")]
#[case::that_are_damaged(b"junk", "0 removed, 200 kept")]
fn a_sweep_reads_a_bounded_part_of_a_strangers_records(
    #[case] begin: &[u8],
    #[case] expected: &str,
) {
    const TEST: &str = "a_sweep_reads_a_bounded_part_of_a_strangers_records";
    if !Need::Root.met(TEST) || !Need::Strace.met(TEST) {
        return;
    }
    let place = Place::new(0o1777);
    let dir = place.path("dir");
    let trace = place.path("trace");
    as_stranger(|| {
        for number in 0..200 {
            let stage = format!(".atomic-file-01234567-{number:016x}.stage");
            fs::write(dir.join(stage), "").unwrap();
        }
    });
    // As large as is read at all; one of them is enough to protect all of the stranger's files.
    as_stranger(|| {
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
    assert!(listings.count() < 60, "not one for each staged file");
    assert!(bytes_read(&calls) < 17 << 20);
    // Any further ones are not read: they may name anything of the stranger's.
    as_stranger(|| {
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

/// What all calls of `read` in a trace returned.
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

/// `dir/dest` of the stranger, in a directory of the stranger.
fn strangers_place(names: &[&str]) -> Place {
    let place = Place::new(0o755);
    let dir = place.path("dir");
    for name in names {
        fs::write(dir.join(name), "old").unwrap();
        set_mode(&dir.join(name), 0o644);
        std::os::unix::fs::chown(dir.join(name), Some(STRANGER), None).unwrap();
    }
    std::os::unix::fs::chown(&dir, Some(STRANGER), None).unwrap();
    place
}

/// Root's staged files belong to the owner that they preserve before they are renamed.
#[rstest]
fn no_owner_takes_the_files_of_roots_group_for_leftovers(#[values(0, 1)] renamed: usize) {
    const TEST: &str = "no_owner_takes_the_files_of_roots_group_for_leftovers";
    if !Need::Root.met(TEST) || !Need::Strace.met(TEST) {
        return;
    }
    let place = strangers_place(&MEMBERS);
    let dir = place.path("dir");
    let nth = support::RENAMES_BEFORE_MEMBERS + 1 + renamed;
    die_at("group that preserves", &dir, "renameat", nth);
    let staged = stages(&place);
    as_stranger(|| {
        assert!(sweep(&dir).unwrap().removed.is_empty());
        for name in MEMBERS {
            AtomicWriter::open(dir.join(name))
                .unwrap()
                .discard()
                .unwrap();
        }
    });
    assert_eq!(stages(&place), staged);
    let report = recover(&dir).unwrap();
    let counts = (report.in_place.len(), report.completed.len());
    assert_eq!(counts, (renamed, MEMBERS.len() - renamed));
    assert_eq!(support::same_text(&dir, &MEMBERS), "new");
    let owner = |name| fs::metadata(dir.join(name)).unwrap().uid();
    assert_eq!(MEMBERS.map(owner), [STRANGER; 2]);
    assert_eq!(support::names(&dir), MEMBERS);
}

/// A record protects the files of its own user only, unless nobody else can have written it.
#[rstest]
#[case::where_others_may_write(0o1777, false)]
#[case::where_its_record_is_obeyed_by_all(0o755, true)]
fn a_group_that_could_not_protect_its_files_is_refused(#[case] mode: u32, #[case] taken: bool) {
    if !Need::Root.met("a_group_that_could_not_protect_its_files_is_refused") {
        return;
    }
    let place = Place::new(mode);
    let dir = place.path("dir");
    if mode == 0o755 {
        std::os::unix::fs::chown(&dir, Some(USER), None).unwrap();
    }
    let group = as_user(USER, || support::group(&dir, &MEMBERS, "new").unwrap());
    // As a user with the capability to give files away does.
    for stage in stages(&place) {
        std::os::unix::fs::chown(stage, Some(STRANGER), None).unwrap();
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

/// At the first sync the file is still this user's alone; at the second it is the owner's.
#[rstest]
#[case::while_the_bytes_are_synced(1, (0, 0o600))]
#[case::when_it_has_its_attributes(2, (STRANGER, 0o644))]
fn what_is_left_for_another_users_file_is_removed_by_the_next_writer(
    #[case] sync: usize,
    #[case] expected: (u32, u32),
) {
    const TEST: &str = "what_is_left_for_another_users_file_is_removed_by_the_next_writer";
    if !Need::Root.met(TEST) || !Need::Strace.met(TEST) {
        return;
    }
    let place = strangers_place(&["dest"]);
    let dir = place.path("dir");
    for _ in 0..3 {
        die_at("preserve dest", &dir, "fsync", sync);
        let left = stages(&place);
        assert_eq!(left.len(), 1, "the next writer removes it: {left:?}");
        let stat = fs::metadata(&left[0]).unwrap();
        assert_eq!((stat.uid(), stat.mode() & 0o7777), expected);
    }
    commit(&AtomicWriter::options(), &dir.join("dest"), SECRET).unwrap();
    assert_eq!(support::names(&dir), ["dest"]);
}

/// What a group of `USER` does not undo, killed before it renamed a member.
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

/// `vm.mem` has the inode number that the group's record says, and is another file.
fn assert_root_s_commit_stays(dir: &Path, old: u64) {
    let memory = dir.join(MEMBERS[0]);
    assert_eq!(fs::metadata(&memory).unwrap().ino(), old);
    let report = as_user(USER, || recover(dir)).unwrap();
    assert_eq!(fs::read(&memory).unwrap(), SECRET);
    assert_eq!(report.superseded, [memory]);
    assert_eq!(report.completed, [dir.join(MEMBERS[1])]);
}

/// Such a file system keeps no time of creation.
#[test]
fn a_commit_to_a_used_inode_number_is_not_undone() {
    const TEST: &str = "a_commit_to_a_used_inode_number_is_not_undone";
    if !(Need::Root.met(TEST) && Need::Strace.met(TEST) && Need::Ext4.met(TEST)) {
        return;
    }
    let disk = LoopMount::new(LoopFs::Ext4SmallInodes).unwrap();
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
    assert_root_s_commit_stays(&dir, old);
}

/// The old file may be the next stage, and has its time of creation.
#[test]
fn a_recycled_file_is_not_taken_for_the_one_of_a_record() {
    const TEST: &str = "a_recycled_file_is_not_taken_for_the_one_of_a_record";
    if !Need::Root.met(TEST) || !Need::Strace.met(TEST) {
        return;
    }
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

/// Members of a group that may write to a directory can put links there, and exchange them.
#[rstest]
#[case::of_a_shared_group(0o2775, STRANGER + 1, false)]
#[case::of_a_shared_group_sticky(0o3775, STRANGER + 1, false)]
#[case::of_roots_group(0o775, 0, true)]
fn a_link_is_not_followed_where_a_group_may_write(
    #[case] mode: u32,
    #[case] gid: u32,
    #[case] followed: bool,
) {
    if !Need::Root.met("a_link_is_not_followed_where_a_group_may_write") {
        return;
    }
    let place = Place::new(0o755);
    let dir = place.path("dir");
    std::os::unix::fs::chown(&dir, None, Some(gid)).unwrap();
    set_mode(&dir, mode);
    let link = dir.join("out.mem");
    symlink(place.path("ours/victim"), &link).unwrap();
    std::os::unix::fs::lchown(&link, Some(STRANGER), None).unwrap();
    match AtomicWriter::open(&link) {
        Ok(writer) => {
            assert!(followed);
            writer.discard().unwrap();
        }
        Err(OpenError::UntrustedSymlink { owner, .. }) => {
            assert!(!followed);
            assert_eq!(owner, STRANGER);
        }
        Err(other) => panic!("another error: {other:?}"),
    }
    place.assert_ours_untouched();
}
