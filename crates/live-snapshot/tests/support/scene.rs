//! A guest whose next snapshot goes wrong.

#![allow(dead_code, reason = "each test file uses a part")]

use std::collections::BTreeSet;

use live_snapshot::{CancelToken, LiveError, LiveSnapshot, LiveSnapshotOptions, Method};
use memory_writer::{Durability, MemoryWriter, MemoryWriterOptions, SnapshotError};

use crate::guest::{Guest, PAGE, assert_same};

pub(crate) const SIZE: u64 = 4 << 20;
pub(crate) const OLD: &[u8] = b"the snapshot before";

/// A guest with a committed full image, a diff that is about to be written over an older file, and
/// pages that were written since the full image.
pub(crate) struct Scene {
    pub(crate) guest: Guest,
    pub(crate) dir: tempfile::TempDir,
    pub(crate) full: Vec<u8>,
}

impl Scene {
    pub(crate) fn new() -> Self {
        Self::on(tempfile::tempdir().unwrap())
    }

    pub(crate) fn on(dir: tempfile::TempDir) -> Self {
        let guest = Guest::private(SIZE);
        guest.fill();
        guest
            .tracker
            .set_baseline(live_snapshot::ParentImage::Unknown)
            .unwrap();
        let full = guest.contents();
        std::fs::write(dir.path().join("diff.mem"), OLD).unwrap();
        guest.write_pages([3, 100, 700], 2);
        Self { guest, dir, full }
    }

    pub(crate) fn options() -> MemoryWriterOptions {
        MemoryWriter::options().durability(Durability::None)
    }

    pub(crate) fn open(&self, options: &MemoryWriterOptions) -> MemoryWriter {
        options
            .open(self.dir.path().join("diff.mem"), SIZE, PAGE)
            .unwrap()
    }

    pub(crate) fn writer(&self) -> MemoryWriter {
        self.open(&Self::options())
    }

    /// Checks that nothing was committed and nothing is left, that exactly these pages are marked,
    /// and that the guest can write and a new snapshot is right.
    #[track_caller]
    pub(crate) fn assert_unharmed(&self, marked: impl IntoIterator<Item = u64>) {
        let expected: BTreeSet<_> = [3, 100, 700].into_iter().chain(marked).collect();
        assert_eq!(self.guest.dirty(), expected);
        let path = self.dir.path().join("diff.mem");
        assert!(std::fs::read(&path).unwrap() == OLD);
        let names = std::fs::read_dir(self.dir.path()).unwrap();
        let names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["diff.mem"]);
        self.guest.write_pages([9, 100], 6);
        let live = LiveSnapshot::options().diff(true);
        let live = live.begin(&self.guest.tracker, self.writer()).unwrap();
        let ram = self.guest.contents();
        let frozen = live.freeze().unwrap();
        self.guest.write_pages([11, 9], 7);
        frozen.commit().unwrap();
        let diff = std::fs::read(&path).unwrap();
        let mut restored = self.full.clone();
        for page in expected.into_iter().chain([9]) {
            let bytes = (page * PAGE) as usize..((page + 1) * PAGE) as usize;
            restored[bytes.clone()].copy_from_slice(&diff[bytes]);
        }
        assert_same(&restored, &ram);
        assert_eq!(self.guest.dirty(), [9, 11].into());
    }
}

pub(crate) fn options(method: Method, token: &CancelToken) -> LiveSnapshotOptions {
    LiveSnapshot::options().method(method).cancel(token.clone())
}

#[track_caller]
pub(crate) fn assert_cancelled<T: std::fmt::Debug>(result: Result<T, LiveError>) {
    let cancelled = matches!(
        result,
        Err(LiveError::Cancelled | LiveError::Write(SnapshotError::Cancelled { .. }))
    );
    assert!(cancelled, "{result:?}");
}
