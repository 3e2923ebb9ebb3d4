//! Images that are written page by page, and the RAM that they represent.

// Every test file compiles its own copy of this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

#[cfg(target_os = "linux")]
pub mod many_images;
pub mod raw_guest;
pub mod sealed_guest;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use image_format::{Checksums, Footer, ImageKind, Layout, Run, Version, packed_start};
use memory_image::{Chain, ImageId};
use page_reader::PageReader;

pub struct Images {
    dir: tempfile::TempDir,
    page: u64,
    pub ram: Vec<u8>,
    layers: Vec<(PathBuf, Vec<Range<u64>>)>,
}

impl Images {
    pub fn new(size: u64, page: u64) -> Self {
        Self::within(&std::env::temp_dir(), size, page)
    }

    /// Creates the images in a new directory within `dir`.
    pub fn within(dir: &Path, size: u64, page: u64) -> Self {
        Self {
            dir: tempfile::tempdir_in(dir).unwrap(),
            page,
            ram: vec![0; size as usize],
            layers: Vec::new(),
        }
    }

    /// Adds an image that holds these pages, with bytes that differ from every other image.
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

    pub fn chain(&self) -> Chain {
        let mut chain = Chain::open_raw(self.path(0), self.page).unwrap();
        for (path, runs) in &self.layers[1..] {
            chain.push_pages(path, runs.iter().cloned()).unwrap();
        }
        chain
    }

    pub fn path(&self, layer: usize) -> &Path {
        &self.layers[layer].0
    }

    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Truncates an image, as a program does that does not know that the image is in use.
    pub fn cut(&self, layer: usize, size: u64) {
        let file = File::options().write(true).open(self.path(layer)).unwrap();
        file.set_len(size).unwrap();
    }
}

pub fn whole(reader: &impl PageReader, size: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; size];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Returns whether this process runs only `test`. If not, runs the test in a child process and
/// asserts that it passes: the test changes limits of the whole process.
pub fn is_alone(test: &str) -> bool {
    const ALONE: &str = "MEMORY_IMAGE_TEST_ALONE";
    if std::env::var_os(ALONE).is_some() {
        return true;
    }
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(ALONE, "1")
        .output()
        .unwrap();
    let (stdout, stderr) = (
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr),
    );
    assert!(output.status.success(), "{stdout}{stderr}");
    assert!(stdout.contains("1 passed"), "{test} was not found");
    false
}

/// Writes a packed image of `ram_size` bytes with the bytes of these pages, without `MemoryWriter`,
/// whose staging takes ten times as long. An image without a parent is full, and its other pages
/// are zeros.
pub fn write_packed(
    path: &Path,
    ram_size: u64,
    page: u64,
    parent: Option<ImageId>,
    pages: &[(u64, Vec<u8>)],
) -> ImageId {
    let file = File::create(path).unwrap();
    let mut checksums = Checksums::new(ram_size);
    let (mut runs, mut end, mut offset) = (Vec::new(), 0, packed_start(page));
    let zeros = |runs: &mut Vec<Run>, range: Range<u64>| {
        if parent.is_none() && !range.is_empty() {
            runs.push(Run::zeros(range));
        }
    };
    for (number, bytes) in pages {
        let range = number * page..(number + 1) * page;
        file.write_all_at(bytes, offset).unwrap();
        checksums.update(range.start, bytes);
        zeros(&mut runs, end..range.start);
        end = range.end;
        runs.push(Run::present(range, offset));
        offset += page;
    }
    zeros(&mut runs, end..ram_size);
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::random().unwrap(),
        kind: match parent {
            None => ImageKind::Full,
            parent => ImageKind::Diff { parent },
        },
        layout: Layout::Packed,
        ram_size,
        page_size: page,
        regions: vec![0..ram_size],
        runs,
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    footer.write(&file).unwrap();
    footer.id
}
