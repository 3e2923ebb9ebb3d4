//! Mapped memory.

use std::num::NonZeroUsize;
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;

use host_memory::HostMemory;
use nix::libc;
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, mprotect, munmap};

/// The size of a page of these tests in bytes.
pub const PAGE: usize = 4096;

/// Large mappings reserve address space only.
const NO_RESERVE: MapFlags = MapFlags::MAP_NORESERVE;

/// Returns bytes in which adjacent pages differ, and adjacent words of a page differ.
pub fn pattern(len: usize) -> Vec<u8> {
    (0..len)
        .map(|i| ((i as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8)
        .collect()
}

/// Anonymous memory, shared with forked children or private to each process.
///
/// Private memory is between guard pages: the kernel merges adjacent mappings of the same kind,
/// also those of two tests, and then lists them as one.
#[derive(Debug)]
pub struct Mapping {
    start: NonNull<libc::c_void>,
    len: usize,
    /// The size of the guard on each side in bytes.
    guard: usize,
}

impl Mapping {
    /// Maps `len` bytes of private memory.
    pub fn private(len: usize) -> Self {
        Self::new(len, MapFlags::MAP_PRIVATE | NO_RESERVE)
    }

    /// Maps `len` bytes of shared memory.
    pub fn shared(len: usize) -> Self {
        Self::new(len, MapFlags::MAP_SHARED)
    }

    /// Maps private memory with these bytes.
    pub fn private_with(bytes: &[u8]) -> Self {
        let mapping = Self::new(bytes.len(), MapFlags::MAP_PRIVATE);
        mapping.write(bytes);
        mapping
    }

    /// Reserves address space.
    pub fn inaccessible(len: usize) -> Self {
        Self::reserved(len, 0, MapFlags::MAP_PRIVATE | NO_RESERVE)
    }

    fn new(len: usize, flags: MapFlags) -> Self {
        let guard = if flags.contains(MapFlags::MAP_PRIVATE) {
            PAGE
        } else {
            0
        };
        let mapping = Self::reserved(len, guard, flags);
        mapping.allow(len);
        mapping
    }

    fn reserved(len: usize, guard: usize, flags: MapFlags) -> Self {
        let whole = NonZeroUsize::new(len + 2 * guard).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap_anonymous(None, whole, ProtFlags::PROT_NONE, flags) }.unwrap();
        // SAFETY: inside the mapping.
        let start = unsafe { start.byte_add(guard) };
        Self { start, len, guard }
    }

    /// Writes bytes at the start of the mapping.
    pub fn write(&self, bytes: &[u8]) {
        assert!(bytes.len() <= self.len);
        // SAFETY: mapped and writable. These tests have no concurrent writer.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.as_ptr(), bytes.len()) }
    }

    /// Maps the first `len` bytes of a file.
    #[cfg(target_os = "linux")]
    pub fn of_file(file: BorrowedFd<'_>, len: usize, shared: bool) -> Self {
        let kind = if shared {
            MapFlags::MAP_SHARED
        } else {
            MapFlags::MAP_PRIVATE
        };
        let flags = kind | NO_RESERVE;
        let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let length = NonZeroUsize::new(len).unwrap();
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { nix::sys::mman::mmap(None, length, protection, flags, file, 0) };
        Self {
            start: start.unwrap(),
            len,
            guard: 0,
        }
    }

    /// Writes bytes at `offset` of the mapping.
    pub fn write_at(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.len);
        let to = self.as_ptr().wrapping_add(offset);
        // SAFETY: as for `write`.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
    }

    /// Makes the first `len` bytes readable and writable.
    pub fn allow(&self, len: usize) {
        assert!(len <= self.len);
        // SAFETY: inside the mapping, which is borrowed only as memory that may change.
        unsafe {
            mprotect(
                self.start,
                len,
                ProtFlags::PROT_READ | ProtFlags::PROT_WRITE,
            )
        }
        .unwrap();
    }

    /// Calls `madvise` for a range of the mapping.
    ///
    /// # Errors
    /// Returns the error of the system.
    pub fn advise(&self, range: Range<usize>, advice: MmapAdvise) -> nix::Result<()> {
        assert!(range.start <= range.end && range.end <= self.len);
        let start = self.start.as_ptr().wrapping_byte_add(range.start);
        // SAFETY: inside the mapping, which is borrowed only as memory that may change.
        unsafe { madvise(NonNull::new(start).unwrap(), range.len(), advice) }
    }

    /// Returns how many bytes of the mapping are in this process's page tables.
    #[cfg(target_os = "linux")]
    pub fn resident(&self) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let header = format!("{:x}-", self.address());
        let mapping = smaps.lines().skip_while(|line| !line.starts_with(&header));
        let rss = mapping
            .filter_map(|line| line.strip_prefix("Rss:"))
            .next()
            .unwrap();
        rss.trim()
            .strip_suffix(" kB")
            .unwrap()
            .parse::<u64>()
            .unwrap()
            << 10
    }

    /// Returns the address of the first byte.
    pub fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr().cast()
    }

    /// Returns the address of the first byte as a number.
    pub fn address(&self) -> u64 {
        self.as_ptr() as u64
    }

    /// Returns the memory of the mapping.
    pub fn memory(&self) -> HostMemory<'_> {
        // SAFETY: mapped until drop, which the borrow prevents; written through raw pointers only.
        unsafe { HostMemory::new(self.as_ptr(), self.len) }
    }
}

// SAFETY: an address range, which any thread may use.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        let (guard, whole) = (self.guard, self.len + 2 * self.guard);
        // SAFETY: this value owns the mapping, and no borrow of it is left.
        unsafe { munmap(self.start.byte_sub(guard), whole) }.unwrap();
    }
}
