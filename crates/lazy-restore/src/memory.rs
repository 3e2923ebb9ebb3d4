//! The memory to fill, by address. No reference to it exists.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::ops::Range;
use std::ptr::NonNull;

use host_memory::HostMemory;
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{MmapAdvise, ProtFlags, madvise, mprotect};
use page_reader::{FlaggedRegion, ProcessRegion};

use crate::regions::{Region, Regions};
use crate::userfaultfd::{Userfaultfd, UserfaultfdError};

/// The RAM of a guest in this process.
#[derive(Debug)]
pub(crate) struct Memory {
    regions: Regions,
    /// Addresses that forked children inherit, unless they are excluded.
    inheritable: Vec<Range<u64>>,
}

impl Memory {
    /// Creates the memory from the address and the length in bytes of each region.
    ///
    /// # Safety
    /// As long as the value is used, every region stays mapped, no two regions overlap, no Rust
    /// reference covers any of them, and only the holder of the value fills their missing pages or
    /// makes them inaccessible.
    pub(crate) unsafe fn new(regions: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        let exposed =
            |(start, len): (*mut u8, usize)| (start.expose_provenance() as u64, len as u64);
        let regions = Regions::concatenated(regions.into_iter().map(exposed));
        Self {
            inheritable: regions.iter().map(Region::addresses).collect(),
            regions,
        }
    }

    pub(crate) fn regions(&self) -> &Regions {
        &self.regions
    }

    /// Checks that no other mapping, process or descriptor has any of the memory, which a caller
    /// has mapped: others would find zeros in missing pages. Records the parts that forked children
    /// inherit.
    pub(crate) fn check_private(&mut self) -> Result<(), UserfaultfdError> {
        let mappings = FlaggedRegion::of_this_process().map_err(UserfaultfdError::Unchecked)?;
        let mut inheritable = Vec::new();
        for Region { address, len, .. } in self.regions.iter() {
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
                let flags = flags.unwrap_or_default();
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

    /// Excludes the memory from children that are forked from now on: they would find zeros in
    /// missing pages.
    pub(crate) fn exclude_from_children(&self) -> Result<(), UserfaultfdError> {
        let (advice, what) = (
            MmapAdvise::MADV_DONTFORK,
            "failed to exclude it from forked children",
        );
        let all = [0..self.regions.len()];
        self.advise(&all, advice, what)
    }

    /// Lets forked children inherit the memory as before
    /// [`exclude_from_children`](Self::exclude_from_children), where it is still `mapped`.
    pub(crate) fn restore_to_children(
        &self,
        mapped: &[Range<u64>],
    ) -> Result<(), UserfaultfdError> {
        let (advice, what) = (
            MmapAdvise::MADV_DOFORK,
            "failed to let forked children inherit it again",
        );
        self.advise(mapped, advice, what)
    }

    fn advise(
        &self,
        within: &[Range<u64>],
        advice: MmapAdvise,
        what: &'static str,
    ) -> Result<(), UserfaultfdError> {
        let parts = within
            .iter()
            .flat_map(|range| self.regions.parts(range.clone()));
        for (address, part) in parts {
            let end = address + (part.end - part.start);
            let inherited = self.inheritable.iter();
            let inherited = inherited.map(|range| range.start.max(address)..range.end.min(end));
            for Range { start, end } in inherited.filter(|range| !range.is_empty()) {
                let len = end - start;
                let at = pointer(start);
                // SAFETY: mapped, by the contract of `new`. The advice changes nothing for this
                // process.
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

    /// Discards the content of the memory.
    pub(crate) fn discard(&self) -> Result<(), UserfaultfdError> {
        /// Locked memory too (Linux 5.18).
        const DONTNEED_LOCKED: libc::c_int = 24;
        self.regions.iter().try_for_each(|region| {
            let (start, len) = (region.address, region.len);
            let discard = |advice| {
                let at = pointer(start)?.as_ptr();
                // SAFETY: mapped, private, and filled only by the holder, by the contract of `new`.
                Errno::result(unsafe { libc::madvise(at, len as usize, advice) }).map(drop)
            };
            let discarded = match discard(libc::MADV_DONTNEED) {
                Err(Errno::EINVAL) => discard(DONTNEED_LOCKED),
                other => other,
            };
            discarded.map_err(|errno| UserfaultfdError::Prepare {
                start,
                len,
                what: "failed to discard its previous content",
                source: errno.into(),
            })
        })
    }

    /// Returns the address of the first region.
    pub(crate) fn start(&self) -> *mut u8 {
        let first = self.regions.iter().next();
        first.map_or(std::ptr::null_mut(), |region| {
            std::ptr::with_exposed_provenance_mut(region.address as usize)
        })
    }

    /// Registers the memory, so that accesses to missing pages wait for `fault`. Returns whether
    /// missing pages can be poisoned.
    pub(crate) fn register(&self, fault: &Userfaultfd) -> Result<bool, UserfaultfdError> {
        self.regions.iter().try_fold(true, |poison, region| {
            // SAFETY: mapped, and filled only by the holder, by the contract of `new`.
            let here = unsafe { fault.register(region.address, region.len) }?;
            Ok(poison && here)
        })
    }

    /// Wakes all waiting accesses, which then fault again if their page is missing.
    pub(crate) fn wake(&self, fault: &Userfaultfd) -> Result<(), UserfaultfdError> {
        self.regions.iter().try_for_each(|region| {
            let woken = fault.wake(region.address, region.len);
            woken.map_err(|errno| UserfaultfdError::Wait(errno.into()))
        })
    }

    /// Makes whole pages inaccessible, filled or not.
    pub(crate) fn make_inaccessible(&self, range: Range<u64>) -> nix::Result<()> {
        self.regions.parts(range).try_for_each(|(address, part)| {
            let len = (part.end - part.start) as usize;
            // SAFETY: mapped, and made inaccessible only by the holder, by the contract of `new`.
            unsafe { mprotect(pointer(address)?, len, ProtFlags::PROT_NONE) }
        })
    }

    /// Makes memory that `mremap` has moved inaccessible, and wakes accesses that wait for its
    /// pages.
    pub(crate) fn revoke_moved(fault: &Userfaultfd, moved: &Range<u64>) -> nix::Result<()> {
        let len = moved.end - moved.start;
        // SAFETY: the kernel reports that a part of the memory was moved there. Only the holder
        // makes it inaccessible, by the contract of `new`.
        unsafe { mprotect(pointer(moved.start)?, len as usize, ProtFlags::PROT_NONE) }?;
        fault.unregister(moved.start, len)
    }

    pub(crate) fn host_memory(&self, range: Range<u64>) -> Option<HostMemory<'_>> {
        let (address, part) = self.regions.parts(range).next()?;
        let start = std::ptr::with_exposed_provenance(address as usize);
        // SAFETY: mapped as long as `self`, and covered by no reference, by the contract of `new`.
        // Missing pages are filled when they are touched.
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::region::{self, host_page};

    #[test]
    fn only_the_given_parts_are_inherited_again() {
        let page = host_page();
        let mapping = region::Region::zeros(4 * page).unwrap();
        let at = mapping.as_ptr();
        // SAFETY: nothing accesses the mapping, which outlives the value.
        let memory = unsafe { Memory::new([(at, 4 * page as usize)]) };
        let is_inherited = || {
            let mappings = FlaggedRegion::of_this_process().unwrap();
            [0, 1, 2, 3].map(|number| {
                let address = at.addr() as u64 + number * page;
                let found = |mapping: &&FlaggedRegion| mapping.region.addresses.contains(&address);
                let mapping = mappings.iter().find(found).unwrap();
                !mapping.flags.unwrap().not_inherited
            })
        };
        assert_eq!(is_inherited(), [true; 4]);
        memory.exclude_from_children().unwrap();
        assert_eq!(is_inherited(), [false; 4]);
        memory.restore_to_children(&[page..2 * page]).unwrap();
        assert_eq!(is_inherited(), [false, true, false, false]);
    }

    #[test]
    fn memory_is_private_and_anonymous_only_if_nothing_else_has_it() {
        type Change = fn(&mut ProcessRegion);
        let mappings = FlaggedRegion::of_this_process().unwrap();
        let regions = mappings.iter().map(|mapping| &mapping.region);
        let heap = regions.into_iter().find(|it| it.name == b"[heap]").unwrap();
        assert!(is_private_anonymous(heap));
        let changes: [(Change, bool); 6] = [
            (|it| it.name.clear(), true),
            (|it| it.name = b"[anon:guest]".to_vec(), true),
            (|it| it.name = b"[vvar]".to_vec(), false),
            (|it| it.permissions.shared = true, false),
            (|it| it.inode = 5, false),
            (|it| it.device = (0, 1), false),
        ];
        for (number, (change, expected)) in changes.into_iter().enumerate() {
            let mut region = heap.clone();
            change(&mut region);
            assert_eq!(is_private_anonymous(&region), expected, "change {number}");
        }
    }
}
