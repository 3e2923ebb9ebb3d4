//! The memory of KVM guests: address space in which KVM can use huge pages, and memory files.

#![allow(unsafe_code)]

use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr::NonNull;

use guest_ram::{Mapping, host_page_size};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap, mmap_anonymous, munmap};
use nix::unistd::ftruncate;

/// The modulus in which a host address and its guest-physical address agree. With a smaller one,
/// neither the host nor KVM could use a 2 MiB page.
const HUGE_PAGE: usize = 2 << 20;

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

/// Maps `len` bytes, shared and without reserving swap, of `file` (a memory file and an offset in
/// it) or of new anonymous memory. The address is congruent to `guest_start` modulo 2 MiB, between
/// unmapped guard pages.
pub(crate) fn map_shared(
    len: usize,
    guest_start: u64,
    file: Option<(&OwnedFd, u64)>,
) -> nix::Result<Mapping> {
    let length = NonZeroUsize::new(len).ok_or(Errno::EINVAL)?;
    let reserve = length.checked_add(2 * HUGE_PAGE).ok_or(Errno::ENOMEM)?;
    let reservation = Reservation::new(reserve)?;

    // The start is at least one page into the reservation, and at most 2 MiB further. So `len`
    // bytes and a guard page fit into the rest of the additional 4 MiB.
    let first = reservation.start.addr().get() + host_page_size() as usize;
    let ahead = (guest_start as usize).wrapping_sub(first) % HUGE_PAGE;
    let start = NonZeroUsize::MIN.saturating_add(first + ahead - 1);
    let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    let flags = MapFlags::MAP_SHARED | MapFlags::MAP_NORESERVE | MapFlags::MAP_FIXED;
    let mapped = match file {
        // SAFETY: [start, start + len) is inside the reservation made above, which no other code
        // has.
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
    }?;
    // SAFETY: the mapping made above, which stays until its reservation is dropped. No reference to
    // it exists. A memory file behind it is sealed.
    Ok(unsafe { Mapping::new(mapped.cast(), len, reservation) })
}

/// Asks the host for huge pages, which it need not provide.
pub(crate) fn advise_huge_pages(mapping: &Mapping) -> nix::Result<()> {
    let start = mapping.start().cast();
    // SAFETY: the whole mapping, which exists; the advice changes no content.
    unsafe { madvise(start, mapping.len(), MmapAdvise::MADV_HUGEPAGE) }
}

/// Address space of this process, and what is mapped in it.
#[derive(Debug)]
struct Reservation {
    start: NonNull<u8>,
    len: NonZeroUsize,
}

// SAFETY: address space belongs to the process, not to a thread. The value only unmaps it.
unsafe impl Send for Reservation {}
// SAFETY: as above. No method takes `&self`.
unsafe impl Sync for Reservation {}

impl Reservation {
    fn new(len: NonZeroUsize) -> nix::Result<Self> {
        let unused = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping at an address that the kernel chooses replaces nothing.
        let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, unused) }?.cast();
        Ok(Self { start, len })
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        // SAFETY: the reservation that `new` made. A `Mapping` in it owns the value, and a slot
        // that maps it for a guest holds the RAM until KVM has removed the slot. A failure leaves
        // it mapped, which is harmless.
        let _ = unsafe { munmap(self.start.cast(), self.len.get()) };
    }
}
