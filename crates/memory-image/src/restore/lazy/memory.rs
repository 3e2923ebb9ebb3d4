//! The memory to fill, by address: no reference to it exists.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise, mprotect};
use page_reader::{FlaggedRegion, HostMemory, ProcessRegion};

use super::userfaultfd::{Userfaultfd, UserfaultfdError};

/// The regions of a guest's RAM in the order of the memory file.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Vec<Place>,
    /// Addresses of which a forked child gets a copy, unless it is withheld.
    inheritable: Vec<Range<u64>>,
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
        let regions: Vec<_> = regions.collect();
        let addresses = |region: &Place| region.address..region.address.saturating_add(region.len);
        Self {
            inheritable: regions.iter().map(addresses).collect(),
            regions,
        }
    }

    /// Checks that no other mapping, process or descriptor has any of the memory, which a caller has
    /// mapped: to them, missing pages would be zeros. Notes which parts a forked child gets a copy of.
    pub(crate) fn check_private(&mut self) -> Result<(), UserfaultfdError> {
        let mappings = FlaggedRegion::of_this_process().map_err(UserfaultfdError::Unchecked)?;
        let mut inheritable = Vec::new();
        for Place { address, len, .. } in &self.regions {
            let (start, len) = (*address, *len);
            let mut at = start;
            let end = start.saturating_add(len);
            for FlaggedRegion { region, flags, .. } in &mappings {
                let Range {
                    start: first,
                    end: last,
                } = region.addresses;
                if last <= at || end <= first {
                    continue;
                }
                if flags.huge_pages {
                    return Err(UserfaultfdError::HugePages { start, len });
                }
                if first > at {
                    break;
                }
                if !flags.not_inherited {
                    inheritable.push(at..last.min(end));
                }
                if !is_private_anonymous(region) {
                    let mapping = region.to_string();
                    return Err(UserfaultfdError::Shared {
                        start,
                        len,
                        mapping,
                    });
                }
                at = last;
            }
            if at < end {
                let source = Errno::ENOMEM.into();
                return Err(UserfaultfdError::Register { start, len, source });
            }
        }
        self.inheritable = inheritable;
        Ok(())
    }

    /// Withholds the memory from children that are forked from now on, as to them missing pages would be
    /// zeros.
    pub(crate) fn withhold(&self) -> Result<(), UserfaultfdError> {
        let (advice, what) = (
            MmapAdvise::MADV_DONTFORK,
            "it cannot be withheld from forked children",
        );
        let all = [0..self.len()];
        self.advise(&all, advice, what)
    }

    /// Lets forked children have again what they had before [`withhold`](Self::withhold), as far as it is
    /// still `mapped`.
    pub(crate) fn give_back(&self, mapped: &[Range<u64>]) -> Result<(), UserfaultfdError> {
        let (advice, what) = (
            MmapAdvise::MADV_DOFORK,
            "it cannot be given to forked children again",
        );
        self.advise(mapped, advice, what)
    }

    fn advise(
        &self,
        within: &[Range<u64>],
        advice: MmapAdvise,
        what: &'static str,
    ) -> Result<(), UserfaultfdError> {
        let parts = within.iter().flat_map(|range| self.parts(range.clone()));
        for (address, part) in parts {
            let end = address + (part.end - part.start);
            let inherited = self.inheritable.iter();
            let inherited = inherited.map(|range| range.start.max(address)..range.end.min(end));
            for Range { start, end } in inherited.filter(|range| !range.is_empty()) {
                let len = end - start;
                let at = pointer(start);
                // SAFETY: mapped, by the promise to `new`; the advice changes nothing for this process.
                let advised = at.and_then(|at| unsafe { madvise(at, len as usize, advice) });
                advised.map_err(|errno| {
                    let source = errno.into();
                    UserfaultfdError::Prepare {
                        start,
                        len,
                        what,
                        source,
                    }
                })?;
            }
        }
        Ok(())
    }

    /// Discards whatever the memory holds.
    pub(crate) fn discard(&self) -> Result<(), UserfaultfdError> {
        /// Locked memory too (Linux 5.18).
        const DONTNEED_LOCKED: libc::c_int = 24;
        self.regions.iter().try_for_each(|region| {
            let (start, len) = (region.address, region.len);
            let discard = |advice| {
                let at = pointer(start)?.as_ptr();
                // SAFETY: mapped, private, and ours to fill, by the promise to `new`.
                Errno::result(unsafe { libc::madvise(at, len as usize, advice) }).map(drop)
            };
            let discarded = match discard(libc::MADV_DONTNEED) {
                Err(Errno::EINVAL) => discard(DONTNEED_LOCKED),
                other => other,
            };
            discarded.map_err(|errno| UserfaultfdError::Prepare {
                start,
                len,
                what: "its old bytes cannot be discarded",
                source: errno.into(),
            })
        })
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

    /// The ranges of the memory file at these addresses.
    pub(crate) fn at(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.regions.iter().filter_map(move |region| {
            let start = addresses.start.max(region.address) - region.address;
            let end = addresses.end.min(region.address + region.len);
            let end = end.saturating_sub(region.address);
            (start < end).then(|| region.offset + start..region.offset + end)
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

    /// Has whoever waits for a page look again.
    pub(crate) fn wake(&self, fault: &Userfaultfd) -> Result<(), UserfaultfdError> {
        self.regions.iter().try_for_each(|region| {
            let woken = fault.wake(region.address, region.len);
            woken.map_err(|errno| UserfaultfdError::Wait(errno.into()))
        })
    }

    /// Lets the missing pages of a range be zeros again, and wakes whoever waits.
    pub(crate) fn unregister(&self, fault: &Userfaultfd, range: Range<u64>) -> nix::Result<()> {
        self.parts(range)
            .try_for_each(|(address, part)| fault.unregister(address, part.end - part.start))
    }

    /// Makes whole pages inaccessible, filled or not.
    pub(crate) fn deny(&self, range: Range<u64>) -> nix::Result<()> {
        self.parts(range).try_for_each(|(address, part)| {
            let len = (part.end - part.start) as usize;
            // SAFETY: mapped, and ours to make inaccessible, by the promise to `new`.
            unsafe { mprotect(pointer(address)?, len, ProtFlags::PROT_NONE) }
        })
    }

    /// Makes memory inaccessible that was moved by `mremap`, and wakes whoever waits for its pages.
    pub(crate) fn deny_moved(fault: &Userfaultfd, moved: &Range<u64>) -> nix::Result<()> {
        let len = moved.end - moved.start;
        // SAFETY: the kernel says that a part of the memory was moved there, which was ours to make
        // inaccessible, by the promise to `new`.
        unsafe { mprotect(pointer(moved.start)?, len as usize, ProtFlags::PROT_NONE) }?;
        fault.unregister(moved.start, len)
    }

    pub(crate) fn host_memory(&self, range: Range<u64>) -> Option<HostMemory<'_>> {
        let (address, part) = self.parts(range).next()?;
        let start = std::ptr::with_exposed_provenance(address as usize);
        // SAFETY: mapped as long as `self`, and covered by no reference, by the promise to `new`. Missing pages are filled when touched.
        Some(unsafe { HostMemory::new(start, (part.end - part.start) as usize) })
    }
}

fn is_private_anonymous(region: &ProcessRegion) -> bool {
    let name = &region.name[..];
    let named_by_the_process = name.starts_with(b"[anon:");
    let anonymous = [&b""[..], b"[heap]", b"[stack]"].contains(&name) || named_by_the_process;
    !region.permissions.shared && region.inode == 0 && region.device == (0, 0) && anonymous
}

fn pointer(address: u64) -> nix::Result<NonNull<c_void>> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).ok_or(Errno::EFAULT)
}
