//! Helpers for group commits.

use std::fs;
use std::path::{Path, PathBuf};

use super::{names, records};
use atomic_file::{RecoverError, RecoverReport};

pub(crate) const FILES: [&str; 2] = ["memory", "vcpu"];

pub(crate) fn old_files() -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for name in FILES {
        fs::write(dir.path().join(name), "old").unwrap();
    }
    dir
}

/// Commits a group that is killed at its `nth` rename of a member.
pub(crate) fn die_at_rename(dir: &Path, nth: usize) {
    let nth = nth + super::RENAMES_BEFORE_MEMBERS;
    let kill = format!("inject=renameat:signal=KILL:when={nth}");
    let args = ["-o", "/dev/null", "-e", &kill];
    assert_eq!(super::under_strace("commit", dir, &args), None);
}

/// A directory in which a group was killed after it had renamed `renamed` of its two members.
pub(crate) fn killed_after(renamed: usize) -> tempfile::TempDir {
    let dir = old_files();
    die_at_rename(dir.path(), renamed + 1);
    let new = FILES.map(|name| fs::read(dir.path().join(name)).unwrap() == b"new");
    assert_eq!(new.iter().filter(|new| **new).count(), renamed);
    assert_eq!(records(dir.path()).len(), 1);
    dir
}

pub(crate) fn staged_files(dir: &Path) -> Vec<PathBuf> {
    let is_stage = |name: &std::ffi::OsString| name.to_string_lossy().ends_with(".stage");
    names(dir)
        .into_iter()
        .filter(is_stage)
        .map(|name| dir.join(name))
        .collect()
}

/// Returns the error of the one group that could not be completed.
#[track_caller]
pub(crate) fn stuck(result: Result<RecoverReport, RecoverError>) -> RecoverError {
    let error = result.unwrap_err();
    let RecoverError::Stuck { first, others, .. } = error else {
        panic!("another error: {error:?}");
    };
    assert!(others.is_empty(), "{others:?}");
    *first
}
