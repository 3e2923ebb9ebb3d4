//! Whether the holes that a file system reports for an open file may be used, and what for.
//!
//! This is the only place where that is decided. `SEEK_HOLE` and `SEEK_DATA` are answered by each
//! file system in its own way, and POSIX allows that written bytes are reported as a hole only
//! where they are zeros. File systems that get this wrong report no error:
//!
//! - FUSE passes the question to its server, and does not write back pages that were dirtied
//!   through a mapping before: RAM that a guest wrote is in a reported hole. The same goes for
//!   `write(2)` with the writeback cache.
//! - OpenZFS before 2.2.2 and 2.1.14 could report a hole for data that was not written out.
//! - APFS answers ENXIO inside clones.
//!
//! So a report is used only where the implementation is known: ext4, XFS, btrfs and tmpfs of Linux,
//! and overlayfs where the file is seen to be stored on one of the first three.
//! Everywhere else all is data. That costs reading what could have been skipped, and nothing else.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::unistd::fsync;

use crate::probe::{Capabilities, ProbeError, SeekHole, WrittenZeros};
use crate::sys;

/// Why the holes that are reported for a file are not used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HolesUnknown {
    /// A directory, device, FIFO or socket.
    #[error("it is not a regular file")]
    NotAFile,
    /// Its file system is not one whose implementation is known to report holes correctly.
    #[error(
        "its file system ({file_system}) is not known to report holes correctly: use ext4, XFS, \
         btrfs or tmpfs on Linux"
    )]
    FileSystem {
        /// The name of the file system, or its number in hexadecimal.
        file_system: String,
    },
    /// The system failed to say what the file is.
    #[error("failed to find out which file system it is on")]
    Io(#[from] io::Error),
}

/// Returns `Ok` if what is reported as a hole of `file` is known to read as zeros: also while the
/// file is written through mappings, and before anything was written back.
///
/// This is what [`extents`](crate::extents()) lists holes by. It takes one `fstat(2)` and one
/// `fstatfs(2)`, on overlayfs at most four calls more, reads nothing and writes nothing. It holds for the file that is open, so ask again
/// for another file.
///
/// | file system | what answers | dirty pages |
/// |---|---|---|
/// | ext4 | `ext4_llseek`, `iomap_seek_data` | delayed blocks are data; unwritten extents are looked up in the page cache |
/// | XFS | `xfs_file_llseek`, `iomap_seek_data` | the same, and the copy-on-write fork of a reflinked file |
/// | btrfs | `find_desired_extent` | delayed allocation and ordered extents are data |
/// | tmpfs, memfd, shared anonymous memory | `shmem_file_llseek`, `mapping_seek_hole_data` | the page cache is the file; what was swapped out is data |
///
/// Each of them makes the first write to a page of a mapping allocate or reserve the block
/// (`page_mkwrite`), so that a page that is dirty in memory only is data as well. ext2 and ext3 have
/// the number of ext4; the driver of ext2 reports everything as data.
///
/// overlayfs, which containers run on, answers by the file system that stores the file (`ovl_llseek`),
/// and reads, writes and maps of a file that is open for writing go to the same inode
/// (`ovl_read_iter`, `ovl_write_iter`, `ovl_mmap`). So a file on overlayfs is treated as one on ext4,
/// XFS or btrfs if it is known to be stored there:
///
/// - The file system below must support `FS_IOC_FIEMAP` (`ovl_fiemap`). FUSE, network file systems
///   other than SMB, OpenZFS and tmpfs do not.
/// - With `FIEMAP_FLAG_XATTR` only ext4, XFS and f2fs support it. ext4 is recognized by `FS_EXTENT_FL`
///   (`ovl_fileattr_get`), XFS by the attributes that `statx(2)` knows (`ovl_getattr`).
/// - Of the others, btrfs is recognized by its name space of extended attributes (`ovl_xattr_get`).
///
/// The answers come from the inode that stores the file at that moment. The first opening for writing
/// moves a file from a lower layer to the upper one (`ovl_copy_up`), possibly to another file system.
/// [`extents`](crate::extents()) therefore asks again after each hole that overlayfs reported.
///
/// A file that was mapped before it was moved, through a descriptor that was opened for reading, is
/// the old file in that mapping, and the new one in reads and reports: overlayfs documents this.
/// With the mount option `metacopy=on`, a file of which only the attributes were changed has its data
/// in a lower layer and its attributes in the upper one. Only `FS_IOC_FIEMAP` is then answered by the
/// data's file system. A file that is open for writing is never in this state.
///
/// Not used, and all data, are the reports of: FUSE (virtiofs too) and network file systems, whose
/// server decides; OpenZFS, f2fs, bcachefs and others, of which too little is known; hugetlbfs,
/// which reports none; overlayfs over any of these and over tmpfs, which nothing tells from a server;
/// block devices; and every file system of macOS.
///
/// # Errors
/// [`HolesUnknown`].
///
/// # Examples
/// ```
/// let file = tempfile::tempfile()?;
/// match sparse_file::check_holes_are_zeros(&file) {
///     Ok(()) => println!("holes can be skipped"),
///     Err(why) => println!("everything has to be read: {why}"),
/// }
/// # Ok::<(), std::io::Error>(())
/// ```
pub fn check_holes_are_zeros(file: &File) -> Result<(), HolesUnknown> {
    if !file.metadata()?.is_file() {
        return Err(HolesUnknown::NotAFile);
    }
    if sys::reports_holes_correctly(file)? {
        return Ok(());
    }
    let file_system = file_system_name(file)?;
    Err(HolesUnknown::FileSystem { file_system })
}

/// Returns whether `file` is known to be stored on ext4, XFS or btrfs of Linux: on overlayfs too, by
/// the evidence that [`check_holes_are_zeros`] lists. Nothing but the page cache has such a file in
/// memory, so no process can fill it by userfaultfd.
///
/// # Errors
/// Those of `fstatfs(2)`.
pub fn is_on_disk(file: &File) -> io::Result<bool> {
    sys::is_on_disk(file)
}

/// Returns what the file system of `file` calls itself, or its number in hexadecimal where this crate
/// has no name for it.
///
/// # Errors
/// Those of `fstatfs(2)`.
pub fn file_system_name(file: &File) -> io::Result<String> {
    sys::file_system_name(file)
}

/// Why the pages that were written to a file cannot be told from the holes between them.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PagesUnknown {
    /// The holes that are reported for the file are not used.
    #[error(transparent)]
    Holes(#[from] HolesUnknown),
    /// Another file system begins at the file itself (a bind mount of a single file), so no file
    /// beside it is on the same.
    #[error("it is a mount of its own, so its file system cannot be probed through its directory")]
    MountedAlone,
    /// It is in a layer of an overlayfs, and new files beside it are stored on another file system.
    #[error(
        "it is in a lower layer of an overlayfs, on another file system than new files: copy it to \
         a directory on ext4, XFS, btrfs or tmpfs, or mount this one into the container"
    )]
    OtherLayer,
    /// The directory could not be probed; it must be writable for that.
    #[error("its file system could not be probed")]
    Probe(#[from] ProbeError),
    /// The file system keeps no holes as small as a page.
    #[error(
        "its file system ({file_system}) keeps no holes of {page_size} bytes: use pages of at \
         least {granularity} bytes"
    )]
    Coarse {
        /// The name of the file system.
        file_system: String,
        /// The page, in bytes.
        page_size: u64,
        /// The smallest hole that was kept, in bytes.
        granularity: u64,
    },
    /// The probe found that written bytes are reported as a hole, or holes as data.
    #[error("its file system ({file_system}) does not report which bytes were written")]
    NotReported {
        /// The name of the file system.
        file_system: String,
    },
    /// Blocks were set aside for the file (`fallocate`) and not written. They are a hole until they are read,
    /// and data for as long as what was read is in the page cache.
    #[error("the blocks at {offset:#x} were reserved and never written: do not preallocate it")]
    Reserved {
        /// The first of them, in bytes.
        offset: u64,
    },
    /// The file system writes zeros around what is written to blocks that were set aside, so that
    /// what is left of them does not show: ext4 with `dioread_lock` or `data=journal`.
    #[error(
        "ext4 is mounted with {option} there, and writes zeros beside what is written to reserved blocks: mount it without"
    )]
    ZerosBeside {
        /// The mount option, as the system names it.
        option: &'static str,
    },
    /// What was written could not be synced, and may be reported differently once it is.
    #[error("failed to sync it")]
    Sync(#[source] io::Error),
}

/// The probe looks for no smaller holes.
const FINEST: u64 = 4096;

/// Checks whether files tell by their holes which pages were written; each directory is probed
/// once.
#[derive(Debug, Default)]
pub struct PageHoles {
    probed: Vec<(PathBuf, Capabilities)>,
}

impl PageHoles {
    /// Nothing was probed yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns `Ok` if a new `file` will tell by its holes which pages of `page_size` bytes were
    /// written, as far as that is known before: [`check`](Self::check) will then find nothing but
    /// what this cannot know. Writes nothing.
    ///
    /// # Errors
    /// [`PagesUnknown::Holes`]; [`PagesUnknown::Coarse`] where a page is smaller than 4 KiB or a
    /// block of the file system; [`PagesUnknown::ZerosBeside`].
    pub fn check_new(file: &File, page_size: u64) -> Result<(), PagesUnknown> {
        check_holes_are_zeros(file)?;
        if let Some(option) = sys::zeros_beside(file).map_err(HolesUnknown::Io)? {
            return Err(PagesUnknown::ZerosBeside { option });
        }
        let block = sys::file_system_block(file).map_err(HolesUnknown::Io)?;
        let granularity = block.max(FINEST);
        if granularity <= page_size {
            return Ok(());
        }
        Err(PagesUnknown::Coarse {
            file_system: file_system_name(file).map_err(HolesUnknown::Io)?,
            page_size,
            granularity,
        })
    }

    /// Returns `Ok` if no blocks of `file` were reserved and not written. The file should be synced:
    /// blocks that are being written may count as reserved.
    ///
    /// # Errors
    /// [`PagesUnknown::Reserved`], [`PagesUnknown::Holes`].
    pub fn check_reserved(file: &File) -> Result<(), PagesUnknown> {
        match sys::first_unwritten(file).map_err(HolesUnknown::Io)? {
            Some(offset) => Err(PagesUnknown::Reserved { offset }),
            None => Ok(()),
        }
    }

    /// Returns `Ok` if what was written to `file`, in `dir`, is reported as data and all else as a
    /// hole, down to pages of `page_size` bytes.
    ///
    /// This takes more than [`check_holes_are_zeros`]: it also has to be known that no hole was
    /// filled by the file system, and that no zeros that were written became a hole. So `dir` is
    /// probed by [`Capabilities::probe`], which writes a nameless file there, and `file` is synced:
    /// delayed allocation may cover more than was written. Blocks that were reserved and not written
    /// are refused: once they were read, they are reported as data.
    ///
    /// What cannot be seen: a copy of the file that filled some of its holes, or dug out pages of
    /// zeros; on tmpfs, holes that were read through a mapping, which fills them; and on ext4,
    /// blocks that another program reserved and wrote in part before the file system was mounted as
    /// it is (see [`PagesUnknown::ZerosBeside`]). For a file that overlayfs stores on ext4, the
    /// options of that mount are not seen either.
    ///
    /// # Errors
    /// [`PagesUnknown`].
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
        tells_pages(&self.probed[known].1, page_size)
    }
}

fn tells_pages(here: &Capabilities, page_size: u64) -> Result<(), PagesUnknown> {
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
    fn pages_are_told_only_where_data_and_holes_both_stay(
        #[case] seek_hole: SeekHole,
        #[case] written_zeros: WrittenZeros,
        #[case] told: bool,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let mut here = Capabilities::probe(dir.path()).unwrap();
        here.seek_hole = seek_hole;
        here.written_zeros = written_zeros;
        assert_eq!(tells_pages(&here, 4096).is_ok(), told);
    }
}
