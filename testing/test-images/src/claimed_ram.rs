//! Small files that claim much RAM.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use image_format::{Footer, ImageId, ImageKind, Layout, Run, Version};
use test_memory::{peak_memory, reset_peak_memory};

const PAGE: u64 = 4096;
/// The maximum that reading a small file may take in bytes.
const MOST: u64 = 64 << 20;

/// Writes a full image of zeros, in a file of 4 KiB and a footer, and returns its path.
#[must_use]
pub fn image_of_zeros(dir: &Path, ram_size: u64) -> PathBuf {
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::from_bytes([1; 16]),
        kind: ImageKind::Full,
        layout: Layout::Packed,
        ram_size,
        page_size: PAGE,
        regions: vec![0..ram_size],
        runs: vec![Run::zeros(0..ram_size)],
        checksums: Vec::new(),
        metadata: Vec::new(),
    };
    let path = dir.join(format!("{ram_size:#x}.mem"));
    footer.write(&File::create(&path).unwrap()).unwrap();
    assert!(fs::metadata(&path).unwrap().len() < 8192);
    path
}

/// Runs `work`, and asserts that it takes little memory.
///
/// Nothing else of the process may take memory at the same time.
pub fn with_little_memory<T>(what: &str, ram_size: u64, work: impl FnOnce() -> T) -> T {
    reset_peak_memory();
    let before = peak_memory();
    let result = work();
    // The kernel counts pages approximately: the peak may be below the earlier one.
    let taken = peak_memory().saturating_sub(before);
    assert!(
        taken < MOST,
        "{what} of {ram_size:#x} bytes of RAM took {taken}"
    );
    result
}
