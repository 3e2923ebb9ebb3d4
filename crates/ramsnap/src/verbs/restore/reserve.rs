//! Reserving room for RAM before existing RAM is overwritten.
//!
//! Rule: no byte of existing RAM changes before the blocks for the new RAM are allocated. It is not
//! enough to compare the needed space with the free space that a file system reports: ext4 reserves
//! blocks for root and for itself, and a hole does not free blocks that files share.
//!
//! - ext4, tmpfs: `fallocate` of missing blocks; existing blocks are overwritten in place.
//! - XFS: `fallocate` with `FALLOC_FL_UNSHARE_RANGE`, as blocks may be shared with a copy.
//! - hugetlbfs: the mapping reserves its pages.
//! - others: nothing, as btrfs writes overwritten data to other blocks. As much as the RAM needs
//!   must be free, and a warning says that this may not be enough.
//!
//! On tmpfs, which counts exactly, the old RAM's own pages count as room if nothing else is left.
//!
//! Room is reserved once all other checks have passed, just before the RAM is overwritten. If that
//! fails, the reserved blocks that are still zeros become holes again. A guest that first writes to
//! such a block between the read and the hole loses what it wrote: no system call makes a hole only
//! of zeros. So a guest must not be started before ramsnap has ended.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

use anyhow::Context;
use memory_image::Chain;
use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statfs::{EXT4_SUPER_MAGIC, TMPFS_MAGIC, XFS_SUPER_MAGIC, fstatfs};
use page_reader::{SecretBuffer, is_zeros};
use sparse_file::{ExtentKind, extents, file_system_name, punch_hole};

use crate::failure::Failure;
use crate::free_space::{self, Free};
use crate::session::Session;
use crate::zeros::without_zeros;

/// Bytes reserved by one call, and between two checks for signals.
const STEP: u64 = 1 << 30;
/// Bytes read at a time.
const CHUNK: usize = 1 << 20;

/// The parts of the RAM to write, and how to write them.
#[derive(Debug)]
pub(super) struct Plan {
    /// The ranges to write. All other ranges are zeros.
    pub(super) runs: Vec<Range<u64>>,
    /// Whether the file must be emptied before anything is written, as it must free blocks first.
    pub(super) empty_first: bool,
    /// Released unless the restore begins.
    pub(super) reserved: Option<Reserved>,
}

impl Plan {
    /// Plans to write the stored pages of `chain` to a file that is emptied first.
    pub(super) fn to_empty(chain: &Chain) -> Self {
        Self {
            runs: chain.stored_runs().collect(),
            empty_first: true,
            reserved: None,
        }
    }

    /// Plans to write the stored pages of `chain`, and zeros between them, to a file that has all
    /// of its blocks.
    pub(super) fn without_reserve(chain: &Chain) -> Self {
        Self {
            runs: chain.stored_runs().collect(),
            empty_first: false,
            reserved: None,
        }
    }

    /// Leaves the reserved blocks to a guest that was started with the file: they are zeros until
    /// it writes to them, and a hole could destroy what it writes.
    pub(super) fn leave_reserved(self) {
        if let Some(reserved) = self.reserved {
            reserved.keep();
        }
    }
}

/// Blocks that were allocated in holes of a file. They become holes again on drop.
#[derive(Debug)]
pub(super) struct Reserved {
    file: File,
    blocks_before: u64,
    /// The holes before the allocation.
    holes: Vec<Range<u64>>,
}

impl Reserved {
    /// Keeps the blocks.
    pub(super) fn keep(mut self) {
        self.holes.clear();
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let blocks = self.file.metadata().map_or(0, |metadata| metadata.blocks());
        if blocks <= self.blocks_before {
            return;
        }
        // The current holes cannot be used: reserved blocks are listed as data once they were
        // read.
        let mut buffer = SecretBuffer::new();
        for hole in &self.holes {
            for at in hole.clone().step_by(CHUNK) {
                let end = hole.end.min(at + CHUNK as u64);
                let bytes = buffer.sized((end - at) as usize);
                let read = self.file.read_exact_at(bytes, at);
                // Another program may have written there in the meantime.
                if read.is_ok() && is_zeros(bytes) {
                    // Blocks that stay reserved are zeros as well.
                    let _ = punch_hole(&self.file, at..end);
                }
            }
        }
    }
}

/// The method by which blocks are reserved on a file system, so that a write cannot fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    /// Allocates missing blocks.
    Allocate,
    /// Allocates missing blocks, on a file system that counts free blocks exactly.
    AllocateOrCount,
    /// Allocates missing and shared blocks.
    Unshare,
    /// Blocks cannot be reserved.
    Unknown,
}

impl Method {
    fn of(file: &File) -> Self {
        match fstatfs(file).map(|found| found.filesystem_type()) {
            Ok(EXT4_SUPER_MAGIC) => Self::Allocate,
            Ok(TMPFS_MAGIC) => Self::AllocateOrCount,
            Ok(XFS_SUPER_MAGIC) => Self::Unshare,
            _ => Self::Unknown,
        }
    }

    fn flags(self) -> FallocateFlags {
        match self {
            Self::Unshare => {
                FallocateFlags::FALLOC_FL_KEEP_SIZE | FallocateFlags::FALLOC_FL_UNSHARE_RANGE
            }
            Self::Allocate | Self::AllocateOrCount | Self::Unknown => {
                FallocateFlags::FALLOC_FL_KEEP_SIZE
            }
        }
    }
}

/// Refuses a `chain` that cannot fit, even if all blocks of `file` are used again and all free
/// blocks can be had. The file does not change.
pub(super) fn check_room(
    session: &Session,
    path: &Path,
    file: &File,
    chain: &Chain,
    holds: bool,
) -> anyhow::Result<()> {
    let looking = || format!("cannot look at {path:?}");
    let free = free_space::free_for(file).with_context(looking)?;
    // Memfds and some network file systems have no size.
    if free.of == 0 {
        return Ok(());
    }
    let method = Method::of(file);
    let stored: Vec<_> = chain.stored_runs().collect();
    let in_blocks = |runs: &[Range<u64>]| free_space::in_blocks(runs.iter().cloned(), free.block);
    if method == Method::Unknown {
        let available = available_unreserved(file, &free, holds).with_context(looking)?;
        return Ok(free_space::compare(path, in_blocks(&stored), available)?);
    }
    let own = file.metadata().with_context(looking)?.blocks() * 512;
    let most = free.with_reserves.saturating_add(own);
    if in_blocks(&stored) <= most {
        return Ok(());
    }
    // Stored zeros need no room.
    let needed = in_blocks(&without_zeros(session, chain, &stored)?);
    match needed <= most {
        true => Ok(()),
        false => Err(no_room(method, path, needed, &free, own).into()),
    }
}

/// Returns the error for a file system that does not have the `needed` bytes for a file that has
/// `own` bytes.
fn no_room(method: Method, path: &Path, needed: u64, free: &Free, own: u64) -> Failure {
    let path = path.to_owned();
    match method {
        Method::AllocateOrCount => Failure::NoRoom {
            path,
            needed,
            available: free.bytes.saturating_add(own),
        },
        Method::Allocate | Method::Unshare | Method::Unknown => Failure::NoRoomOver {
            path,
            needed,
            available: free.bytes,
        },
    }
}

/// Ensures that the stored pages of `chain` can be written to `file`, at `path`. The file has RAM
/// if `holds` is set, and only zeros otherwise. No byte of the file changes.
pub(super) fn reserve(
    session: &Session,
    path: &Path,
    file: &File,
    chain: &Chain,
    holds: bool,
) -> anyhow::Result<Plan> {
    let looking = || format!("cannot look at {path:?}");
    let blocks_before = file.metadata().with_context(looking)?.blocks();
    let method = Method::of(file);
    let stored: Vec<_> = chain.stored_runs().collect();
    if method == Method::Unknown {
        return unreserved(session, path, file, stored, holds);
    }
    let holes = || -> io::Result<Vec<Range<u64>>> {
        let listed =
            extents(file)?.filter(|it| it.as_ref().map_or(true, |it| it.kind == ExtentKind::Hole));
        listed.map(|extent| Ok(extent?.range)).collect()
    };
    let holes = holes().with_context(looking)?;
    let take = |runs: &[Range<u64>]| -> anyhow::Result<Option<Reserved>> {
        let file = file.try_clone().with_context(looking)?;
        let reserved = Reserved {
            file,
            blocks_before,
            holes: holes.clone(),
        };
        match allocate(session, &reserved.file, runs, method.flags()) {
            Ok(()) => Ok(Some(reserved)),
            Err(Errno::ENOSPC | Errno::EDQUOT) => Ok(None),
            Err(Errno::ECANCELED) => {
                session.check("the output was not written to")?;
                Ok(None)
            }
            Err(errno) => Err(errno.into()),
        }
    };
    let plan = |runs, reserved| Plan {
        runs,
        empty_first: false,
        reserved: Some(reserved),
    };
    match take(&stored) {
        Ok(Some(reserved)) => return Ok(plan(stored, reserved)),
        Ok(None) => {}
        Err(error) if error.downcast_ref() == Some(&Errno::EOPNOTSUPP) => {
            return unreserved(session, path, file, stored, holds);
        }
        Err(error) => {
            return Err(error.context(format!("cannot reserve room for the RAM in {path:?}")));
        }
    }
    // Stored zeros need no room.
    let needed = without_zeros(session, chain, &stored)?;
    if let Some(reserved) = take(&needed)? {
        return Ok(plan(needed, reserved));
    }
    let free = free_space::free_for(file).with_context(looking)?;
    let bytes = free_space::in_blocks(needed.iter().cloned(), free.block);
    let own = blocks_before * 512;
    if method == Method::AllocateOrCount && bytes <= free.bytes.saturating_add(own) {
        return Ok(Plan {
            runs: needed,
            empty_first: true,
            reserved: None,
        });
    }
    Err(no_room(method, path, bytes, &free, own).into())
}

/// Handles file systems on which blocks cannot be reserved: requires as much free space as the RAM
/// needs, as the blocks of the old RAM may not be freed in time, and warns.
fn unreserved(
    session: &Session,
    path: &Path,
    file: &File,
    stored: Vec<Range<u64>>,
    holds: bool,
) -> anyhow::Result<Plan> {
    let looking = || format!("cannot look at {path:?}");
    let free = free_space::free_for(file).with_context(looking)?;
    // Some network file systems do not report their size.
    if free.of > 0 {
        let needed = free_space::in_blocks(stored.iter().cloned(), free.block);
        let available = available_unreserved(file, &free, holds).with_context(looking)?;
        free_space::compare(path, needed, available)?;
    }
    let name = file_system_name(file).with_context(looking)?;
    let then = match holds {
        true => "the RAM is lost",
        false => "the file is left empty",
    };
    session.warn(&format!(
        "{path:?} is on {name}, where ramsnap cannot reserve room: if another program fills it up during the restore, \
         {then}"
    ));
    Ok(Plan {
        runs: stored,
        empty_first: true,
        reserved: None,
    })
}

/// Returns the space for RAM that is not reserved. The blocks of a file that holds nothing count,
/// as they are written to or freed first.
fn available_unreserved(file: &File, free: &Free, holds: bool) -> io::Result<u64> {
    let own = match holds {
        true => 0,
        false => file.metadata()?.blocks() * 512,
    };
    Ok(free.bytes.saturating_add(own))
}

/// Allocates blocks. Fails with `ECANCELED` if a signal came.
fn allocate(
    session: &Session,
    file: &impl AsFd,
    runs: &[Range<u64>],
    flags: FallocateFlags,
) -> nix::Result<()> {
    for run in runs {
        let mut at = run.start;
        while at < run.end {
            if session.is_cancelled() {
                return Err(Errno::ECANCELED);
            }
            let len = STEP.min(run.end - at);
            let (start, size) = (at.try_into(), len.try_into());
            let (Ok(start), Ok(size)) = (start, size) else {
                return Err(Errno::EFBIG);
            };
            match fallocate(file, flags, start, size) {
                Ok(()) => at += len,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(())
}
