//! A range of this process's address space that holds one guest's RAM.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use host_memory::store_zeros;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{HostMemory, PageReader};

use crate::restore::HostRam;

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
// No swap is reserved: a guest rarely writes all of its RAM.
const PRIVATE: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

/// A range of private, writable memory. Dropping it unmaps the memory.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: the mapping is not tied to a thread; `munmap` may be called from any thread.
unsafe impl Send for Region {}
// SAFETY: `&self` only gives out an address and copies bytes by `HostMemory::copy_to`, which
// tolerates concurrent writers.
unsafe impl Sync for Region {}

impl Region {
    /// Maps the first `len` bytes of `file` copy-on-write.
    pub(crate) fn of_file(file: &File, len: u64) -> io::Result<Self> {
        let len = in_memory(len)?;
        // SAFETY: no address is requested, so the kernel picks an unused range.
        let start = unsafe { mmap(None, len, READ_WRITE, PRIVATE, file, 0) }?;
        Ok(Self { start, len })
    }

    /// Maps anonymous zeros.
    pub(crate) fn zeros(len: u64) -> io::Result<Self> {
        let len = in_memory(len)?;
        // SAFETY: as for `of_file`.
        let start = unsafe { mmap_anonymous(None, len, READ_WRITE, PRIVATE) }?;
        Ok(Self { start, len })
    }

    /// Maps the bytes of `file` from `offset` on over `range` of the region, copy-on-write. Both
    /// ends of the range and the offset must be multiples of the host's page.
    pub(crate) fn map_over(self, range: Range<u64>, file: &File, offset: u64) -> io::Result<Self> {
        assert!(range.start < range.end && range.end <= self.len.get() as u64);
        let len = in_memory(range.end - range.start)?;
        let at = self.start.addr().checked_add(range.start as usize);
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let flags = PRIVATE | MapFlags::MAP_FIXED;
        // SAFETY: the replaced range is inside the region (asserted), which this value owns. `self`
        // is taken by value, so nothing borrows any of it.
        match unsafe { mmap(at, len, READ_WRITE, flags, file, offset) } {
            Ok(_) => Ok(self),
            Err(errno) => {
                self.unmap_except(&range);
                Err(errno.into())
            }
        }
    }

    /// Unmaps all of the region except `failed`, the pages for which `mmap` failed. Linux before
    /// 6.12 may have unmapped these, and another mapping may use their addresses by now.
    fn unmap_except(self, failed: &Range<u64>) {
        let region = ManuallyDrop::new(self);
        let end = region.len.get() as u64;
        for kept in [0..failed.start, failed.end..end] {
            if let Ok(len) = in_memory(kept.end.saturating_sub(kept.start)) {
                let start = region
                    .start
                    .map_addr(|at| at.saturating_add(kept.start as usize));
                // SAFETY: this part of the region is still mapped. Nothing borrows it, because
                // `self` is taken by value. It is unmapped once, because `self` is not dropped.
                let _ = unsafe { munmap(start, len.get()) };
            }
        }
    }

    /// Selects whether touching a page reads it alone or with its neighbors.
    pub(crate) fn read_single_pages(&self, single: bool) -> io::Result<()> {
        let advice = match single {
            true => MmapAdvise::MADV_RANDOM,
            false => MmapAdvise::MADV_NORMAL,
        };
        // SAFETY: the region is mapped as long as `self`; the advice changes no byte.
        Ok(unsafe { madvise(self.start, self.len.get(), advice) }?)
    }

    /// Returns the region's first `len` bytes as a restore target, to be written before a guest
    /// runs.
    pub(crate) fn as_target(&mut self, len: u64) -> HostRam<'_> {
        assert!(len <= self.len.get() as u64);
        // SAFETY: the range is mapped and writable as long as `self`, and borrowed from it
        // exclusively.
        unsafe { HostRam::new([(self.as_ptr(), len as usize)]) }
    }

    /// Overwrites a range with zeros. Others may access it concurrently.
    pub(crate) fn write_zeros(&self, range: Range<u64>) -> io::Result<()> {
        let len = range.end.saturating_sub(range.start);
        let memory = match usize::try_from(len) {
            Ok(0) if range.end <= self.len() as u64 => return Ok(()),
            Ok(len) => self
                .host_memory(range.start, len)
                .filter(|it| it.len() == len),
            Err(_) => None,
        };
        let memory = memory.ok_or(io::ErrorKind::UnexpectedEof)?;
        // SAFETY: the memory is in the region, which is mapped and writable as long as `self`. No
        // reference to it exists: `HostMemory` is accessed by address.
        unsafe { store_zeros(memory.as_ptr().cast_mut(), memory.len()) };
        Ok(())
    }

    /// Returns the address of the first byte, aligned to the host's page.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Returns the size in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }

    fn memory(&self, offset: u64) -> Option<HostMemory<'_>> {
        // SAFETY: the region is readable from `start` on for `len` bytes, and stays mapped until
        // `self` drops.
        let all = unsafe { HostMemory::new(self.as_ptr(), self.len()) };
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| *start <= self.len())?;
        Some(all.slice(start..self.len()))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: the range is the one that `mmap` returned, and borrows of it ended with `self`.
        // The call fails only for an unaligned address.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

impl PageReader for Region {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let memory = self
            .memory(offset)
            .filter(|memory| memory.len() >= buf.len());
        let memory = memory.ok_or(io::ErrorKind::UnexpectedEof)?;
        memory.slice(0..buf.len()).copy_to(buf);
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let memory = self.memory(offset)?;
        let memory = memory.slice(0..len.min(memory.len()));
        Some(memory).filter(|memory| !memory.is_empty())
    }
}

/// Returns the page size of this machine in bytes.
pub(crate) fn host_page() -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|page| u64::try_from(page).ok())
        .expect("POSIX requires a page size")
}

fn in_memory(len: u64) -> io::Result<NonZeroUsize> {
    let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
    len.ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}

#[cfg(test)]
mod tests {
    use nix::errno::Errno;
    use test_machine::is_alone;

    use super::*;

    /// Returns whether each page from `start` on is mapped.
    fn mapped(start: NonNull<c_void>, pages: usize) -> Vec<bool> {
        let page = host_page() as usize;
        let is_mapped = |number: usize| {
            let at = start.map_addr(|at| at.saturating_add(number * page));
            // SAFETY: the advice changes nothing.
            match unsafe { madvise(at, page, MmapAdvise::MADV_NORMAL) } {
                Ok(()) => true,
                Err(Errno::ENOMEM) => false,
                Err(other) => panic!("{other}"),
            }
        };
        (0..pages).map(is_mapped).collect()
    }

    /// Other tests could map their memory where this one has unmapped its own.
    #[test]
    fn memory_is_unmapped_except_where_a_mapping_failed() {
        if !is_alone("map::region::tests::memory_is_unmapped_except_where_a_mapping_failed") {
            return;
        }
        let page = host_page();
        let region = Region::zeros(4 * page).unwrap();
        let start = region.start;
        assert_eq!(mapped(start, 4), [true; 4]);
        drop(region);
        assert_eq!(mapped(start, 4), [false; 4]);

        for failed in 0..4 {
            let region = Region::zeros(4 * page).unwrap();
            let start = region.start;
            region.unmap_except(&(failed * page..(failed + 1) * page));
            let expected = [0, 1, 2, 3].map(|page| page == failed);
            assert_eq!(mapped(start, 4), expected);
            let left = start.map_addr(|at| at.saturating_add((failed * page) as usize));
            // SAFETY: the page is still mapped, and nothing refers to it.
            unsafe { munmap(left, page as usize) }.unwrap();
        }
    }
}
