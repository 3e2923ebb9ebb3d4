//! Staged files: their names, and programs that exchange them.

mod support;

use std::os::unix::fs::{FileTypeExt as _, symlink};
use std::path::{Path, PathBuf};
use std::{fs, io};

use atomic_file::{AtomicWriter, CommitError, CommitStep};
use support::{assert_names, commit, dir_with_old, names};

#[test]
fn a_symlink_at_a_staged_name_is_kept() {
    let (dir, dest) = dir_with_old();
    let victim = dir.path().join("victim");
    fs::write(&victim, "precious").unwrap();
    let plant = staged_path(&dest);
    symlink(&victim, &plant).unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert_eq!(fs::read(&victim).unwrap(), b"precious");
    assert_eq!(fs::read_link(&plant).unwrap(), victim, "the link is kept");
    assert_eq!(fs::read(&dest).unwrap(), b"new");
    assert!(fs::symlink_metadata(&dest).unwrap().is_file());
}

#[test]
fn a_staged_file_in_use_is_never_truncated() {
    let (_dir, dest) = dir_with_old();
    let plant = staged_path(&dest);
    fs::write(&plant, "precious").unwrap();
    let owner = fs::File::open(&plant).unwrap();
    owner.lock().unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert_eq!(fs::read(&plant).unwrap(), b"precious");
}

#[test]
fn a_fifo_at_a_staged_name_blocks_no_writer() {
    let (_dir, dest) = dir_with_old();
    let plant = staged_path(&dest);
    nix::unistd::mkfifo(&plant, nix::sys::stat::Mode::S_IRWXU).unwrap();
    commit(&AtomicWriter::options(), &dest, b"new").unwrap();
    assert!(fs::symlink_metadata(&plant).unwrap().file_type().is_fifo());
}

/// A name of a file staged for `dest`.
fn staged_path(dest: &Path) -> PathBuf {
    let writer = AtomicWriter::open(dest).unwrap();
    writer.staged_path().to_owned()
}

#[test]
fn a_replaced_staged_file_is_not_committed() {
    let (dir, dest) = dir_with_old();
    let writer = AtomicWriter::open(&dest).unwrap();
    let temp = writer.staged_path().to_owned();
    fs::remove_file(&temp).unwrap();
    fs::write(&temp, "forged").unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::NotReplaced {
                step: CommitStep::Check,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).unwrap(), b"old");
    assert_eq!(
        fs::read(&temp).unwrap(),
        b"forged",
        "it is not ours to remove"
    );
    assert_eq!(names(dir.path()).len(), 2);
}

#[test]
fn a_replaced_file_object_is_not_committed() {
    let (dir, dest) = dir_with_old();
    let mut writer = AtomicWriter::open(&dest).unwrap();
    *writer.file_mut() = tempfile::tempfile().unwrap();
    let error = writer.commit().unwrap_err();
    assert!(
        matches!(
            error,
            CommitError::NotReplaced {
                step: CommitStep::Check,
                ..
            }
        ),
        "{error:?}"
    );
    assert_eq!(fs::read(&dest).unwrap(), b"old");
    assert_names(dir.path(), &["dest"]);
}

/// The file that a commit replaces is that of the opened directory.
#[test]
fn replaced_file_is_opened_where_the_commit_renames() {
    let dir = tempfile::tempdir().unwrap();
    let (opened, moved) = (dir.path().join("opened"), dir.path().join("moved"));
    fs::create_dir(&opened).unwrap();
    let writer = AtomicWriter::open(opened.join("dest")).unwrap();
    assert!(writer.open_replaced().unwrap().is_none());
    fs::rename(&opened, &moved).unwrap();
    fs::create_dir(&opened).unwrap();
    fs::write(opened.join("dest"), "elsewhere").unwrap();
    assert!(writer.open_replaced().unwrap().is_none());
    fs::write(moved.join("dest"), "here").unwrap();
    let replaced = writer.open_replaced().unwrap().unwrap();
    assert_eq!(io::read_to_string(replaced).unwrap(), "here");
    fs::remove_file(moved.join("dest")).unwrap();
    nix::unistd::mkfifo(&moved.join("dest"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(writer.open_replaced().unwrap().is_none());
}
