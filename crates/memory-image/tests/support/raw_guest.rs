//! A guest whose snapshots are raw images.

use std::path::PathBuf;

use dirty_bitmap::DirtyBitmap;
use memory_image::Chain;
use memory_writer::{Durability, MemoryWriter};
use page_reader::PageReader;

pub const SIZE: u64 = 1 << 20;

pub const PAGE: u64 = 16384;

/// A guest with dirty tracking, and its snapshots.
pub struct Guest {
    pub dir: tempfile::TempDir,
    pub ram: Vec<u8>,
    pub dirty: DirtyBitmap,
    pub snapshots: Vec<PathBuf>,
}

impl Guest {
    pub fn new() -> Self {
        let dirty = DirtyBitmap::new(0, SIZE, 4096).unwrap();
        Self {
            dir: tempfile::tempdir().unwrap(),
            ram: vec![0; SIZE as usize],
            dirty,
            snapshots: Vec::new(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&mut self, at: u64, len: u64, value: u8) {
        self.ram[at as usize..(at + len) as usize].fill(value);
        self.dirty.mark_range(at, len).unwrap();
    }

    pub fn save(&mut self) -> PathBuf {
        let path = self.path(&format!("{}.mem", self.snapshots.len()));
        let epoch = self.dirty.begin_epoch().unwrap();
        let mut writer = MemoryWriter::options()
            .durability(Durability::None)
            // A test in which all pages are dirty passes them to `push_pages`.
            .allow_ambiguous_diff(true)
            .open(&path, SIZE, PAGE)
            .unwrap();
        if self.snapshots.is_empty() {
            writer.write_full(&self.ram).unwrap();
        } else {
            writer.write_diff(&self.ram, epoch.bitmap()).unwrap();
        }
        writer.commit().unwrap();
        epoch.release().unwrap();
        self.snapshots.push(path.clone());
        path
    }

    pub fn chain(&self) -> Chain {
        let mut chain = Chain::open_raw(&self.snapshots[0], PAGE).unwrap();
        self.snapshots[1..]
            .iter()
            .for_each(|diff| chain.push_raw(diff).unwrap());
        chain
    }

    /// Takes a full image and three diffs. The second diff zeroes what the first wrote.
    pub fn with_history() -> Self {
        let mut guest = Self::new();
        guest.write(0, SIZE / 2, 1);
        guest.save();
        guest.write(3 * PAGE + 100, 5000, 2);
        guest.write(SIZE - 1, 1, 2);
        guest.save();
        guest.write(3 * PAGE, PAGE, 0);
        guest.save();
        guest.write(40 * PAGE, 2 * PAGE, 4);
        guest.save();
        guest
    }

    /// Adds to the history a diff of `pages` pages from page 7 on, which is not in the chain.
    pub fn with_pending_diff(pages: u64) -> (Self, PathBuf) {
        let mut guest = Self::with_history();
        guest.write(7 * PAGE, pages * PAGE, 9);
        let diff = guest.save();
        guest.snapshots.pop();
        (guest, diff)
    }
}

pub fn whole(reader: &impl PageReader) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}
