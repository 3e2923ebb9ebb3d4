//! A guest whose snapshots are sealed or packed images.

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use image_format::{Checksums, Footer, ImageKind, Placement, Run, Version};
use memory_image::{Chain, Image, ImageId, VerifyError, VerifyReport};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;

pub const PAGE: u64 = 4096;

pub const SIZE: u64 = 3 << 20;

/// A guest with dirty tracking, and its snapshots.
pub struct Guest {
    pub dir: tempfile::TempDir,
    pub ram: Vec<u8>,
    pub dirty: DirtyBitmap,
    pub snapshots: Vec<PathBuf>,
    pub newest: Option<ImageId>,
}

pub fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
}

impl Guest {
    pub fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            ram: vec![0; SIZE as usize],
            dirty: DirtyBitmap::new(0, SIZE, PAGE).unwrap(),
            snapshots: Vec::new(),
            newest: None,
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&mut self, at: u64, len: u64, value: u8) {
        let end = (at + len).min(SIZE);
        self.ram[at as usize..end as usize].fill(value);
        self.dirty.mark_range(at, end - at).unwrap();
    }

    pub fn save(&mut self, layout: Layout) -> PathBuf {
        let path = self.path(&format!("{}.mem", self.snapshots.len()));
        let taken = self.dirty.drain().unwrap();
        let seal = match self.newest {
            Some(parent) => Seal::new().parent(parent),
            None => Seal::new(),
        };
        let mut writer = options(layout, seal)
            .skip_zeros(true)
            .open(&path, SIZE, PAGE)
            .unwrap();
        if self.snapshots.is_empty() {
            writer.write_full(&self.ram).unwrap();
        } else {
            writer.write_diff(&self.ram, &taken).unwrap();
        }
        self.newest = writer.image_id();
        writer.commit().unwrap();
        self.snapshots.push(path.clone());
        path
    }

    /// Takes a full image and three diffs. The second diff zeroes what the first wrote.
    pub fn with_history(layout: Layout) -> Self {
        let mut guest = Self::new();
        guest.write(PAGE, SIZE / 2, 1);
        guest.save(layout);
        guest.write(3 * PAGE + 100, 5000, 2);
        guest.write(SIZE - 1, 1, 2);
        guest.save(layout);
        guest.write(3 * PAGE, PAGE, 0);
        guest.save(layout);
        guest.write(40 * PAGE, 2 * PAGE, 4);
        guest.write(255 * PAGE, 2 * PAGE, 5);
        guest.save(layout);
        guest
    }

    pub fn chain(&self) -> Chain {
        Chain::open_sealed(&self.snapshots).unwrap()
    }
}

pub fn whole(reader: &impl PageReader) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

pub fn verify(path: &Path) -> Result<VerifyReport, VerifyError> {
    Image::open(path)
        .unwrap()
        .verify(&mut |_| ControlFlow::Continue(()))
}

/// Writes a diff with a hand-made footer: pages 1 and 2 are zeros, page 5 is present.
pub fn diff_with_zeros(path: &Path, parent: Option<ImageId>, layout: Layout) -> Footer {
    let file = File::create(path).unwrap();
    let start = layout.data_start(PAGE);
    let at = match layout.placement() {
        Placement::ByOffset => start + 5 * PAGE,
        Placement::Appended => start,
    };
    let bytes = [9; PAGE as usize];
    file.write_all_at(&bytes, at).unwrap();
    let mut checksums = Checksums::new(SIZE);
    checksums.update(5 * PAGE, &bytes);
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::random().unwrap(),
        kind: ImageKind::Diff { parent },
        layout,
        ram_size: SIZE,
        page_size: PAGE,
        regions: vec![0..SIZE],
        runs: vec![
            Run::zeros(PAGE..3 * PAGE),
            Run::present(5 * PAGE..6 * PAGE, at),
        ],
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    footer.write(&file).unwrap();
    footer
}
