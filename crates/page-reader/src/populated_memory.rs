//! Detection of the ranges of mapped memory that may hold nonzero bytes.

#[cfg(target_os = "linux")]
use std::iter;
use std::ops::Range;

use host_memory::HostMemory;

#[cfg(target_os = "linux")]
use crate::address_space::AddressSpace;
use crate::populated::{PopulatedRanges, unknown};

/// Returns the populated ranges of the memory that `host_memory` returns for `range`, according to
/// the kernel. From the first offset without host memory, everything may be populated.
#[cfg(target_os = "linux")]
pub(crate) fn in_host_memory<'a>(
    host_memory: impl Fn(u64, usize) -> Option<HostMemory<'a>> + 'a,
    range: Range<u64>,
) -> PopulatedRanges<'a> {
    let mut left = range;
    let pieces = iter::from_fn(move || {
        if left.is_empty() {
            return None;
        }
        let offset = left.start;
        let len = usize::try_from(left.end - offset).unwrap_or(usize::MAX);
        let memory = host_memory(offset, len).filter(|memory| !memory.is_empty());
        left.start = memory.map_or(left.end, |memory| offset + memory.len() as u64);
        Some((offset..left.start, memory))
    });
    let mut space = None;
    Box::new(
        pieces.flat_map(move |(piece, memory)| -> PopulatedRanges<'a> {
            let Some(memory) = memory else {
                return Box::new(unknown(piece));
            };
            let start = memory.as_ptr().addr() as u64;
            let populated = space
                .get_or_insert_with(AddressSpace::of_this_process)
                .populated(start..start + memory.len() as u64);
            let offset_of = move |address: u64| piece.start + (address - start);
            Box::new(populated.map(move |found| offset_of(found.start)..offset_of(found.end)))
        }),
    )
}

/// Returns all of `range`.
///
/// `mach_vm_page_range_query` of macOS reports pages that are present or paged out. It is not used:
/// a page of a mapped file is neither before it is touched, and its answers were never seen on a
/// Mac (the step `page-queries` of `hvf-backend`'s self-test). A page that is taken for zeros by
/// mistake would be lost.
#[cfg(not(target_os = "linux"))]
pub(crate) fn in_host_memory<'a>(
    host_memory: impl Fn(u64, usize) -> Option<HostMemory<'a>> + 'a,
    range: Range<u64>,
) -> PopulatedRanges<'a> {
    drop(host_memory);
    Box::new(unknown(range))
}
