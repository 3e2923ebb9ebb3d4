//! Images that are written page by page, and the RAM that they represent.

// Every test file compiles its own copy of this module and uses a part of it.
#![allow(dead_code, unreachable_pub)]

pub mod lazy_images;
pub mod regions;

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use memory_image::Chain;
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
    const ALONE: &str = "LAZY_RESTORE_TEST_ALONE";
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
