//! Mappings of guest RAM, and the KVM calls that `kvm-ioctls` lacks.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering::Relaxed};

use kvm_bindings::{KVMIO, kvm_clear_dirty_log, kvm_clear_dirty_log__bindgen_ty_1};
use kvm_ioctls::VmFd;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::{SysconfVar, ftruncate, sysconf};
use page_reader::HostMemory;

/// The size of a machine word in bytes, the unit of stores to guest memory.
const WORD: usize = size_of::<usize>();

/// The modulus in which a host address and its guest-physical address agree. With a smaller one,
/// neither the host nor KVM could use a 2 MiB page.
const HUGE_PAGE: usize = 2 << 20;

/// Returns the host's page size in bytes, which is also the page size of KVM's dirty log.
pub(crate) fn page_size() -> u64 {
    match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(size)) => size as u64,
        other => unreachable!("POSIX requires PAGE_SIZE on every system: {other:?}"),
    }
}

/// Creates a memory file of `len` bytes whose size is sealed: a mapping of it never faults past its
/// end.
pub(crate) fn sealed_memfd(name: &str, len: u64) -> nix::Result<OwnedFd> {
    let len = i64::try_from(len).map_err(|_| Errno::EFBIG)?;
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let memfd = memfd_create(name, flags)?;
    ftruncate(&memfd, len)?;
    let seals = SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL;
    fcntl(&memfd, FcntlArg::F_ADD_SEALS(seals))?;
    Ok(memfd)
}

/// A mapping of this process that backs one range of guest RAM, readable and writable as long as
/// the value exists.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    len: usize,
    /// The address space to unmap on drop; `None` if the memory belongs to the caller.
    reserved: Option<(NonNull<u8>, usize)>,
}

// SAFETY: a mapping belongs to the process, not to a thread, and no reference to it is ever given
// out.
unsafe impl Send for Mapping {}
// SAFETY: `store` and `host_memory` access the bytes with atomic operations only, which may race
// with each other and with the guest.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes, shared and without reserving swap, of `file` (a memory file and an offset
    /// in it) or of new anonymous memory. The address is congruent to `guest_start` modulo 2 MiB,
    /// between unmapped guard pages.
    pub(crate) fn new(
        len: usize,
        guest_start: u64,
        file: Option<(&OwnedFd, u64)>,
    ) -> nix::Result<Self> {
        let length = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
        let reserve = length.checked_add(2 * HUGE_PAGE).ok_or(Errno::ENOMEM)?;
        let unused = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let reservation =
            unsafe { mmap_anonymous(None, reserve, ProtFlags::PROT_NONE, unused) }?.cast::<u8>();

        // The start is at least one page into the reservation, and at most 2 MiB further. So `len`
        // bytes and a guard page fit into the rest of the additional 4 MiB.
        let page = page_size() as usize;
        let first = reservation.addr().get() + page;
        let ahead = (guest_start as usize).wrapping_sub(first) % HUGE_PAGE;
        let start = NonZeroUsize::MIN.saturating_add(first + ahead - 1);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
        let mapped = match file {
            // SAFETY: [start, start + len) is inside the reservation made above, which no other
            // code has.
            Some((file, offset)) => unsafe {
                mmap(
                    Some(start),
                    length,
                    access,
                    flags,
                    file.as_fd(),
                    offset as i64,
                )
            },
            // SAFETY: as above.
            None => unsafe { mmap_anonymous(Some(start), length, access, flags) },
        };
        let mapped = mapped.inspect_err(|_| {
            // SAFETY: the reservation made above, in which nothing was mapped. A failure costs
            // address space only.
            let _ = unsafe { munmap(reservation.cast(), reserve.get()) };
        })?;
        Ok(Self {
            start: mapped.cast(),
            len,
            reserved: Some((reservation, reserve.get())),
        })
    }

    /// Uses memory that the caller has mapped.
    ///
    /// # Safety
    /// As long as the value exists, the range is mapped readable and writable, no Rust reference
    /// covers any of it, and Rust code of this process that accesses it does so by atomic or
    /// volatile operations.
    pub(crate) unsafe fn adopt(start: NonNull<u8>, len: usize) -> Self {
        Self {
            start,
            len,
            reserved: None,
        }
    }

    /// Returns the address of the first byte.
    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// Asks the host for huge pages, which it need not provide.
    pub(crate) fn advise_huge_pages(&self) -> nix::Result<()> {
        // SAFETY: the whole mapping, which exists; the advice changes no content.
        unsafe { madvise(self.start.cast(), self.len, MmapAdvise::MADV_HUGEPAGE) }
    }

    /// Returns the `len` bytes from `offset` on.
    pub(crate) fn host_memory(&self, offset: usize, len: usize) -> HostMemory<'_> {
        self.check(offset, len);
        let start = self.start.as_ptr().wrapping_add(offset);
        // SAFETY: inside the mapping (checked), which stays while `self` is borrowed. No reference
        // to it is ever made; `store` writes it with atomic operations, and `adopt` requires the
        // same of its caller. A memory file behind it is sealed.
        unsafe { HostMemory::new(start, len) }
    }

    /// Copies `bytes` to `offset`, each aligned machine word in a single store.
    pub(crate) fn store(&self, offset: usize, bytes: &[u8]) {
        self.check(offset, bytes.len());
        let mut to = self.start.as_ptr().wrapping_add(offset);
        let (head, rest) = bytes.split_at(to.align_offset(WORD).min(bytes.len()));
        let (words, tail) = rest.as_chunks::<WORD>();
        store_bytes(&mut to, head);
        for word in words {
            // SAFETY: inside the mapping (checked above), and aligned since `head` ends at a word
            // border. The reference is to an atomic, exists for this store only, and makes no claim
            // about other reads and writes.
            unsafe { (*to.cast::<AtomicUsize>()).store(usize::from_ne_bytes(*word), Relaxed) };
            to = to.wrapping_add(WORD);
        }
        store_bytes(&mut to, tail);

        fn store_bytes(to: &mut *mut u8, bytes: &[u8]) {
            for byte in bytes {
                // SAFETY: as for words; a byte needs no alignment.
                unsafe { (*to.cast::<AtomicU8>()).store(*byte, Relaxed) };
                *to = to.wrapping_add(1);
            }
        }
    }

    fn check(&self, offset: usize, len: usize) {
        assert!(
            offset <= self.len && len <= self.len - offset,
            "{len} bytes at {offset} of a mapping of {}",
            self.len
        );
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if let Some((start, len)) = self.reserved {
            // SAFETY: the reservation that `new` made. A `HostMemory` of it borrows `self`, and a
            // slot that maps it for a guest holds the RAM until KVM has removed the slot. A failure
            // leaves it mapped, which is harmless.
            let _ = unsafe { munmap(start.cast(), len) };
        }
    }
}

/// Clears the pages set in `words` (those of the log from `first_page` on) in KVM's log, and
/// protects them again (`KVM_CLEAR_DIRTY_LOG`).
pub(crate) fn clear_dirty_log(
    vm: &VmFd,
    slot: u32,
    first_page: u64,
    num_pages: u32,
    words: &[u64],
) -> nix::Result<()> {
    assert!(words.len() as u64 * 64 >= u64::from(num_pages));
    let mut clear = kvm_clear_dirty_log {
        slot,
        num_pages,
        first_page,
        __bindgen_anon_1: kvm_clear_dirty_log__bindgen_ty_1 {
            dirty_bitmap: words.as_ptr().cast_mut().cast(),
        },
    };
    // SAFETY: the descriptor is that of a VM. KVM reads `num_pages` bits, which `words` has
    // (asserted), and writes only the bits of the structure.
    unsafe { ioctl::clear_dirty_log(vm.as_raw_fd(), &raw mut clear) }.map(drop)
}

mod ioctl {
    use super::{KVMIO, kvm_clear_dirty_log};

    // Linux include/uapi/linux/kvm.h: _IOWR(KVMIO, 0xc0, struct kvm_clear_dirty_log)
    nix::ioctl_readwrite!(clear_dirty_log, KVMIO, 0xc0, kvm_clear_dirty_log);
}
