//! Decides whether the holes of a file identify the pages that were written.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::fsync;

use crate::holes::{HolesUnknown, check_holes_are_zeros, file_system_name};
use crate::probe::{Capabilities, ProbeError, SeekHole, WrittenZeros};
use crate::sys;

/// The reason why the written pages of a file cannot be distinguished from the holes between them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagesUnknown {
    /// The holes that are reported for the file are not used.
    #[error(transparent)]
    Holes(#[from] HolesUnknown),
    /// The file is a mount of its own (a bind mount of a single file), so no other file of the
    /// directory is on the same file system.
    #[error("the file is a mount point, so its file system cannot be probed through its directory")]
    MountedAlone,
    /// The file is in a lower layer of an overlayfs, and new files in its directory are stored on
    /// another file system.
    #[error(
        "the file is in a lower layer of an overlayfs, on another file system than new files: copy \
         it to a directory on ext4, XFS, btrfs or tmpfs, or mount its directory into the container"
    )]
    OtherLayer,
    /// The directory could not be probed. The probe needs write access.
    #[error("failed to probe the file system: {0}")]
    Probe(#[from] ProbeError),
    /// The file system does not keep holes as small as a page.
    #[error(
        "the file system ({file_system}) keeps no holes of {page_size} bytes: use pages of at \
         least {granularity} bytes"
    )]
    Coarse {
        /// The name of the file system.
        file_system: String,
        /// The page size in bytes.
        page_size: u64,
        /// The smallest hole that was kept, in bytes.
        granularity: u64,
    },
    /// The probe found that written bytes are reported as a hole, or holes as data.
    #[error("the file system ({file_system}) does not report which bytes were written")]
    NotReported {
        /// The name of the file system.
        file_system: String,
    },
    /// Blocks were reserved for the file and not written: by `fallocate`, or by the file system,
    /// as XFS does for a file that grows. They are reported as a hole until they are read, and then
    /// as data while they are in the page cache.
    #[error(
        "the blocks at {offset:#x} are reserved but not written: set the size of the file before \
         it is written, and do not preallocate it"
    )]
    Reserved {
        /// The offset of the first such block in bytes.
        offset: u64,
    },
    /// The file system writes zeros around data that is written to reserved blocks, so that the
    /// rest of these blocks is reported as data: ext4 with `dioread_lock`, `data=journal` or
    /// `nodelalloc`.
    #[error(
        "ext4 is mounted with {option} and writes zeros around data in reserved blocks: mount it \
         without this option"
    )]
    ZerosBeside {
        /// The mount option as the system names it.
        option: &'static str,
    },
    /// The directory has an extent size hint, which XFS gives to new files: the rest of each extent
    /// is reserved and not written.
    #[error(
        "the file has an extent size hint of {size} bytes, which it got from its directory, so blocks \
         beside its pages are reserved: remove the hint with `xfs_io -c 'extsize 0' DIR`, or use \
         another directory"
    )]
    ExtentSize {
        /// The hint in bytes.
        size: u32,
    },
    /// The file could not be synced, and a sync may change its reported extents.
    #[error("failed to sync the file: {0}")]
    Sync(#[source] io::Error),
}

/// The smallest hole that the probe examines.
const MIN_GRANULARITY: u64 = 4096;

/// Checks whether the holes of files identify the pages that were written. Probes each directory
/// once.
#[derive(Debug, Default)]
pub struct PageHoles {
    probed: Vec<(PathBuf, Capabilities)>,
}

impl PageHoles {
    /// Creates a checker without probe results.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns `Ok` if the holes of a new `file` are expected to identify written pages of
    /// `page_size` bytes. [`check`](Self::check) then fails only for reasons that cannot be known
    /// in advance. Writes nothing.
    ///
    /// # Errors
    /// - [`PagesUnknown::Holes`].
    /// - [`PagesUnknown::Coarse`] if a page is smaller than 4 KiB or a block of the file system.
    /// - [`PagesUnknown::ZerosBeside`].
    /// - [`PagesUnknown::ExtentSize`].
    pub fn check_new(file: &File, page_size: u64) -> Result<(), PagesUnknown> {
        check_holes_are_zeros(file)?;
        if let Some(option) = sys::zeros_beside(file).map_err(HolesUnknown::Io)? {
            return Err(PagesUnknown::ZerosBeside { option });
        }
        if let Some(size) = sys::extent_size_hint(file) {
            return Err(PagesUnknown::ExtentSize { size });
        }
        let block = sys::file_system_block(file).map_err(HolesUnknown::Io)?;
        let granularity = block.max(MIN_GRANULARITY);
        if granularity <= page_size {
            return Ok(());
        }
        Err(PagesUnknown::Coarse {
            file_system: file_system_name(file).map_err(HolesUnknown::Io)?,
            page_size,
            granularity,
        })
    }

    /// Returns `Ok` if all reserved blocks of `file` were written. Sync the file first: blocks that
    /// are being written may count as reserved.
    ///
    /// # Errors
    /// Returns [`PagesUnknown::Reserved`] or [`PagesUnknown::Holes`].
    pub fn check_reserved(file: &File) -> Result<(), PagesUnknown> {
        match sys::first_unwritten(file).map_err(HolesUnknown::Io)? {
            Some(offset) => Err(PagesUnknown::Reserved { offset }),
            None => Ok(()),
        }
    }

    /// Returns `Ok` if the written pages of `file`, in `dir`, are reported as data and all others
    /// as a hole, down to pages of `page_size` bytes.
    ///
    /// This requires more than [`check_holes_are_zeros`]: the file system must not have filled a
    /// hole, nor turned written zeros into a hole. [`Capabilities::probe`] probes `dir`, which
    /// writes an unnamed file there. `file` is synced, because delayed allocation may cover more
    /// than was written. Reserved blocks that were not written are refused: they are reported as
    /// data once they were read.
    ///
    /// The check cannot detect:
    ///
    /// - A copy of the file that filled some of its holes, or punched out pages of zeros.
    /// - On tmpfs, holes that were read through a mapping, which fills them, and blocks that
    ///   overlapping calls of `fallocate` reserved.
    /// - A file that was written through a mapping. One store can fill the holes around its page
    ///   with zeros: ext4, XFS and tmpfs allocate blocks for a whole folio of the page cache, which
    ///   may have many pages.
    /// - On ext4, blocks that another program reserved and wrote in part before the file system got
    ///   its present mount options (see [`PagesUnknown::ZerosBeside`]).
    /// - The mount options of an ext4 that stores the file under overlayfs.
    ///
    /// # Errors
    /// Returns a [`PagesUnknown`].
    pub fn check(&mut self, file: &File, dir: &Path, page_size: u64) -> Result<(), PagesUnknown> {
        Self::check_new(file, page_size)?;
        fsync(file).map_err(|errno| PagesUnknown::Sync(errno.into()))?;
        Self::check_reserved(file)?;
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        let on_one_mount = File::open(dir).and_then(|dir| sys::on_one_mount(file, &dir));
        if !on_one_mount.map_err(HolesUnknown::Io)? {
            return Err(PagesUnknown::MountedAlone);
        }
        if sys::is_layered(file).map_err(HolesUnknown::Io)? {
            let beside = tempfile::tempfile_in(dir).map_err(|source| ProbeError::CreateFile {
                dir: dir.into(),
                source,
            })?;
            if !sys::on_one_layer(file, &beside).map_err(HolesUnknown::Io)? {
                return Err(PagesUnknown::OtherLayer);
            }
        }
        let known = self.probed.iter().position(|(probed, _)| probed == dir);
        let known = match known {
            Some(known) => known,
            None => {
                let here = Capabilities::probe(dir)?;
                self.probed.push((dir.to_owned(), here));
                self.probed.len() - 1
            }
        };
        check_capabilities(&self.probed[known].1, page_size)
    }
}

fn check_capabilities(here: &Capabilities, page_size: u64) -> Result<(), PagesUnknown> {
    let file_system = || here.file_system.clone();
    match (here.seek_hole, here.written_zeros) {
        (SeekHole::Exact { granularity }, WrittenZeros::Data) if granularity <= page_size => Ok(()),
        (SeekHole::Exact { granularity }, WrittenZeros::Data) => Err(PagesUnknown::Coarse {
            file_system: file_system(),
            page_size,
            granularity,
        }),
        _ => Err(PagesUnknown::NotReported {
            file_system: file_system(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const EXACT: SeekHole = SeekHole::Exact { granularity: 4096 };

    #[rstest]
    #[case::holes_of_a_page(EXACT, WrittenZeros::Data, true)]
    #[case::larger_holes(SeekHole::Exact { granularity: 8192 }, WrittenZeros::Data, false)]
    #[case::written_zeros_become_holes(EXACT, WrittenZeros::Hole, false)]
    #[case::all_data(SeekHole::AllData, WrittenZeros::Unknown, false)]
    #[case::data_in_holes(SeekHole::Unreliable, WrittenZeros::Unknown, false)]
    fn pages_are_identified_only_if_data_and_holes_are_kept(
        #[case] seek_hole: SeekHole,
        #[case] written_zeros: WrittenZeros,
        #[case] expected: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut here = Capabilities::probe(dir.path()).unwrap();
        here.seek_hole = seek_hole;
        here.written_zeros = written_zeros;
        assert_eq!(check_capabilities(&here, 4096).is_ok(), expected);
    }
}
