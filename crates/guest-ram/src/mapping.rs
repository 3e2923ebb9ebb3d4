//! Memory of this process that backs guest RAM, and the racing accesses to it.

#![allow(unsafe_code)]

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;

use host_memory::{HostMemory, store_bytes};
use nix::errno::Errno;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, sysconf};

/// Returns the page size of the host in bytes: 4 KiB on most x86-64 systems, 16 KiB on Apple
/// silicon.
#[must_use]
pub fn host_page_size() -> u64 {
    match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(size)) => size as u64,
        other => unreachable!("POSIX requires PAGE_SIZE on every system: {other:?}"),
    }
}

/// A mapping of this process that backs one region of guest RAM. It is readable and writable while
/// the value exists.
///
/// # Examples
/// ```
/// use guest_ram::{Mapping, host_page_size};
///
/// let mapping = Mapping::anonymous(host_page_size() as usize)?;
/// mapping.store(16, b"bytes");
/// let mut copy = [0; 5];
/// mapping.host_memory(16, 5).copy_to(&mut copy);
/// assert_eq!(&copy, b"bytes");
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "the memory is unmapped when this is dropped"]
pub struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// Keeps the memory mapped until it is dropped.
    _owner: Box<dyn fmt::Debug + Send + Sync>,
}

// SAFETY: a mapping belongs to the process, not to a thread, and no method returns a reference to
// it. The owner is Send.
unsafe impl Send for Mapping {}
// SAFETY: `store` and `host_memory` access the bytes only with atomic operations, which may race
// with each other and with the guest. The owner is Sync.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of private anonymous memory, which is zero. The host provides pages when
    /// they are touched, and no swap space is reserved.
    ///
    /// # Errors
    /// Returns the error of `mmap`. A `len` of 0 is [`InvalidInput`](io::ErrorKind::InvalidInput).
    pub fn anonymous(len: usize) -> io::Result<Self> {
        let length = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: the kernel chooses the address, so the new mapping replaces no other.
        let start = unsafe { mmap_anonymous(None, length, access, flags) }?.cast();
        // SAFETY: only `Anonymous` unmaps the new mapping, to which no reference exists.
        Ok(unsafe { Self::new(start, len, Anonymous { start, len }) })
    }

    /// Refers to `len` bytes that other code has mapped. `owner` is dropped with the value and may
    /// then unmap the memory. Pass `()` if other code unmaps it.
    ///
    /// # Safety
    /// While the returned value exists, which keeps `owner`:
    /// - The range is mapped, readable and writable. A file behind it is not truncated.
    /// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
    ///   pointers, with atomic or volatile operations.
    pub unsafe fn new(
        start: NonNull<u8>,
        len: usize,
        owner: impl fmt::Debug + Send + Sync + 'static,
    ) -> Self {
        Self {
            start,
            len,
            _owner: Box::new(owner),
        }
    }

    /// Returns the address of the first byte.
    #[must_use]
    pub fn start(&self) -> NonNull<u8> {
        self.start
    }

    /// Returns the length in bytes.
    #[must_use]
    #[allow(clippy::len_without_is_empty, reason = "RAM regions are not empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Returns the `len` bytes from `offset` on.
    ///
    /// # Panics
    /// Panics if they are not inside the mapping.
    #[must_use]
    pub fn host_memory(&self, offset: usize, len: usize) -> HostMemory<'_> {
        self.check(offset, len);
        let start = self.start.as_ptr().wrapping_add(offset);
        // SAFETY: the range is inside the mapping (checked), which stays mapped while `self` is
        // borrowed. No reference to it exists. `store` writes it with atomic operations, and the
        // contract of `new` requires the same of other code, and that a file is not truncated.
        unsafe { HostMemory::new(start, len) }
    }

    /// Copies `bytes` to `offset`, with a single store for each aligned machine word.
    ///
    /// This marks no page: [`GuestRam::write_at`](crate::GuestRam::write_at) does.
    ///
    /// # Panics
    /// Panics if they do not fit into the mapping. Nothing is copied.
    pub fn store(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        let to = self.start.as_ptr().wrapping_add(offset);
        // SAFETY: the range is inside the mapping (checked), which is writable. No reference to it
        // exists, and the contract of `new` requires atomic or volatile accesses of other code.
        unsafe { store_bytes(to, bytes) };
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of a mapping of {}",
            self.len
        );
    }
}

/// The owner of anonymous memory, which unmaps it.
#[derive(Debug)]
struct Anonymous {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: a mapping belongs to the process, not to a thread. The value only unmaps it.
unsafe impl Send for Anonymous {}
// SAFETY: as above. No method takes `&self`.
unsafe impl Sync for Anonymous {}

impl Drop for Anonymous {
    fn drop(&mut self) {
        // SAFETY: `Mapping::anonymous` created the mapping. Every `HostMemory` of it borrows the
        // `Mapping` that owns this value, and a hypervisor's registration holds the RAM. After an
        // error it stays mapped, which is harmless.
        let _ = unsafe { munmap(self.start.cast(), self.len) };
    }
}
