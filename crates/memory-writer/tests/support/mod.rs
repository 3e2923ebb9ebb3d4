//! Directories for snapshots, and readers that fail.

#![allow(dead_code, reason = "not every test file uses all of it")]

pub(crate) mod images;

use std::io;
use std::path::{Path, PathBuf};

use page_reader::PageReader;

pub(crate) const OLD: &[u8] = b"the snapshot before";

/// A directory that contains a destination with an older snapshot.
pub(crate) struct Place {
    dir: tempfile::TempDir,
    pub(crate) dest: PathBuf,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self::on(&std::env::temp_dir())
    }

    pub(crate) fn on(mount: &Path) -> Self {
        Self::of(tempfile::tempdir_in(mount).unwrap())
    }

    /// Creates a directory on a file system that supports recycling.
    pub(crate) fn recycling() -> Self {
        Self::of(test_machine::recycling_dir())
    }

    fn of(dir: tempfile::TempDir) -> Self {
        let dest = dir.path().join("guest.mem");
        std::fs::write(&dest, OLD).unwrap();
        Self { dir, dest }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn assert_untouched(&self) {
        assert_eq!(std::fs::read(&self.dest).unwrap(), OLD, "the old snapshot");
        self.assert_nothing_else();
    }

    pub(crate) fn assert_nothing_else(&self) {
        assert_nothing_but(self.path(), &["guest.mem"]);
    }

    pub(crate) fn read(&self) -> Vec<u8> {
        std::fs::read(&self.dest).unwrap()
    }
}

pub(crate) fn assert_nothing_but(dir: &Path, expected: &[&str]) {
    let entries = std::fs::read_dir(dir).unwrap();
    let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, expected, "nothing may be left behind");
}

/// Returns bytes that differ from page to page and within a page.
pub(crate) fn pattern(size: usize, seed: u8) -> Vec<u8> {
    (0..size)
        .map(|at| (at / 512) as u8 ^ (at as u8).wrapping_mul(31) ^ seed)
        .collect()
}

/// A reader that does not expose its memory, so that every byte passes through `read_at`. It calls
/// `then` for reads from `offset` on.
pub(crate) struct Until<F> {
    pub(crate) ram: Vec<u8>,
    pub(crate) offset: u64,
    pub(crate) then: F,
}

impl<F: Fn() -> io::Error> PageReader for Until<F> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 > self.offset {
            return Err((self.then)());
        }
        self.ram.read_at(offset, buf)
    }
}

/// Returns a reader of `ram` that lends no memory.
pub(crate) fn without_memory(ram: &[u8]) -> impl PageReader + use<> {
    Until {
        ram: ram.to_vec(),
        offset: ram.len() as u64,
        then: || unreachable!("nothing is read past the end"),
    }
}
