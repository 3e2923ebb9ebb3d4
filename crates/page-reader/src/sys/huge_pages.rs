//! Detection of the nonzero parts of a file on hugetlbfs.
//!
//! hugetlbfs does not report holes: for `SEEK_DATA`, the whole file is data. But `read(2)` returns
//! zeros for a hole without allocation, whereas a load through a mapping allocates a huge page, or
//! raises `SIGBUS` if none is left. Therefore the bytes are read, up to the first nonzero one.

use std::fs::File;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use host_memory::SecretBuffer;
use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::populated::PopulatedRanges;
use crate::zeros::is_zeros;

/// The granularity of the result in bytes: the smallest huge page of common machines.
const BLOCK_SIZE: u64 = 2 << 20;
/// The number of bytes in one read.
const READ_SIZE: u64 = 64 << 10;

/// Returns `true` if `file` is on hugetlbfs, which includes memfds of huge pages.
pub(super) fn is_on_hugetlbfs(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() == HUGETLBFS_MAGIC)
}

/// Returns the parts of `range`, positions in `file`, that hold nonzero bytes or cannot be read.
pub(super) fn data(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
    let mut left = range;
    let mut buffer = SecretBuffer::new();
    let blocks = iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let block = left.start
            ..(left.start / BLOCK_SIZE + 1)
                .saturating_mul(BLOCK_SIZE)
                .min(left.end);
        left.start = block.end;
        Some((is_zero(&file, block.clone(), &mut buffer), block))
    });
    Box::new(blocks.filter_map(|(zero, block)| (!zero).then_some(block)))
}

fn is_zero(file: &File, block: Range<u64>, buffer: &mut SecretBuffer) -> bool {
    let mut at = block.start;
    while at < block.end {
        let bytes = buffer.sized((block.end - at).min(READ_SIZE) as usize);
        if file.read_exact_at(bytes, at).is_err() || !is_zeros(bytes) {
            return false;
        }
        at += bytes.len() as u64;
    }
    true
}
