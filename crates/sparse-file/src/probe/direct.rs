//! Probes the alignments of memory and offset at which direct I/O works.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use host_memory::AlignedBuffer;

use super::sample::{HERE, noise};
use crate::sys;

/// The largest alignment to try: no disk has larger sectors, and no file system requires more.
const MAX_ALIGN: usize = 64 << 10;
const MIN_ALIGN: usize = 512;

/// The alignments at which direct I/O was found to work: written bytes were read back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DirectIo {
    /// The required alignment of a buffer's address in bytes.
    pub memory_align: usize,
    /// The required alignment of the file offset and the length in bytes.
    pub offset_align: usize,
    /// The source of the alignments.
    pub basis: AlignmentBasis,
}

/// The source of an alignment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AlignmentBasis {
    /// The kernel reports it (`STATX_DIOALIGN`), and it worked.
    Reported,
    /// The smallest of 512 bytes to 64 KiB that worked, raised to the block size of the file
    /// system. Some file systems accept less by silently writing through the page cache: btrfs for
    /// parts of a block. macOS does so for any alignment below a page, and the value is raised to a
    /// page there.
    Measured,
}

/// Tries direct I/O in the noise and the 64 KiB after it. The contents are arbitrary afterwards.
///
/// `block` is the block size of the file system, if known.
pub(super) fn probe(file: &File, block: Option<u64>) -> io::Result<Option<DirectIo>> {
    match sys::set_direct(file, true) {
        Ok(()) => {}
        Err(error) if sys::is_unsupported_argument(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let reported = sys::reported_direct_alignment(file);
    let found = alignment(file, block, reported, sys::least_direct_alignment())?;
    sys::set_direct(file, false)?;
    Ok(found)
}

/// Finds the alignments of a file that does direct I/O. A measured one is raised to `least`.
fn alignment(
    file: &File,
    block: Option<u64>,
    reported: Option<(usize, usize)>,
    least: usize,
) -> io::Result<Option<DirectIo>> {
    let mut attempt = Attempt::new(file);
    match reported {
        Some((0, _) | (_, 0)) => return Ok(None),
        Some((memory_align, offset_align))
            if memory_align.max(offset_align) <= MAX_ALIGN
                && attempt.works(memory_align, offset_align)? =>
        {
            return Ok(Some(DirectIo {
                memory_align,
                offset_align,
                basis: AlignmentBasis::Reported,
            }));
        }
        // Not reported, or the reported alignment does not work.
        _ => {}
    }
    let Some(offset) = smallest(|align| attempt.works(MAX_ALIGN, align))? else {
        return Ok(None);
    };
    let Some(memory) = smallest(|align| attempt.works(align, offset))? else {
        return Ok(None);
    };
    let block = block
        .and_then(|block| usize::try_from(block).ok())
        .filter(|block| block.is_power_of_two() && *block <= MAX_ALIGN)
        .unwrap_or(4096)
        .max(least);
    Ok(Some(DirectIo {
        memory_align: memory.max(block),
        offset_align: offset.max(block),
        basis: AlignmentBasis::Measured,
    }))
}

fn smallest(mut works: impl FnMut(usize) -> io::Result<bool>) -> io::Result<Option<usize>> {
    let mut align = MIN_ALIGN;
    while align <= MAX_ALIGN {
        if works(align)? {
            return Ok(Some(align));
        }
        align *= 2;
    }
    Ok(None)
}

struct Attempt<'f> {
    file: &'f File,
    buffer: AlignedBuffer,
    noise: Vec<u8>,
}

impl<'f> Attempt<'f> {
    fn new(file: &'f File) -> Self {
        Self {
            file,
            // A piece of at most MAX_ALIGN bytes that starts at most MAX_ALIGN bytes after a 64 KiB
            // boundary.
            buffer: AlignedBuffer::new(2 * MAX_ALIGN),
            noise: noise(),
        }
    }

    /// Returns whether direct I/O works at an address and an offset that are multiples of the
    /// alignments and, below [`MAX_ALIGN`], of nothing larger: for the shortest piece, and for one
    /// of many pages. The block layer of Linux 6.18 accepts a piece inside one page at any address,
    /// and refuses the same address for more.
    fn works(&mut self, memory_align: usize, offset_align: usize) -> io::Result<bool> {
        Ok(self.round_trips(memory_align, offset_align, offset_align)?
            && self.round_trips(memory_align, offset_align, MAX_ALIGN)?)
    }

    /// Returns whether one call reads the bytes that another has written.
    fn round_trips(&mut self, start: usize, offset: usize, len: usize) -> io::Result<bool> {
        let at = HERE.noise().start + offset as u64;
        let wanted = &self.noise[..len];
        let piece = &mut self.buffer.bytes_mut()[start..start + len];
        piece.copy_from_slice(wanted);
        let written = accepted(self.file.write_at(piece, at))?;
        piece.fill(0);
        let read = accepted(self.file.read_at(piece, at))?;
        Ok(written == Some(len) && read == Some(len) && piece == wanted)
    }
}

fn accepted(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(len) => Ok(Some(len)),
        Err(error) if sys::is_unsupported_argument(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use test_machine::{FileSystem, LoopMount, needs};

    use super::*;

    /// Linux 6.18 accepts this for a piece of a single page.
    #[test]
    fn alignment_unsuitable_for_many_pages_is_refused() {
        needs!(Mount(FileSystem::EXT4));
        let mount = LoopMount::new(FileSystem::EXT4).expect("mounted");
        let file = tempfile::tempfile_in(mount.path()).expect("file");
        sys::set_direct(&file, true).expect("direct");
        let mut attempt = Attempt::new(&file);
        assert!(attempt.works(512, 512).expect("tried"));
        assert!(!attempt.works(256, 512).expect("tried"));
    }

    /// As on macOS: with `F_NOCACHE`, I/O that is not aligned succeeds through the page cache, as
    /// all I/O of a file without direct I/O does.
    #[test]
    fn alignment_of_the_page_cache_is_raised_to_a_page() {
        let file = tempfile::tempfile().expect("file");
        let page = 16 << 10;
        for (block, expected) in [(None, page), (Some(512), page), (Some(64 << 10), 64 << 10)] {
            let found = alignment(&file, block, None, page).expect("tried");
            let measured = DirectIo {
                memory_align: expected,
                offset_align: expected,
                basis: AlignmentBasis::Measured,
            };
            assert_eq!(found, Some(measured), "{block:?}");
        }
    }
}
