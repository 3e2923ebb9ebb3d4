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
use nix::sys::resource::{Resource, getrlimit};
use nix::sys::statvfs::fstatvfs;

use crate::failure::Failure;

/// Refuses to write the stored pages of `chain` to a new file if `dir` does not have the room. A
/// raw diff also needs room for zeros that images do not store, as its holes are clean pages.
pub fn check_new(path: &Path, dir: &Path, chain: &Chain, raw_diff: bool) -> Result<(), Failure> {
    // The holes of a raw image are left out as it is read.
    let known = chain.images().all(|image| image.footer().is_some());
    match known {
        true if raw_diff => check_runs(path, dir, chain.covered_runs().collect()),
        true => check_runs(path, dir, chain.stored_runs().collect()),
        false => Ok(()),
    }
}

/// Refuses to write `runs` to a new file if `dir` does not have the room, or if the file would be
/// longer than this process may make one.
pub fn check_runs(path: &Path, dir: &Path, runs: Vec<Range<u64>>) -> Result<(), Failure> {
    check_limit(path, runs.iter().map(|run| run.end - run.start).sum())?;
    match sys::free_in(dir) {
        Some(free) => check(path, runs.into_iter(), &free),
        None => Ok(()),
    }
}

/// Refuses to write `needed` bytes to new files in `dir`, for the output `path`, if `dir` does not
/// have the room.
pub fn check_bytes(path: &Path, dir: &Path, needed: u64) -> Result<(), Failure> {
    match sys::free_in(dir) {
        Some(free) => compare(path, needed, free.bytes),
        None => Ok(()),
    }
}

/// Refuses to write `len` bytes to one new file, for the output `path`, if `RLIMIT_FSIZE` does not
/// permit it: the write would fail there once the bytes before are written.
pub fn check_limit(path: &Path, len: u64) -> Result<(), Failure> {
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((limit, _)) if limit < len => Err(Failure::FileLimit {
            path: path.to_owned(),
            needed: len,
            limit,
        }),
        _ => Ok(()),
    }
}

fn check(path: &Path, runs: impl Iterator<Item = Range<u64>>, free: &Free) -> Result<(), Failure> {
    compare(path, in_blocks(runs, free.block), free.bytes)
}

/// Returns the size of the blocks that `runs` overlap, in bytes.
pub fn in_blocks(runs: impl Iterator<Item = Range<u64>>, block: u64) -> u64 {
    let whole = |run: Range<u64>| run.end.next_multiple_of(block) - run.start / block * block;
    runs.map(whole).sum()
}

/// Refuses to write `needed` bytes if fewer are `available`.
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

/// The file system of an open file.
#[derive(Debug)]
pub struct Place {
    /// The name of the file-system type.
    pub file_system: String,
    /// The mount point, as far as it can be derived from paths.
    pub mount: PathBuf,
    /// Bytes that this user may still write there.
    pub available: u64,
}

impl Place {
    /// Returns the file system of `file`, which is in `dir`.
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

/// The free space of a file system.
#[derive(Debug)]
pub struct Free {
    pub bytes: u64,
    pub block: u64,
    /// The total size in bytes; 0 if the file system does not report it.
    #[cfg(target_os = "linux")]
    pub of: u64,
    /// The free bytes, including the blocks that are reserved for root.
    #[cfg(target_os = "linux")]
    pub with_reserves: u64,
}

#[cfg(target_os = "linux")]
mod sys {
    use std::fs::File;
    use std::path::Path;

    use nix::sys::statfs::{
        EXT4_SUPER_MAGIC, FsType, HUGETLBFS_MAGIC, Statfs, TMPFS_MAGIC, fstatfs, statfs,
    };

    use super::Free;

    /// Returns the space that this user may still write on the file system of `file`. Blocks that
    /// are reserved for root do not count, not even for root: ext4 includes its own reserve in
    /// them.
    pub fn free_for(file: &File) -> nix::Result<Free> {
        let found = fstatfs(file)?;
        let block = u64::try_from(found.block_size()).unwrap_or(4096).max(512);
        Ok(Free {
            bytes: found.blocks_available().saturating_mul(block),
            block,
            of: found.blocks().saturating_mul(block),
            with_reserves: found.blocks_free().saturating_mul(block),
        })
    }

    pub(super) fn free_in(dir: &Path) -> Option<Free> {
        let found = statfs(dir).ok()?;
        free(&found, &[TMPFS_MAGIC, EXT4_SUPER_MAGIC])
    }

    /// Returns `None` for a tmpfs without a limit, such as that of memfds, which has no blocks.
    /// Blocks that are reserved for root count as free, as this user may be root.
    fn free(found: &Statfs, tell: &[FsType]) -> Option<Free> {
        if !tell.contains(&found.filesystem_type()) || found.blocks() == 0 {
            return None;
        }
        let block = u64::try_from(found.block_size()).ok()?;
        Some(Free {
            bytes: found.blocks_free().saturating_mul(block),
            block,
            of: found.blocks().saturating_mul(block),
            with_reserves: found.blocks_free().saturating_mul(block),
        })
    }

    pub fn is_on_tmpfs(file: &File) -> nix::Result<bool> {
        Ok(fstatfs(file)?.filesystem_type() == TMPFS_MAGIC)
    }

    pub fn is_on_hugetlbfs(path: &Path) -> bool {
        statfs(path).is_ok_and(|found| found.filesystem_type() == HUGETLBFS_MAGIC)
    }
}

#[cfg(not(target_os = "linux"))]
mod sys {
    use std::fs::File;
    use std::path::Path;

    use super::Free;

    pub(super) fn free_in(_: &Path) -> Option<Free> {
        None
    }

    #[expect(clippy::unnecessary_wraps, reason = "the signature of Linux")]
    pub fn is_on_tmpfs(_: &File) -> nix::Result<bool> {
        Ok(false)
    }

    pub fn is_on_hugetlbfs(_: &Path) -> bool {
        false
    }
}

#[cfg(target_os = "linux")]
pub use sys::free_for;
pub use sys::{is_on_hugetlbfs, is_on_tmpfs};
