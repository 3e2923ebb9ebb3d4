//! Helpers for recycling.

use std::fs::{self};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use super::{assert_names, names};
use atomic_file::{AtomicWriter, AtomicWriterOptions};
use test_machine::recycling_dir;

pub(crate) const MIB: u64 = 1 << 20;

pub(crate) const SIZE: usize = 64 << 10;

pub(crate) fn recycling() -> AtomicWriterOptions {
    AtomicWriter::options().recycle(MIB)
}

/// A forked child has all descriptors of this process until its `exec`, and no lease is granted
/// until then.
pub(crate) fn one_at_a_time() -> std::sync::MutexGuard<'static, ()> {
    static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());
    TURN.lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner)
}

pub(crate) fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

pub(crate) fn recycled_files(dir: &Path) -> Vec<PathBuf> {
    let mut recycled_files = names(dir);
    recycled_files.retain(|name| name.to_str().unwrap().ends_with(".spare"));
    recycled_files.iter().map(|name| dir.join(name)).collect()
}

/// Writes a file of `byte` and returns whether it was recycled.
pub(crate) fn save(options: &AtomicWriterOptions, dest: &Path, byte: u8) -> bool {
    let writer = options.open(dest).unwrap();
    let recycled = writer.recycled();
    assert_eq!(recycled, writer.file().metadata().unwrap().len() > 0);
    writer.file().set_len(SIZE as u64).unwrap();
    writer.write_all_at(&[byte; SIZE], 0).unwrap();
    writer.commit().unwrap();
    assert_eq!(fs::read(dest).unwrap(), [byte; SIZE]);
    recycled
}

/// A directory with a `dest` of 2s and a recycled file of 1s.
pub(crate) fn with_recycled_file() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let dir = recycling_dir();
    let dest = dir.path().join("dest");
    assert!(!save(&recycling(), &dest, 1));
    assert_names(dir.path(), &["dest"]);
    assert!(!save(&recycling(), &dest, 2));
    let recycled_files = recycled_files(dir.path());
    assert_eq!(recycled_files.len(), 1);
    assert_eq!(names(dir.path()).len(), 2);
    assert_eq!(fs::read(&recycled_files[0]).unwrap(), [1; SIZE]);
    (dir, dest, recycled_files[0].clone())
}
