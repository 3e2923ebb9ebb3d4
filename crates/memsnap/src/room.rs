//! Whether a file system has room, asked before anything is written.
//!
//! Only what is certain counts: ext4 and tmpfs store every byte once. Others compress, or share
//! blocks, and say no when they are full.

use std::ops::Range;
use std::path::Path;

use memory_image::Chain;

use crate::failure::Failure;

/// Refuses to write what `chain` stores to a new file in `dir` that cannot hold it.
pub fn check_new(path: &Path, dir: &Path, chain: &Chain) -> Result<(), Failure> {
    // Of a raw image the holes are left out as it is read.
    let known = chain.images().all(|image| image.footer().is_some());
    match sys::free_in(dir) {
        Some(free) if known => check(path, chain, &free, 0),
        _ => Ok(()),
    }
}

/// Refuses to write what `chain` stores over a file that has `has` bytes already.
#[cfg(target_os = "linux")]
pub fn check_over(
    path: &Path,
    file: &std::fs::File,
    has: u64,
    chain: &Chain,
) -> Result<(), Failure> {
    match sys::free_for(file) {
        Some(free) => check(path, chain, &free, has),
        None => Ok(()),
    }
}

fn check(path: &Path, chain: &Chain, free: &Free, has: u64) -> Result<(), Failure> {
    let block = free.block;
    let whole = |run: Range<u64>| run.end.next_multiple_of(block) - run.start / block * block;
    let needed = chain.stored_runs().map(whole).sum();
    let available = free.bytes.saturating_add(has);
    if needed <= available {
        return Ok(());
    }
    Err(Failure::NoRoom {
        path: path.to_owned(),
        needed,
        available,
    })
}

struct Free {
    bytes: u64,
    block: u64,
}

#[cfg(target_os = "linux")]
mod sys {
    use std::fs::File;
    use std::path::Path;

    use nix::sys::statfs::{
        EXT4_SUPER_MAGIC, FsType, HUGETLBFS_MAGIC, Statfs, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs,
        statfs,
    };

    use super::Free;

    /// XFS shares blocks with what a new file is a copy of, but not with what is written to it.
    pub(super) fn free_for(file: &File) -> Option<Free> {
        let found = fstatfs(file).ok()?;
        free(&found, &[TMPFS_MAGIC, EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC])
    }

    pub(super) fn free_in(dir: &Path) -> Option<Free> {
        let found = statfs(dir).ok()?;
        free(&found, &[TMPFS_MAGIC, EXT4_SUPER_MAGIC])
    }

    /// A tmpfs without a limit, as that of memfds, has no blocks. What is reserved for root counts as
    /// free: this may be root.
    fn free(found: &Statfs, tell: &[FsType]) -> Option<Free> {
        if !tell.contains(&found.filesystem_type()) || found.blocks() == 0 {
            return None;
        }
        let block = u64::try_from(found.block_size()).ok()?;
        Some(Free {
            bytes: found.blocks_free().saturating_mul(block),
            block,
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

pub use sys::is_on_hugetlbfs;
