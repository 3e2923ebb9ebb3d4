//! Images that are written page by page.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use page_reader::PageReader;

/// Raw images, and the RAM that they represent.
#[derive(Debug)]
pub struct Images {
    dir: tempfile::TempDir,
    page: u64,
    /// The bytes of the RAM.
    pub ram: Vec<u8>,
    layers: Vec<(PathBuf, Vec<Range<u64>>)>,
}

impl Images {
    /// Creates a directory for images of `size` bytes.
    #[must_use]
    pub fn new(size: u64, page: u64) -> Self {
        Self::within(&std::env::temp_dir(), size, page)
    }

    /// Creates the images in a new directory within `dir`.
    #[must_use]
    pub fn within(dir: &Path, size: u64, page: u64) -> Self {
        Self {
            dir: tempfile::tempdir_in(dir).unwrap(),
            page,
            ram: vec![0; size as usize],
            layers: Vec::new(),
        }
    }

    /// Adds an image that holds these pages, with bytes that differ from every other image.
    #[must_use]
    pub fn with(mut self, pages: impl IntoIterator<Item = Range<u64>>) -> Self {
        let layer = self.layers.len();
        let path = self.dir.path().join(format!("{layer}.mem"));
        let file = File::create(&path).unwrap();
        file.set_len(self.ram.len() as u64).unwrap();
        let bytes = |pages: Range<u64>| pages.start * self.page..pages.end * self.page;
        let runs: Vec<_> = pages.into_iter().map(bytes).collect();
        for run in &runs {
            let ram = &mut self.ram[run.start as usize..run.end as usize];
            for (index, word) in ram.chunks_mut(8).enumerate() {
                let unique = (run.start / 8 + index as u64) * 16 + layer as u64 + 1;
                word.copy_from_slice(&unique.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
            }
            file.write_all_at(ram, run.start).unwrap();
        }
        self.layers.push((path, runs));
        self
    }

    /// Returns the path of each image and the bytes that it holds, oldest first.
    #[must_use]
    pub fn layers(&self) -> &[(PathBuf, Vec<Range<u64>>)] {
        &self.layers
    }

    /// Returns the page size in bytes.
    #[must_use]
    pub fn page(&self) -> u64 {
        self.page
    }

    /// Returns the path of an image.
    #[must_use]
    pub fn path(&self, layer: usize) -> &Path {
        &self.layers[layer].0
    }

    /// Returns the directory of the images.
    #[must_use]
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Truncates an image, as a program does that does not know that the image is in use.
    pub fn cut(&self, layer: usize, size: u64) {
        let file = File::options().write(true).open(self.path(layer)).unwrap();
        file.set_len(size).unwrap();
    }
}

/// Reads the first `size` bytes.
pub fn whole(reader: &impl PageReader, size: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; size];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}
