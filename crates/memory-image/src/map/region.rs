//! Address space of this process that is one guest's RAM.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::fs::File;
use std::io;
use std::mem::ManuallyDrop;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::ptr::NonNull;

use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};
use page_reader::{HostMemory, PageReader};

use crate::restore::HostRam;

const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);
// Private pages are reserved when they are written: a guest rarely writes all of its RAM.
const PRIVATE: MapFlags = MapFlags::MAP_PRIVATE.union(MapFlags::MAP_NORESERVE);

/// A range of private, writable memory, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

// SAFETY: the mapping belongs to no thread; `munmap` may be called from any.
unsafe impl Send for Region {}
// SAFETY: through `&self` an address is handed out and bytes are copied by `HostMemory::copy_to`, which bears any concurrent writer.
unsafe impl Sync for Region {}

impl Region {
    /// The first `len` bytes of `file`, copy-on-write.
    pub(crate) fn of_file(file: &File, len: u64) -> io::Result<Self> {
        let len = in_memory(len)?;
        // SAFETY: no address is asked for, so the kernel picks a range that nothing else uses.
        let start = unsafe { mmap(None, len, READ_WRITE, PRIVATE, file, 0) }?;
        Ok(Self { start, len })
    }

    /// Zeros.
    pub(crate) fn zeros(len: u64) -> io::Result<Self> {
        let len = in_memory(len)?;
        // SAFETY: as for `of_file`.
        let start = unsafe { mmap_anonymous(None, len, READ_WRITE, PRIVATE) }?;
        Ok(Self { start, len })
    }

    /// Shows the bytes of `file` from `offset` on at `range` of the region, copy-on-write, in place of what was there. All three
    /// borders are multiples of the host's page.
    pub(crate) fn map_over(self, range: Range<u64>, file: &File, offset: u64) -> io::Result<Self> {
        assert!(range.start < range.end && range.end <= self.len.get() as u64);
        let len = in_memory(range.end - range.start)?;
        let at = self.start.addr().checked_add(range.start as usize);
        let offset = i64::try_from(offset).map_err(io::Error::other)?;
        let flags = PRIVATE | MapFlags::MAP_FIXED;
        // SAFETY: what is replaced is inside the region (asserted), which is ours alone: `self` is taken by value, so nobody
        // borrows any of it.
        match unsafe { mmap(at, len, READ_WRITE, flags, file, offset) } {
            Ok(_) => Ok(self),
            Err(errno) => {
                self.give_up(&range);
                Err(errno.into())
            }
        }
    }

    /// Unmaps all but `failed`, whole pages for which `mmap` has failed. Linux before 6.12 may have unmapped those, and their addresses may be
    /// another mapping's by now.
    fn give_up(self, failed: &Range<u64>) {
        let region = ManuallyDrop::new(self);
        let end = region.len.get() as u64;
        for kept in [0..failed.start, failed.end..end] {
            if let Ok(len) = in_memory(kept.end.saturating_sub(kept.start)) {
                let start = region
                    .start
                    .map_addr(|at| at.saturating_add(kept.start as usize));
                // SAFETY: a part of the region that is mapped still, is borrowed by nobody as `self` is gone, and is not
                // unmapped again, as `self` is not dropped.
                let _ = unsafe { munmap(start, len.get()) };
            }
        }
    }

    /// Has a page that is touched read by itself, or else with its neighbours.
    pub(crate) fn read_single_pages(&self, single: bool) -> io::Result<()> {
        let advice = match single {
            true => MmapAdvise::MADV_RANDOM,
            false => MmapAdvise::MADV_NORMAL,
        };
        // SAFETY: the region is mapped as long as `self`; the advice changes no byte.
        Ok(unsafe { madvise(self.start, self.len.get(), advice) }?)
    }

    /// The region's first `len` bytes, to be written before there is a guest.
    pub(crate) fn as_target(&mut self, len: u64) -> HostRam<'_> {
        assert!(len <= self.len.get() as u64);
        // SAFETY: the range is mapped and writable as long as `self` is, and borrowed from it exclusively.
        unsafe { HostRam::new([(self.as_ptr(), len as usize)]) }
    }

    /// The address of the first byte, aligned to the host's page.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// The size in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len.get()
    }

    fn memory(&self, offset: u64) -> Option<HostMemory<'_>> {
        // SAFETY: the region is readable from `start` on for `len` bytes, and stays until `self` drops.
        let all = unsafe { HostMemory::new(self.as_ptr(), self.len()) };
        let start = usize::try_from(offset)
            .ok()
            .filter(|start| *start <= self.len())?;
        Some(all.slice(start..self.len()))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: exactly what `mmap` returned; borrows of it ended with `self`. Failing would take an address that is not page-aligned.
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

/// The page of this machine in bytes.
pub(crate) fn host_page() -> u64 {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    page.and_then(|page| u64::try_from(page).ok())
        .expect("POSIX has every system tell its page size")
}

fn in_memory(len: u64) -> io::Result<NonZeroUsize> {
    let len = usize::try_from(len).ok().and_then(NonZeroUsize::new);
    len.ok_or_else(|| io::ErrorKind::OutOfMemory.into())
}
