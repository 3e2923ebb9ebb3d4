//! Direct I/O: at which alignment of memory and offset it works, by doing it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::sample::{NOISE, noise};
use crate::buffer::AlignedBuffer;
use crate::sys;

/// No disk has larger sectors, no file system asks for more.
const LARGEST: usize = 64 << 10;
const SMALLEST: usize = 512;

/// Direct I/O that was seen to work: what was written came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct DirectIo {
    /// The address of a buffer must be a multiple of this many bytes.
    pub memory_align: usize,
    /// The file offset and the length must be multiples of this many bytes.
    pub offset_align: usize,
    /// Where the two come from.
    pub basis: AlignmentBasis,
}

/// Where an alignment comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AlignmentBasis {
    /// The kernel reports it (`STATX_DIOALIGN`), and it worked.
    Reported,
    /// The smallest of 512 bytes to 64 KiB that worked, raised to the block in which the file system keeps data. Some
    /// take less by writing through the page cache without saying so: btrfs for parts of a block.
    Measured,
}

/// Tries direct I/O in the noise and the 64 KiB behind it; what stands there after is of no use.
///
/// `block` is the unit in which the file system keeps data, where that is known.
pub(super) fn probe(file: &File, block: Option<u64>) -> io::Result<Option<DirectIo>> {
    match sys::set_direct(file, true) {
        Ok(()) => {}
        Err(error) if refused(&error) => return Ok(None),
        Err(error) => return Err(error),
    }
    let found = alignment(file, block)?;
    sys::set_direct(file, false)?;
    Ok(found)
}

fn alignment(file: &File, block: Option<u64>) -> io::Result<Option<DirectIo>> {
    let mut attempt = Attempt::new(file);
    match sys::reported_direct_alignment(file) {
        Some((0, _) | (_, 0)) => return Ok(None),
        Some((memory_align, offset_align))
            if memory_align.max(offset_align) <= LARGEST
                && attempt.works(memory_align, offset_align)? =>
        {
            return Ok(Some(DirectIo {
                memory_align,
                offset_align,
                basis: AlignmentBasis::Reported,
            }));
        }
        // Not told, or what was told does not work.
        _ => {}
    }
    let Some(offset) = smallest(|align| attempt.works(LARGEST, align))? else {
        return Ok(None);
    };
    let Some(memory) = smallest(|align| attempt.works(align, offset))? else {
        return Ok(None);
    };
    let block = block
        .and_then(|block| usize::try_from(block).ok())
        .filter(|block| block.is_power_of_two() && *block <= LARGEST)
        .unwrap_or(4096);
    Ok(Some(DirectIo {
        memory_align: memory.max(block),
        offset_align: offset.max(block),
        basis: AlignmentBasis::Measured,
    }))
}

fn smallest(mut works: impl FnMut(usize) -> io::Result<bool>) -> io::Result<Option<usize>> {
    let mut align = SMALLEST;
    while align <= LARGEST {
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
            // A piece of at most LARGEST bytes that starts at most LARGEST bytes behind a 64 KiB boundary.
            buffer: AlignedBuffer::new(2 * LARGEST),
            noise: noise(),
        }
    }

    /// Whether direct I/O works at an address and an offset that are multiples of the alignments and, below [`LARGEST`], of
    /// nothing larger: for the shortest piece, and for one of many pages. The block layer of Linux 6.18 takes a piece
    /// within one page at any address, and refuses the same address for more.
    fn works(&mut self, memory_align: usize, offset_align: usize) -> io::Result<bool> {
        Ok(self.comes_back(memory_align, offset_align, offset_align)?
            && self.comes_back(memory_align, offset_align, LARGEST)?)
    }

    /// Whether what one call writes is what one call reads.
    fn comes_back(&mut self, start: usize, offset: usize, len: usize) -> io::Result<bool> {
        let at = NOISE.start + offset as u64;
        let wanted = &self.noise[..len];
        let piece = &mut self.buffer.bytes()[start..start + len];
        piece.copy_from_slice(wanted);
        let wrote = accepted(self.file.write_at(piece, at))?;
        piece.fill(0);
        let read = accepted(self.file.read_at(piece, at))?;
        Ok(wrote == Some(len) && read == Some(len) && piece == wanted)
    }
}

fn accepted(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(len) => Ok(Some(len)),
        Err(error) if refused(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

fn refused(error: &io::Error) -> bool {
    error
        .raw_os_error()
        .is_some_and(|errno| errno == libc::EINVAL || sys::is_unsupported(errno))
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use test_machine::{LoopFs, LoopMount, Need};

    use super::*;

    /// Linux 6.18 takes one of a single page there.
    #[test]
    fn an_alignment_that_does_not_suit_a_piece_of_many_pages_does_not_work() {
        if !Need::Ext4.met("an_alignment_that_does_not_suit_a_piece_of_many_pages_does_not_work") {
            return;
        }
        let mount = LoopMount::new(LoopFs::Ext4).expect("mounted");
        let file = tempfile::tempfile_in(mount.path()).expect("file");
        sys::set_direct(&file, true).expect("direct");
        let mut attempt = Attempt::new(&file);
        assert!(attempt.works(512, 512).expect("tried"));
        assert!(!attempt.works(256, 512).expect("tried"));
    }
}
