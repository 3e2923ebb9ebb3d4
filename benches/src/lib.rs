//! Code shared by the benchmarks: the directory to write to, fio, and scattered numbers.

#![forbid(unsafe_code)]

pub mod fio;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use random::Random;
use sparse_file::Capabilities;

/// The environment variable that names the directory to write to.
pub const DIR: &str = "RAMSNAP_BENCH_DIR";

/// Creates a directory in `RAMSNAP_BENCH_DIR`, or in `target/` if that is not set. Returns it with
/// the name of its file system.
///
/// # Errors
/// The directory can't be created, or it is on tmpfs: writing to memory does not measure a disk.
pub fn place() -> anyhow::Result<(tempfile::TempDir, String)> {
    let target = || PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target"));
    place_in(&std::env::var_os(DIR).map_or_else(target, PathBuf::from))
}

/// Creates a directory in `parent`. Returns it with the name of its file system.
///
/// # Errors
/// As [`place`].
pub fn place_in(parent: &Path) -> anyhow::Result<(tempfile::TempDir, String)> {
    std::fs::create_dir_all(parent)
        .with_context(|| format!("failed to create {}", parent.display()))?;
    let file_system = Capabilities::probe(parent)?.file_system;
    if file_system == "tmpfs" {
        bail!(
            "{} is on tmpfs: choose a directory on the disk to be measured",
            parent.display()
        );
    }
    Ok((tempfile::tempdir_in(parent)?, file_system))
}

/// Returns `count` different numbers below `below`, unordered.
#[must_use]
pub fn scattered(count: u64, below: u64) -> Vec<u64> {
    let mut random = Random::seeded(2);
    let mut chosen = std::collections::HashSet::new();
    while (chosen.len() as u64) < count.min(below) {
        chosen.insert(random.below(below));
    }
    chosen.into_iter().collect()
}
