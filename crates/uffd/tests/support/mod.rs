//! Memory for tests, by address, and waiting for events.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::thread::{self, JoinHandle};

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};
use uffd::{Event, FaultFlags, Userfaultfd};

pub(crate) fn page_size() -> u64 {
    sysconf(SysconfVar::PAGE_SIZE).unwrap().unwrap() as u64
}

/// Mapped pages, which are unmapped when the value is dropped. No reference covers them.
pub(crate) struct Memory {
    start: u64,
    page: u64,
    pages: u64,
}

const ACCESS: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

impl Memory {
    /// Maps private anonymous memory of small pages.
    pub(crate) fn private(pages: u64) -> Self {
        let page = page_size();
        let size = NonZeroUsize::new((pages * page) as usize).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, size, ACCESS, MapFlags::MAP_PRIVATE) }.unwrap();
        // SAFETY: the new mapping. Kernels without huge pages refuse the call, to the same effect.
        let _ = unsafe { madvise(start, size.get(), MmapAdvise::MADV_NOHUGEPAGE) };
        Self::at(start, page, pages)
    }

    /// Maps huge pages.
    pub(crate) fn huge(page: u64, pages: u64) -> nix::Result<Self> {
        let size = NonZeroUsize::new((pages * page) as usize).unwrap();
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_HUGETLB;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, size, ACCESS, flags) }?;
        Ok(Self::at(start, page, pages))
    }

    /// Maps a new file in memory.
    pub(crate) fn shared(pages: u64) -> (Self, File) {
        let file = File::from(memfd_create(c"uffd", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(pages * page_size()).unwrap();
        (Self::of(&file, pages), file)
    }

    /// Maps a file.
    pub(crate) fn of(file: &File, pages: u64) -> Self {
        let page = page_size();
        let size = NonZeroUsize::new((pages * page) as usize).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, size, ACCESS, MapFlags::MAP_SHARED, file, 0) }.unwrap();
        Self::at(start, page, pages)
    }

    fn at(start: NonNull<libc::c_void>, page: u64, pages: u64) -> Self {
        let start = start.expose_provenance().get() as u64;
        Self { start, page, pages }
    }

    pub(crate) fn range(&self) -> Range<u64> {
        self.pages(0..self.pages)
    }

    pub(crate) fn pages(&self, pages: Range<u64>) -> Range<u64> {
        self.start + pages.start * self.page..self.start + pages.end * self.page
    }

    pub(crate) fn page(&self, index: u64) -> Range<u64> {
        self.pages(index..index + 1)
    }

    /// Returns the address of a page.
    pub(crate) fn address(&self, index: u64) -> u64 {
        self.page(index).start
    }

    /// Gives up the mapping, which something else unmaps.
    pub(crate) fn forget(self) {
        std::mem::forget(self);
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: the value's own mapping, to which no reference exists.
        unsafe { munmap(pointer(self.start), (self.pages * self.page) as usize) }.unwrap();
    }
}

pub(crate) fn pointer(address: u64) -> NonNull<libc::c_void> {
    NonNull::new(std::ptr::with_exposed_provenance_mut(address as usize)).unwrap()
}

/// Reads a byte of mapped memory.
pub(crate) fn load(address: u64) -> u8 {
    // SAFETY: the tests pass addresses of their mappings, which other threads access in this way
    // too.
    unsafe { AtomicU8::from_ptr(pointer(address).cast().as_ptr()) }.load(Relaxed)
}

/// Writes a byte of mapped memory.
pub(crate) fn store(address: u64, byte: u8) {
    // SAFETY: as for `load`.
    unsafe { AtomicU8::from_ptr(pointer(address).cast().as_ptr()) }.store(byte, Relaxed)
}

/// Lets the kernel read a byte of memory.
pub(crate) fn load_by_kernel(address: u64) -> nix::Result<u8> {
    let (read, write) = nix::unistd::pipe().unwrap();
    // SAFETY: the kernel checks the address and reads one byte.
    let written = unsafe { libc::write(write.as_raw_fd(), pointer(address).as_ptr(), 1) };
    Errno::result(written)?;
    let mut byte = [0];
    assert_eq!(nix::unistd::read(&read, &mut byte), Ok(1));
    Ok(byte[0])
}

/// Discards pages.
pub(crate) fn discard(range: Range<u64>) {
    let len = (range.end - range.start) as usize;
    // SAFETY: the tests pass ranges of their mappings, to which no reference exists.
    unsafe { madvise(pointer(range.start), len, MmapAdvise::MADV_DONTNEED) }.unwrap();
}

/// Runs `work` in a thread, which a failed test leaves behind.
pub(crate) fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    thread::spawn(work)
}

/// Waits for an event and reads it.
pub(crate) fn next_event(fault: &Userfaultfd) -> Event {
    loop {
        let mut ready = [PollFd::new(fault.as_fd(), PollFlags::POLLIN)];
        match poll(&mut ready, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(errno) => panic!("poll: {errno}"),
        }
        if let Some(event) = fault.read_event().unwrap() {
            return event;
        }
    }
}

/// Waits for a page fault, and returns its address and flags.
pub(crate) fn next_fault(fault: &Userfaultfd) -> (u64, FaultFlags) {
    match next_event(fault) {
        Event::PageFault { address, flags, .. } => (address, flags),
        other => panic!("{other:?}"),
    }
}

/// Waits until as many page faults are unread.
pub(crate) fn wait_for_pending(fault: &Userfaultfd, faults: usize) {
    while count(fault, "pending:") != faults {
        thread::yield_now();
    }
}

/// Returns the number of accesses that wait, with those whose faults were read.
pub(crate) fn waiting(fault: &Userfaultfd) -> usize {
    count(fault, "total:")
}

/// Returns a number of `/proc/self/fdinfo`.
fn count(fault: &Userfaultfd, field: &str) -> usize {
    let info = format!("/proc/self/fdinfo/{}", fault.as_raw_fd());
    let info = std::fs::read_to_string(&info).unwrap();
    let number = info.lines().find_map(|line| line.strip_prefix(field));
    number.unwrap().trim().parse().unwrap()
}

/// Registers a range of a test's own mapping.
pub(crate) fn register(
    fault: &Userfaultfd,
    range: Range<u64>,
    modes: uffd::Modes,
) -> uffd::Operations {
    // SAFETY: the tests pass ranges of their mappings, to which no reference exists, and decide
    // what missing pages contain.
    unsafe { fault.register(range, modes) }.unwrap()
}

/// Returns bytes of a page, all the same.
pub(crate) fn page_of(byte: u8) -> Vec<u8> {
    vec![byte; page_size() as usize]
}
