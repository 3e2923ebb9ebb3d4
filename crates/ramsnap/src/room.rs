//! Whether a file system has room, asked before anything is written.
//!
//! Only what is certain counts: ext4 and tmpfs store every byte once. Others compress, or share
//! blocks, and say no when they are full.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use memory_image::Chain;
use nix::sys::statvfs::fstatvfs;

use crate::failure::Failure;

/// Refuses to write what `chain` stores to a new file in `dir` that cannot hold it; if it is a raw
/// diff, with zeros that images merely name: its holes are clean pages.
pub fn check_new(path: &Path, dir: &Path, chain: &Chain, raw_diff: bool) -> Result<(), Failure> {
    // Of a raw image the holes are left out as it is read.
    let known = chain.images().all(|image| image.footer().is_some());
    match sys::free_in(dir) {
        Some(free) if known && raw_diff => check(path, chain.known_runs(), &free),
        Some(free) if known => check(path, chain.stored_runs(), &free),
        _ => Ok(()),
    }
}

/// Refuses to write `runs` to a new file in `dir` that cannot hold them.
pub fn check_runs(path: &Path, dir: &Path, runs: Vec<Range<u64>>) -> Result<(), Failure> {
    match sys::free_in(dir) {
        Some(free) => check(path, runs.into_iter(), &free),
        None => Ok(()),
    }
}

/// Refuses to write `needed` bytes to new files in `dir`, for the output `path`, where there is not
/// so much room.
pub fn check_bytes(path: &Path, dir: &Path, needed: u64) -> Result<(), Failure> {
    match sys::free_in(dir) {
        Some(free) => compare(path, needed, free.bytes),
        None => Ok(()),
    }
}

fn check(path: &Path, runs: impl Iterator<Item = Range<u64>>, free: &Free) -> Result<(), Failure> {
    compare(path, in_blocks(runs, free.block), free.bytes)
}

/// The bytes of the blocks that `runs` reach into.
pub fn in_blocks(runs: impl Iterator<Item = Range<u64>>, block: u64) -> u64 {
    let whole = |run: Range<u64>| run.end.next_multiple_of(block) - run.start / block * block;
    runs.map(whole).sum()
}

/// Refuses to write `needed` bytes where `available` are.
pub fn compare(path: &Path, needed: u64, available: u64) -> Result<(), Failure> {
    if needed <= available {
        return Ok(());
    }
    Err(Failure::NoRoom {
        path: path.to_owned(),
        needed,
        available,
    })
}

/// The file system that an open file is on.
#[derive(Debug)]
pub struct Place {
    /// What it calls itself.
    pub file_system: String,
    /// Where it is mounted, as far as its paths tell.
    pub mount: PathBuf,
    /// Bytes that this user may still write there.
    pub available: u64,
}

impl Place {
    /// That of `file`, which is in `dir`.
    pub fn of(file: &File, dir: &Path) -> io::Result<Self> {
        let found = fstatvfs(file)?;
        // The types differ from system to system.
        #[allow(clippy::unnecessary_cast)]
        let (blocks, unit) = (
            found.blocks_available() as u64,
            found.fragment_size() as u64,
        );
        let dir = dir.canonicalize()?;
        let device = dir.metadata()?.dev();
        let is_on_it = |path: &&Path| path.metadata().is_ok_and(|it| it.dev() == device);
        let mount = dir.ancestors().take_while(is_on_it).last().unwrap_or(&dir);
        Ok(Self {
            file_system: sparse_file::file_system_name(file)?,
            mount: mount.to_owned(),
            available: blocks.saturating_mul(unit),
        })
    }
}

/// What a file system has left.
#[derive(Debug)]
pub struct Free {
    pub bytes: u64,
    pub block: u64,
    /// Bytes in all: 0 where it does not say.
    #[cfg(target_os = "linux")]
    pub of: u64,
}

#[cfg(target_os = "linux")]
mod sys {
    use std::fs::File;
    use std::path::Path;

    use nix::sys::statfs::{
        EXT4_SUPER_MAGIC, FsType, HUGETLBFS_MAGIC, Statfs, TMPFS_MAGIC, fstatfs, statfs,
    };

    use super::Free;

    /// What this user may still write to the file system of `file`. Blocks that are kept for root
    /// do not count, also for root: ext4 counts what it keeps for itself among them.
    pub fn free_for(file: &File) -> nix::Result<Free> {
        let found = fstatfs(file)?;
        let block = u64::try_from(found.block_size()).unwrap_or(4096).max(512);
        Ok(Free {
            bytes: found.blocks_available().saturating_mul(block),
            block,
            of: found.blocks().saturating_mul(block),
        })
    }

    pub(super) fn free_in(dir: &Path) -> Option<Free> {
        let found = statfs(dir).ok()?;
        free(&found, &[TMPFS_MAGIC, EXT4_SUPER_MAGIC])
    }

    /// A tmpfs without a limit, as that of memfds, has no blocks. What is reserved for root counts
    /// as free: this may be root.
    fn free(found: &Statfs, tell: &[FsType]) -> Option<Free> {
        if !tell.contains(&found.filesystem_type()) || found.blocks() == 0 {
            return None;
        }
        let block = u64::try_from(found.block_size()).ok()?;
        Some(Free {
            bytes: found.blocks_free().saturating_mul(block),
            block,
            of: found.blocks().saturating_mul(block),
        })
    }

    pub fn is_on_hugetlbfs(path: &Path) -> bool {
        statfs(path).is_ok_and(|found| found.filesystem_type() == HUGETLBFS_MAGIC)
    }
}

#[cfg(not(target_os = "linux"))]
mod sys {
    use std::path::Path;

    use super::Free;

    pub(super) fn free_in(_: &Path) -> Option<Free> {
        None
    }

    pub fn is_on_hugetlbfs(_: &Path) -> bool {
        false
    }
}

#[cfg(target_os = "linux")]
pub use sys::free_for;
pub use sys::is_on_hugetlbfs;
