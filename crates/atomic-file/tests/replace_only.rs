//! Writers with `replace_only`.

mod support;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, SystemTime};

use atomic_file::{
    AtomicGroup, AtomicWriter, AtomicWriterOptions, CommitError, CommitStep, FileVersion,
    Ineligible, OpenError,
};
use rstest::rstest;
use support::{Held, assert_names, commit, dir_with_old};
use test_machine::{needs, recycling_dir};

/// Runs the job of `support::command`; not a test by itself.
#[test]
fn child() {
    let Some((job, dir)) = support::job() else {
        return;
    };
    let dest = dir.join("dest");
    support::traced(&dir, || match job.as_str() {
        "replace only" => support::replace(&only(&dest), &dest),
        other => panic!("no such job: {other}"),
    });
}

fn version(path: &Path) -> FileVersion {
    let file = Arc::new(File::open(path).unwrap());
    let metadata = file.metadata().unwrap();
    FileVersion::new(file, &metadata)
}

fn only(path: &Path) -> AtomicWriterOptions {
    AtomicWriter::options().replace_only(version(path))
}

/// A change of the destination by another process.
#[derive(Clone, Copy, Debug)]
enum Other {
    Commits,
    Renames,
    Removes,
    Grows,
    /// In place, with the same length.
    Writes,
}

impl Other {
    fn act(self, dest: &Path) {
        match self {
            Self::Commits => commit(&AtomicWriterOptions::default(), dest, b"other").unwrap(),
            Self::Renames => {
                let other = dest.with_file_name("other");
                fs::write(&other, "other").unwrap();
                fs::rename(other, dest).unwrap();
            }
            Self::Removes => fs::remove_file(dest).unwrap(),
            Self::Grows => fs::write(dest, "other").unwrap(),
            Self::Writes => {
                fs::write(dest, "oth").unwrap();
                // The file system's clock must advance.
                let later = SystemTime::now() + Duration::from_secs(1);
                let file = File::options().write(true).open(dest).unwrap();
                file.set_modified(later).unwrap();
            }
        }
    }
}

#[rstest]
fn another_writers_file_is_not_replaced(
    #[values(
        Other::Commits,
        Other::Renames,
        Other::Removes,
        Other::Grows,
        Other::Writes
    )]
    other: Other,
) {
    let (dir, dest) = dir_with_old();
    let options = only(&dest);
    let writer = options.open(&dest).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    other.act(&dest);
    let left = fs::read(&dest).ok();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            &error,
            CommitError::DestinationChanged { dest: at, leftover: None } if *at == dest
        ),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("not replaced") && text.contains("another writer"),
        "{text}"
    );
    // `open` creates no staged file in this case.
    let error = options.open(&dest).unwrap_err();
    assert!(
        matches!(&error, OpenError::DestinationChanged { path } if *path == dest),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).ok(), left);
    match left {
        Some(_) => assert_names(dir.path(), &["dest"]),
        None => assert_names(dir.path(), &[]),
    }
}

#[test]
fn an_unchanged_version_is_replaced() {
    let (dir, dest) = dir_with_old();
    let writer = only(&dest).open(&dest).unwrap();
    writer.write_all_at(b"new", 0).unwrap();
    // These changes do not create another version.
    fs::set_permissions(&dest, Permissions::from_mode(0o640)).unwrap();
    fs::hard_link(&dest, dir.path().join("backup")).unwrap();
    writer.commit().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert_eq!(fs::read(dir.path().join("backup")).unwrap(), b"old");
    // Also through a link.
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("dest", &link).unwrap();
    commit(&only(&link), &link, b"newer").unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"newer");
}

/// A recycling writer can rename an earlier inode to the destination again.
#[test]
fn recycling_never_reuses_the_inode_of_a_version() {
    let (_dir, dest) = dir_with_old();
    let recycle = AtomicWriterOptions::default().recycle(1 << 20);
    // A file that a recycling writer may keep.
    commit(&recycle, &dest, b"111").unwrap();
    let mine = only(&dest).open(&dest).unwrap();
    let modified = fs::metadata(&dest).unwrap().modified().unwrap();
    // The second writer reuses the file that the first one replaced, if possible.
    for bytes in [b"222", b"333"] {
        commit(&recycle, &dest, bytes).unwrap();
        // Only their inodes differ.
        let file = File::options().write(true).open(&dest).unwrap();
        file.set_modified(modified).unwrap();
    }
    let error = mine.commit().unwrap_err();
    assert!(
        matches!(error, CommitError::DestinationChanged { .. }),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).unwrap(), b"333");
}

/// Recycling keeps the lock of the replaced file, which must not exclude the writer itself.
#[test]
fn a_version_is_replaced_by_a_recycling_writer() {
    let (dir, dest) = dir_with_old();
    let recycle = AtomicWriterOptions::default().recycle(1 << 20);
    commit(&recycle, &dest, b"one").unwrap();
    for bytes in [b"two", b"new"] {
        commit(&only(&dest).recycle(1 << 20), &dest, bytes).unwrap();
    }
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    drop(dir);
}

/// Each writer increments the number that it read: no increment is lost.
#[test]
fn one_of_several_writers_replaces_a_version() {
    const THREADS: u64 = 4;
    const COUNTS: u64 = 25;
    let (dir, dest) = dir_with_old();
    fs::write(&dest, 0_u64.to_le_bytes()).unwrap();
    let count = || {
        let version = version(&dest);
        let mut bytes = [0; 8];
        std::os::unix::fs::FileExt::read_exact_at(&**version.file(), &mut bytes, 0).unwrap();
        let next = u64::from_le_bytes(bytes) + 1;
        let options = AtomicWriter::options()
            .durability(atomic_file::Durability::None)
            .replace_only(version);
        let writer = match options.open(&dest) {
            Ok(writer) => writer,
            Err(OpenError::DestinationChanged { .. }) => return false,
            Err(OpenError::Io {
                operation: "lock", ..
            }) => return false,
            Err(other) => panic!("{other:?}"),
        };
        writer.write_all_at(&next.to_le_bytes(), 0).unwrap();
        match writer.commit() {
            Ok(()) => true,
            Err(
                CommitError::DestinationChanged { .. }
                | CommitError::NotReplaced {
                    step: CommitStep::Compare,
                    ..
                },
            ) => false,
            Err(other) => panic!("{other:?}"),
        }
    };
    thread::scope(|scope| {
        for _ in 0..THREADS {
            scope.spawn(|| {
                for _ in 0..COUNTS {
                    while !count() {}
                }
            });
        }
    });
    let counted = fs::read(&dest).unwrap();
    assert_eq!(counted, (THREADS * COUNTS).to_le_bytes());
    assert_names(dir.path(), &["dest"]);
}

/// Another such writer that compares now would see the old file, and replace the new one.
#[test]
fn the_old_file_is_locked_while_it_is_compared() {
    needs!(Strace);
    // Its file system has leases.
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    fs::write(&dest, "old").unwrap();
    let mut held = Held::start("replace only", dir.path(), "renameat", "delay_enter", 1);
    held.wait_for_a_call();
    let old = File::open(&dest).unwrap();
    let locked = old.try_lock();
    assert!(
        matches!(locked, Err(fs::TryLockError::WouldBlock)),
        "{locked:?}"
    );
    // No program can open it for writing, either.
    let mut for_writing = File::options();
    for_writing.write(true).custom_flags(libc::O_NONBLOCK);
    let opened = for_writing.open(&dest).unwrap_err();
    assert_eq!(opened.kind(), std::io::ErrorKind::WouldBlock);
    assert_eq!(held.release().as_deref(), Some("ok"));
    old.try_lock().unwrap();
    for_writing.open(&dest).unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"new");
}

#[test]
fn a_file_locked_by_another_program_is_not_replaced() {
    let (dir, dest) = dir_with_old();
    let options = only(&dest);
    let writer = options.open(&dest).unwrap();
    let other = File::open(&dest).unwrap();
    other.lock().unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(&error, CommitError::NotReplaced { step: CommitStep::Compare, source, .. }
            if source.to_string().contains("flock")),
        "{error:?}"
    );
    let error = options.open(&dest).unwrap_err();
    assert!(
        matches!(
            &error,
            OpenError::Io {
                operation: "lock",
                ..
            }
        ),
        "{error:?}"
    );
    other.unlock().unwrap();
    assert_eq!(fs::read(&dest).unwrap(), b"old");
    commit(&options, &dest, b"new").unwrap();
    assert_names(dir.path(), &["dest"]);
}

#[test]
fn a_group_refuses_replace_only() {
    let (_dir, dest) = dir_with_old();
    let mut group = AtomicGroup::new();
    let error = group.add(only(&dest).open(&dest).unwrap()).unwrap_err();
    assert_eq!(error.reason, Ineligible::ReplaceOnly);
}
