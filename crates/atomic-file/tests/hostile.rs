//! Another user changes names under a save's feet: nothing of what is saved gets to that user, and nothing else of ours is touched.
//!
//! The other user is a thread with that user's rights over files.
#![cfg(target_os = "linux")]

mod common;

use std::error::Error;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use atomic_file::{AtomicWriter, OpenError};
use common::commit;
use nix::sys::stat::Mode;
use nix::unistd::{Gid, Uid, mkfifo, setfsgid, setfsuid};
use rstest::rstest;
use test_machine::{Need, rounds};

const STRANGER: u32 = 12345;
const SECRET: &[u8] = b"the guest's keys";
const PRECIOUS: &[u8] = b"precious";

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
        assert_eq!(common::names(&self.path("ours")), ["dest", "victim"]);
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
    setfsgid(Gid::from_raw(STRANGER));
    setfsuid(Uid::from_raw(STRANGER));
    // It says the same user now, whom it was asked for in vain to change.
    assert_eq!(setfsuid(Uid::from_raw(STRANGER)).as_raw(), STRANGER);
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
    let names = common::names(&place.path("dir")).into_iter();
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
