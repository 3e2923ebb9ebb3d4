//! Another user replaces directory entries during saves: that user can read no saved bytes, and no
//! other file changes.
//!
//! The other user is a thread with that user's file system IDs.
#![cfg(target_os = "linux")]

mod support;

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use atomic_file::{AtomicWriter, OpenError, Preserve};
use nix::unistd::{Gid, setfsgid};
use rstest::rstest;
use support::commit;
use support::hostile::{
    OTHER_USER, Place, SECRET, USER, as_other_user, become_other_user, become_user, hash_of,
    open_to_all, plant, set_mode, staged_files,
};
use test_machine::{needs, rounds};

fn saves() -> usize {
    rounds(20, 100)
}

/// Repeats `attack` as the other user, and searches for the secret, while `save` runs.
fn under_attack<T>(place: &Place, attack: impl Fn(&Place) + Sync, save: impl FnOnce() -> T) -> T {
    let (done, attacks) = (AtomicBool::new(false), AtomicUsize::new(0));
    let over_and_over = |what: &dyn Fn()| {
        become_other_user();
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

/// Fails if a file in `dir` that this thread may read contains the secret.
fn assert_no_secret(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let file = File::options()
            .read(true)
            .custom_flags(nix::libc::O_NONBLOCK)
            .open(entry.path());
        let mut bytes = Vec::new();
        // A file that cannot be read discloses nothing.
        if file.is_ok_and(|mut file| file.read_to_end(&mut bytes).is_ok()) {
            let found = bytes.windows(SECRET.len()).any(|bytes| bytes == SECRET);
            assert!(!found, "another user has read {:?}", entry.path());
        }
    }
}

/// Replaces `dir` briefly by a link to `ours`.
fn swap_directory(place: &Place) {
    let (dir, away) = (place.path("dir"), place.path("away"));
    if fs::rename(&dir, &away).is_ok() {
        symlink(place.path("ours"), &dir).unwrap();
        fs::remove_file(&dir).unwrap();
        fs::rename(&away, &dir).unwrap();
    }
}

#[rstest]
#[case::of_the_staged_file(staged_files)]
#[case::of_the_destination(|place: &Place| vec![place.path("dir/dest")])]
fn replaced_names_disclose_no_secret(
    #[case] of: fn(&Place) -> Vec<PathBuf>,
    #[values("a link", "a hard link", "a file", "a fifo")] what: &str,
    #[values(0, 1 << 20)] recycle: u64,
) {
    needs!(Root);
    let place = Place::new(0o777);
    let attack = |place: &Place| {
        let names = of(place);
        plant(place, &names, what);
        thread::yield_now();
        // Let some saves succeed: in such a directory another user can make all of them fail.
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
            // The other user can make some saves fail.
            let _ = save();
        }
    });
    // The other user may have replaced the staged file just before the rename, and could do the
    // same after a commit.
    let _ = fs::remove_file(place.path("dir/dest"));
    save().expect("no attack is in progress");
    assert_eq!(fs::read(place.path("dir/dest")).unwrap(), SECRET);
    place.assert_ours_untouched();
}

#[test]
fn a_directory_replaced_by_a_link_is_harmless() {
    needs!(Root);
    let place = Place::new(0o755);
    let saved = under_attack(&place, swap_directory, || {
        let mut saved = 0;
        while saved < saves() {
            let dest = place.path("dir/dest");
            // The directory may be missing or be the link: this test does not cover these cases.
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
fn saves_in_a_sticky_directory_always_succeed(
    #[values("a link", "a hard link", "a file", "a fifo")] what: &str,
) {
    needs!(Root);
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    fs::write(&dest, "old").unwrap();
    let attack = |place: &Place| {
        plant(place, &staged_files(place), what);
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
fn a_destination_of_another_user_is_refused(#[case] what: &str) {
    needs!(Root);
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    thread::scope(|scope| {
        scope.spawn(|| {
            become_other_user();
            plant(&place, std::slice::from_ref(&dest), what);
        });
    });
    let error = AtomicWriter::open(&dest).unwrap_err();
    let expected = match what {
        "a link" => matches!(
            error,
            OpenError::UntrustedSymlink {
                owner: OTHER_USER,
                ..
            }
        ),
        _ => matches!(error, OpenError::NotAFile { .. }),
    };
    assert!(expected, "{error:?}");
    place.assert_ours_untouched();
}

#[rstest]
#[case::before_the_writer_is_opened(true)]
#[case::while_the_writer_writes(false)]
fn attributes_of_a_planted_file_are_not_preserved(
    #[case] before: bool,
    #[values("a file", "a hard link")] what: &str,
    #[values(0o1777, 0o777)] mode: u32,
) {
    needs!(Root);
    let place = Place::new(mode);
    open_to_all(&place.path("ours/victim")).unwrap();
    let dest = place.path("dir/dest");
    let planted = || as_other_user(|| plant(&place, std::slice::from_ref(&dest), what));
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
    as_other_user(|| assert_no_secret(&place.path("dir")));
}

/// In a directory that is not sticky, another user may replace a file of this user.
#[test]
fn attributes_of_a_replaced_file_are_not_preserved() {
    needs!(Root);
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
        // Keeps the inode number in use.
        let old = File::open(&dest).unwrap();
        as_other_user(|| plant(&place, std::slice::from_ref(&dest), what));
        writer.write_all_at(SECRET, 0).unwrap();
        assert_eq!(writer.commit().is_ok(), if_permitted, "{what}");
        as_other_user(|| assert_no_secret(&place.path("dir")));
        drop(old);
    }
}

#[test]
fn other_users_cannot_occupy_staged_names() {
    needs!(Root);
    let place = Place::new(0o1777);
    let dest = place.path("dir/dest");
    let hash = hash_of(&dest);
    as_other_user(|| {
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
    // Root could remove the files.
    thread::scope(|scope| {
        let another = scope.spawn(|| {
            become_user(OTHER_USER + 1);
            for recycle in [0, 1 << 20, 1 << 20] {
                commit(&AtomicWriter::options().recycle(recycle), &dest, SECRET).unwrap();
            }
        });
        another.join().unwrap();
    });
    assert_eq!(fs::read(&dest).unwrap(), SECRET);
}

#[test]
fn staged_names_are_unique() {
    let place = Place::new(0o700);
    let dest = place.path("dir/dest");
    let mut seen = std::collections::HashSet::new();
    for _ in 0..100 {
        let writer = AtomicWriter::open(&dest).unwrap();
        assert!(seen.insert(writer.staged_path().to_owned()));
    }
}

/// A process that waits for the lock of an orphaned file could keep it from being swept.
#[test]
fn other_users_cannot_lock_a_staged_file() {
    needs!(Root);
    let place = Place::new(0o1777);
    let writer = AtomicWriter::options()
        .mode(0o666)
        .open(place.path("dir/dest"))
        .unwrap();
    let opened = as_other_user(|| File::open(writer.staged_path()).map(drop));
    assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::PermissionDenied);
    writer.commit().unwrap();
    as_other_user(|| File::open(place.path("dir/dest")).map(drop)).unwrap();
}

/// Members of a group with write permission can create and exchange links in the directory.
#[rstest]
#[case::of_a_shared_group(0o2775, 0, OTHER_USER + 1)]
#[case::of_a_shared_group_sticky(0o3775, 0, OTHER_USER + 1)]
#[case::of_roots_group(0o775, 0, 0)]
#[case::of_roots_group_in_a_directory_of_a_user(0o775, USER, 0)]
#[case::of_the_owners_group(0o775, USER, USER)]
#[case::of_the_group_of_an_owner_with_a_name(0o775, 1, 1)]
fn a_link_is_not_followed_if_a_group_may_write(
    #[case] mode: u32,
    #[case] uid: u32,
    #[case] gid: u32,
) {
    needs!(Root);
    let place = Place::new(0o755);
    let dir = place.path("dir");
    std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).unwrap();
    set_mode(&dir, mode);
    let link = dir.join("out.mem");
    plant_as_member(&place, gid, &link, "a link");
    match AtomicWriter::open(&link) {
        Err(OpenError::UntrustedSymlink { owner, .. }) => assert_eq!(owner, OTHER_USER),
        other => panic!("the link was followed, or another error: {other:?}"),
    }
    place.assert_ours_untouched();
}

/// The member of the group could read the new file.
#[rstest]
#[case::of_roots_group(0, 0)]
#[case::of_the_owners_group(USER, USER)]
fn attributes_of_a_file_of_a_group_member_are_not_preserved(#[case] uid: u32, #[case] gid: u32) {
    needs!(Root);
    let place = Place::new(0o755);
    let dir = place.path("dir");
    std::os::unix::fs::chown(&dir, Some(uid), Some(gid)).unwrap();
    set_mode(&dir, 0o775);
    let dest = dir.join("dest");
    plant_as_member(&place, gid, &dest, "a file");
    let options = AtomicWriter::options().preserve(Preserve::all());
    let error = options.open(&dest).unwrap_err();
    assert!(matches!(error, OpenError::NotPreserved { .. }), "{error:?}");
}

/// Plants `what` at `path` as a process of the other user that has the group `gid`. The lists of
/// users and groups name neither.
fn plant_as_member(place: &Place, gid: u32, path: &Path, what: &str) {
    as_other_user(|| {
        setfsgid(Gid::from_raw(gid));
        plant(place, &[path.to_owned()], what);
    });
    let planted = fs::symlink_metadata(path).expect("a member of the group may write");
    assert_eq!(planted.uid(), OTHER_USER);
}
