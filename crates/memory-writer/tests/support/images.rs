//! Writes and reads sealed and packed images.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use image_format::{ChunkSum, Footer, Storage};
use memory_writer::{Layout, MemoryWriter, MemoryWriterOptions, Seal};

/// The page size of the images.
pub(crate) const PAGE: u64 = 4096;

/// Applies the image at `path` to `ram`, after checking every checksum in it.
pub(crate) fn applied(path: &Path, mut ram: Vec<u8>) -> (Footer, Vec<u8>) {
    let file = File::open(path).unwrap();
    let footer = Footer::read(&file).expect("it is sealed");
    for chunk in footer.chunks() {
        let mut sum = ChunkSum::new();
        for (range, at) in chunk.pieces() {
            let bytes = &mut ram[range.start as usize..range.end as usize];
            file.read_exact_at(bytes, at).unwrap();
            sum.update(bytes);
        }
        assert_eq!(sum.finish(), chunk.checksum, "chunk {}", chunk.number);
    }
    for run in &footer.runs {
        if run.stored == Storage::Zeros {
            ram[run.start as usize..run.range().end as usize].fill(0);
        }
    }
    (footer, ram)
}

/// Returns options for an image with this layout and seal.
pub(crate) fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options().layout(layout).seal(seal)
}

/// Returns a bitmap for RAM of `size` bytes in which `pages` are marked.
pub(crate) fn dirty(size: u64, pages: &[u64]) -> DirtyBitmap {
    let dirty = DirtyBitmap::new(0, size, PAGE).unwrap();
    for page in pages {
        dirty.mark_page(*page).unwrap();
    }
    dirty
}
