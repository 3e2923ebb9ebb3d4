//! What the benchmarks share: where they write, and what they write.

#![forbid(unsafe_code)]

use std::path::PathBuf;

use anyhow::{Context, bail};
use sparse_file::Capabilities;

/// The environment variable that names the directory to write to.
pub const DIR: &str = "MEMSNAP_BENCH_DIR";

/// A new directory in `MEMSNAP_BENCH_DIR`, or in `target/` where that is not set, and the name of its file system.
///
/// # Errors
/// The directory can't be made, or it is on tmpfs: writing to memory measures no disk.
pub fn place() -> anyhow::Result<(tempfile::TempDir, String)> {
    let target = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"));
    let parent = std::env::var_os(DIR).map_or_else(target, PathBuf::from);
    std::fs::create_dir_all(&parent).with_context(|| format!("{parent:?}"))?;
    let file_system = Capabilities::probe(&parent)?.file_system;
    if file_system == "tmpfs" {
        bail!("{parent:?} is on tmpfs: set {DIR} to a directory on the disk to be measured");
    }
    Ok((tempfile::tempdir_in(parent)?, file_system))
}

/// Pseudo-random numbers, the same in every run (SplitMix64, Steele et al. 2014).
#[derive(Debug)]
pub struct Random(pub u64);

impl Random {
    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// A guest's RAM of `size` bytes, a multiple of 8, all of it touched and none of it compressible.
#[must_use]
pub fn ram(size: usize) -> Vec<u8> {
    let mut random = Random(1);
    (0..size / 8)
        .flat_map(|_| random.next_u64().to_ne_bytes())
        .collect()
}

/// `count` different numbers below `below`, in no order.
#[must_use]
pub fn scattered(count: u64, below: u64) -> Vec<u64> {
    let mut random = Random(2);
    let mut chosen = std::collections::HashSet::new();
    while (chosen.len() as u64) < count.min(below) {
        chosen.insert(random.next_u64() % below);
    }
    chosen.into_iter().collect()
}

#[cfg(doctest)]
#[doc = include_str!("../../README.md")]
struct Readme;
