//! Copies of the test program.

use std::env;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// Copies this program to a directory where every user can execute it, until the value is dropped.
pub fn world_executable() -> Program {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("test");
    // Copied by another process: a child that a thread forks concurrently inherits the descriptors
    // of this one, and a file that is open for writing cannot be executed.
    let copied = Command::new("cp")
        .arg(env::current_exe().unwrap())
        .arg(&path)
        .status()
        .unwrap();
    assert!(copied.success());
    for path in [dir.path(), &path] {
        fs::set_permissions(path, PermissionsExt::from_mode(0o755)).unwrap();
    }
    Program { path, _dir: dir }
}

/// A copy of this program, removed on drop.
#[derive(Debug)]
pub struct Program {
    path: PathBuf,
    _dir: TempDir,
}

impl Program {
    /// Returns the path of the program.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
