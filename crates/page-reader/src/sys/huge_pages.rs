//! The parts of a file on hugetlbfs that hold anything but zeros.
//!
//! hugetlbfs does not tell its holes: to `SEEK_DATA` all of a file is data. But `read(2)` gives zeros
//! for a hole and allocates nothing, where a load through a mapping takes a huge page, or is a
//! `SIGBUS` if none is left. So the bytes are read, up to the first that is not zero.

use std::fs::File;
use std::iter;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::sys::statfs::{HUGETLBFS_MAGIC, fstatfs};

use crate::populated::PopulatedRanges;
use crate::{HostMemory, SecretBuffer};

/// Bytes that are populated or not as a whole: the smallest huge page of common machines.
const PIECE: u64 = 2 << 20;
/// Bytes that are read at a time.
const STEP: u64 = 64 << 10;

/// Returns whether `file` is on hugetlbfs; a memfd of huge pages is.
pub(super) fn is_on_hugetlbfs(file: &File) -> bool {
    fstatfs(file).is_ok_and(|found| found.filesystem_type() == HUGETLBFS_MAGIC)
}

/// The parts of `range`, positions in `file`, that hold anything but zeros. What cannot be read may.
pub(super) fn data(file: File, range: Range<u64>) -> PopulatedRanges<'static> {
    let mut left = range;
    let mut buffer = SecretBuffer::new();
    let pieces = iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let piece = left.start..(left.start / PIECE + 1).saturating_mul(PIECE).min(left.end);
        left.start = piece.end;
        Some((is_zero(&file, piece.clone(), &mut buffer), piece))
    });
    Box::new(pieces.filter_map(|(zero, piece)| (!zero).then_some(piece)))
}

fn is_zero(file: &File, piece: Range<u64>, buffer: &mut SecretBuffer) -> bool {
    let mut at = piece.start;
    while at < piece.end {
        let bytes = buffer.sized((piece.end - at).min(STEP) as usize);
        if file.read_exact_at(bytes, at).is_err() || !HostMemory::from(&*bytes).is_zero() {
            return false;
        }
        at += bytes.len() as u64;
    }
    true
}
