//! Image files of a machine's saves, and their accumulated contents.

use std::io;
use std::path::Path;

use dirty_bitmap::{TakenBitmap, TrackedEpoch};
use memory_writer::{Durability, MemoryWriter, SnapshotError};
use page_reader::PageReader;

use crate::backend::Backend;
use crate::machine::Machine;

/// Images on disk, one for each save, and the contents of all of them together.
pub(crate) struct Images {
    dir: tempfile::TempDir,
    saved: Vec<u8>,
    count: usize,
}

impl Images {
    pub(crate) fn new(machine: &Machine<impl Backend>) -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            saved: vec![0; machine.layout().ram_size() as usize],
            count: 0,
        }
    }

    pub(crate) fn writer(&mut self, machine: &Machine<impl Backend>) -> MemoryWriter {
        self.count += 1;
        let path = self.dir.path().join(self.count.to_string());
        MemoryWriter::options()
            .durability(Durability::None)
            // The epochs record the pages of the images.
            .allow_ambiguous_diff(true)
            .open(
                path,
                machine.layout().ram_size(),
                machine.bitmap().page_size(),
            )
            .unwrap()
    }

    /// Saves the pages of an epoch.
    pub(crate) fn save(&mut self, machine: &Machine<impl Backend>, epoch: TrackedEpoch) {
        let mut writer = self.writer(machine);
        writer.write_diff(machine.ram(), epoch.bitmap()).unwrap();
        self.commit(writer, epoch.bitmap());
        epoch.release().unwrap();
    }

    pub(crate) fn commit(&mut self, writer: MemoryWriter, pages: &TakenBitmap) {
        let path = writer.dest_path().to_owned();
        writer.commit().unwrap();
        self.merge(&path, pages);
        std::fs::remove_file(path).unwrap();
    }

    pub(crate) fn merge(&mut self, path: &Path, pages: &TakenBitmap) {
        let file = page_reader::FileReader::new(std::fs::File::open(path).unwrap());
        for run in pages.runs() {
            let to = &mut self.saved[run.start as usize..run.end as usize];
            file.read_at(run.start, to).unwrap();
        }
    }

    /// Makes a save that fails half-way.
    pub(crate) fn fail(&mut self, machine: &Machine<impl Backend>, epoch: TrackedEpoch) {
        let middle = epoch.bitmap().runs().map(|run| run.start).last();
        let reader = UpTo(machine.ram(), middle.unwrap_or(0));
        let mut writer = self.writer(machine);
        let failed = writer.write_diff(&reader, epoch.bitmap());
        let error = failed.unwrap_err();
        assert!(matches!(error, SnapshotError::MemoryIo { .. }), "{error}");
    }

    pub(crate) fn assert_same_as(&self, machine: &Machine<impl Backend>, when: &str) {
        let page_size = machine.bitmap().page_size() as usize;
        let ram = machine.image();
        let pages = self.saved.chunks(page_size).zip(ram.chunks(page_size));
        let lost: Vec<_> = (0..)
            .step_by(page_size)
            .zip(pages)
            .filter(|(_, (saved, ram))| saved != ram)
            .map(|(offset, _)| format!("{offset:#x}"))
            .collect();
        assert!(lost.is_empty(), "{when}: pages lost: {lost:?}");
    }
}

/// A reader that fails from an offset on.
pub(crate) struct UpTo<'a>(&'a (dyn PageReader + Send + Sync), u64);

impl PageReader for UpTo<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        if offset + buf.len() as u64 > self.1 {
            return Err(io::Error::other("read past the limit"));
        }
        self.0.read_at(offset, buf)
    }
}

/// Makes the first checkpoint and its image.
pub(crate) fn saved_whole(machine: &Machine<impl Backend>) -> Images {
    let mut images = Images::new(machine);
    let epoch = machine.checkpoint().unwrap();
    assert_eq!(epoch.bitmap().dirty_bytes(), machine.layout().ram_size());
    images.save(machine, epoch);
    images.assert_same_as(machine, "first save");
    images
}
