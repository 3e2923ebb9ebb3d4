//! A file opened for direct I/O, and its alignments.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;

use host_memory::HostMemory;

use crate::{sys, trace};

/// The largest block size that is used: no file system in use has larger blocks, and network file
/// systems report the size of their transfers.
const LARGEST_BLOCK: usize = 64 << 10;

/// A descriptor to write whole blocks to.
#[derive(Debug)]
pub(super) struct Target {
    pub(super) file: File,
    pub(super) alignment: Alignment,
}

impl Target {
    /// Opens the file for direct I/O if possible, otherwise for writes through the page cache.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        Self::direct(file).or_else(|why| {
            trace::direct_io_refused(&why);
            Self::cached(file)
        })
    }

    /// Opens the file for direct I/O. Returns the reason if that is not possible.
    pub(super) fn direct(file: &File) -> io::Result<Self> {
        let direct = sys::reopen_direct(file)?;
        let reported = sys::reported_direct_alignment(&direct);
        // Direct writes must not share a page of the page cache or a block of the file system with
        // cached writes.
        let page = sys::page_size();
        let block = usize::try_from(file.metadata()?.blksize())
            .ok()
            .filter(|block| block.is_power_of_two() && *block <= LARGEST_BLOCK)
            .map_or(page, |block| block.max(page));
        let (memory, offset) = reported.unwrap_or((block, block));
        let usable = |align: usize| align.is_power_of_two() && align <= LARGEST_BLOCK;
        if (memory, offset) == (0, 0) {
            let why = "the file system does not support it for this file";
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        if !usable(memory) || !usable(offset) {
            let why =
                format!("it requires memory aligned to {memory} and blocks of {offset} bytes");
            return Err(io::Error::new(io::ErrorKind::Unsupported, why));
        }
        Ok(Self {
            file: direct,
            alignment: Alignment {
                memory,
                block: block.max(offset),
            },
        })
    }

    /// Opens the file for writes through the page cache, which accept every alignment.
    fn cached(file: &File) -> io::Result<Self> {
        Ok(Self {
            file: file.try_clone()?,
            alignment: Alignment {
                memory: 1,
                block: 1,
            },
        })
    }
}

/// Alignments: powers of two, in bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Alignment {
    /// The alignment of addresses.
    memory: usize,
    /// The alignment of offsets and lengths.
    block: usize,
}

impl Alignment {
    /// Returns the whole blocks inside `range`. If there are none, the result is empty and inside
    /// `range`.
    pub(super) fn blocks_in(self, range: Range<u64>) -> Range<u64> {
        let start = self.up(range.start).min(range.end);
        start..self.down(range.end).max(start)
    }

    /// Returns the blocks that overlap `range`.
    pub(super) fn blocks_around(self, range: &Range<u64>) -> Range<u64> {
        self.down(range.start)..self.up(range.end)
    }

    /// Returns the longest prefix of `memory` that can be written directly.
    pub(super) fn suitable(self, memory: HostMemory<'_>) -> Option<HostMemory<'_>> {
        let blocks = memory.first(memory.len() - memory.len() % self.block);
        (!blocks.is_empty() && blocks.as_ptr().addr().is_multiple_of(self.memory)).then_some(blocks)
    }

    fn down(self, offset: u64) -> u64 {
        offset - offset % self.block as u64
    }

    /// Rounds up to a block. Offsets are below 2^63, so this does not overflow.
    fn up(self, offset: u64) -> u64 {
        offset.next_multiple_of(self.block as u64)
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const SECTORS: Alignment = Alignment {
        memory: 512,
        block: 4096,
    };

    #[rstest]
    #[case::whole_blocks(4096..12288, 4096..12288)]
    #[case::partial_blocks_at_both_ends(4095..12289, 4096..12288)]
    #[case::part_of_one_block(100..200, 200..200)]
    #[case::parts_of_two_blocks(100..4196, 4096..4096)]
    #[case::nothing(4096..4096, 4096..4096)]
    #[case::last_block_of_the_largest_file(i64::MAX as u64 - 5000..i64::MAX as u64, (1 << 63) - 4096..(1 << 63) - 4096)]
    fn range_is_cut_at_whole_blocks(#[case] range: Range<u64>, #[case] blocks: Range<u64>) {
        let cut = SECTORS.blocks_in(range.clone());
        let (head, tail) = (range.start..cut.start, cut.end..range.end);
        assert!(head.start <= head.end && cut.start <= cut.end && tail.start <= tail.end);
        if !blocks.is_empty() {
            assert_eq!(cut, blocks);
        }
        assert!(cut.is_empty() || cut.start.is_multiple_of(4096) && cut.end.is_multiple_of(4096));
    }

    #[test]
    fn suitable_memory_is_aligned_and_in_whole_blocks() {
        let buffer = host_memory::AlignedBuffer::new(16384);
        let memory = buffer.memory(10_000);
        let len = |memory| SECTORS.suitable(memory).map(HostMemory::len);
        assert_eq!(len(memory), Some(8192));
        assert_eq!(len(memory.after(512)), Some(8192));
        assert_eq!(len(memory.after(1)), None);
        assert_eq!(len(memory.first(4095)), None);
    }
}
