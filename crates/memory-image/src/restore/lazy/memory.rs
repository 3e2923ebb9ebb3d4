//! The memory to fill, by address: no reference to it exists.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise, mprotect};
use page_reader::HostMemory;

use super::userfaultfd::{Userfaultfd, UserfaultfdError};

/// The regions of a guest's RAM in the order of the memory file.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Vec<Place>,
}

/// One region.
#[derive(Debug)]
struct Place {
    /// In the memory file.
    offset: u64,
    address: u64,
    len: u64,
}

impl Memory {
    /// Names the regions: address and length in bytes of each.
    ///
    /// # Safety
    /// As long as the value is used, every region stays mapped, no two overlap, no Rust reference covers any of them, and their missing pages
    /// are for the holder of the value to fill, and to make inaccessible.
    pub(crate) unsafe fn new(regions: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        let mut offset = 0;
        let regions = regions.into_iter().map(|(start, len)| {
            let (address, len) = (start.expose_provenance() as u64, len as u64);
            offset += len;
            Place {
                offset: offset - len,
                address,
                len,
            }
        });
        Self {
            regions: regions.collect(),
        }
    }

    pub(crate) fn len(&self) -> u64 {
        self.regions.iter().map(|region| region.len).sum()
    }

    pub(crate) fn regions(&self) -> impl Iterator<Item = (*mut u8, usize)> {
        let pointer = |address| std::ptr::with_exposed_provenance_mut(address as usize);
        self.regions
            .iter()
            .map(move |region| (pointer(region.address), region.len as usize))
    }

    /// A range of the memory file, region by region: the address of each part, and which part it is.
    pub(crate) fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
        self.regions.iter().filter_map(move |region| {
            let start = range.start.max(region.offset);
            let end = range.end.min(region.offset + region.len);
            (start < end).then(|| (region.address + (start - region.offset), start..end))
        })
    }

    /// The offset in the memory file of an address.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = address.checked_sub(region.address)?;
            (offset < region.len).then_some(region.offset + offset)
        })
    }

    /// Has every access to a missing page wait for `fault`. Returns whether missing pages can be poisoned.
    pub(crate) fn register(&self, fault: &Userfaultfd) -> Result<bool, UserfaultfdError> {
        self.regions.iter().try_fold(true, |poison, region| {
            // SAFETY: mapped, and ours to fill, by the promise to `new`.
            let here = unsafe { fault.register(region.address, region.len) }?;
            Ok(poison && here)
        })
    }

    /// Lets missing pages be zeros again, and wakes whoever waits.
    pub(crate) fn unregister(&self, fault: &Userfaultfd) -> nix::Result<()> {
        self.regions
            .iter()
            .try_for_each(|region| fault.unregister(region.address, region.len))
    }

    /// Makes whole pages inaccessible, filled or not.
    pub(crate) fn deny(&self, range: Range<u64>) -> nix::Result<()> {
        self.parts(range).try_for_each(|(address, part)| {
            let len = (part.end - part.start) as usize;
            // SAFETY: mapped, and ours to make inaccessible, by the promise to `new`.
            unsafe { mprotect(pointer(address)?, len, ProtFlags::PROT_NONE) }
        })
    }

    /// Whether a forked child has the memory too. To it, pages that are missing would be zeros.
    pub(crate) fn inherit(&self, inherit: bool) -> nix::Result<()> {
        let advice = match inherit {
            true => MmapAdvise::MADV_DOFORK,
            false => MmapAdvise::MADV_DONTFORK,
        };
        self.regions.iter().try_for_each(|region| {
            // SAFETY: mapped, by the promise to `new`; the advice changes nothing for this process.
            unsafe { madvise(pointer(region.address)?, region.len as usize, advice) }
        })
    }

    pub(crate) fn host_memory(&self, range: Range<u64>) -> Option<HostMemory<'_>> {
        let (address, part) = self.parts(range).next()?;
        let start = std::ptr::with_exposed_provenance(address as usize);
        // SAFETY: mapped as long as `self`, and covered by no reference, by the promise to `new`. Missing pages are filled when touched.
        Some(unsafe { HostMemory::new(start, (part.end - part.start) as usize) })
    }
}

fn pointer(address: u64) -> nix::Result<NonNull<c_void>> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).ok_or(Errno::EFAULT)
}
