//! Sets of features, registration modes, operations and flags.

use bitflags::bitflags;
use linux_raw_sys::general::{
    _UFFDIO_CONTINUE, _UFFDIO_COPY, _UFFDIO_MOVE, _UFFDIO_POISON, _UFFDIO_WAKE,
    _UFFDIO_WRITEPROTECT, _UFFDIO_ZEROPAGE, UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP,
    UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP, UFFD_FEATURE_EXACT_ADDRESS,
    UFFD_FEATURE_MINOR_HUGETLBFS, UFFD_FEATURE_MINOR_SHMEM, UFFD_FEATURE_MISSING_HUGETLBFS,
    UFFD_FEATURE_MISSING_SHMEM, UFFD_FEATURE_MOVE, UFFD_FEATURE_PAGEFAULT_FLAG_WP,
    UFFD_FEATURE_POISON, UFFD_FEATURE_SIGBUS, UFFD_FEATURE_THREAD_ID, UFFD_FEATURE_WP_ASYNC,
    UFFD_FEATURE_WP_HUGETLBFS_SHMEM, UFFD_FEATURE_WP_UNPOPULATED, UFFD_PAGEFAULT_FLAG_MINOR,
    UFFD_PAGEFAULT_FLAG_WP, UFFD_PAGEFAULT_FLAG_WRITE, UFFDIO_REGISTER_MODE_MINOR,
    UFFDIO_REGISTER_MODE_MISSING, UFFDIO_REGISTER_MODE_WP,
};

use crate::abi::{FILL_MODE_DONTWAKE, FILL_MODE_WP, MOVE_MODE_ALLOW_SRC_HOLES, MOVE_MODE_DONTWAKE};

bitflags! {
    /// A set of features of a userfaultfd. The kernel uses a feature only if it was requested when
    /// the descriptor was opened.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Features: u64 {
        /// Faults on write-protected pages (Linux 5.7).
        const PAGEFAULT_FLAG_WP = UFFD_FEATURE_PAGEFAULT_FLAG_WP as u64;
        /// [`Event::Fork`](crate::Event::Fork) (Linux 4.11). Needs `CAP_SYS_PTRACE`.
        const EVENT_FORK = UFFD_FEATURE_EVENT_FORK as u64;
        /// [`Event::Remap`](crate::Event::Remap) (Linux 4.11). Without it, memory that is moved
        /// loses its registration. With it, a thread that moves memory
        /// [waits](crate::Userfaultfd#events-of-changed-mappings) until the event is read.
        const EVENT_REMAP = UFFD_FEATURE_EVENT_REMAP as u64;
        /// [`Event::Remove`](crate::Event::Remove) (Linux 4.11). A thread that discards pages
        /// [waits](crate::Userfaultfd#events-of-changed-mappings) until the event is read.
        const EVENT_REMOVE = UFFD_FEATURE_EVENT_REMOVE as u64;
        /// Missing pages of hugetlbfs (Linux 4.11).
        const MISSING_HUGETLBFS = UFFD_FEATURE_MISSING_HUGETLBFS as u64;
        /// Missing pages of shared memory (Linux 4.11).
        const MISSING_SHMEM = UFFD_FEATURE_MISSING_SHMEM as u64;
        /// [`Event::Unmap`](crate::Event::Unmap) (Linux 4.11). A thread that unmaps memory
        /// [waits](crate::Userfaultfd#events-of-changed-mappings) until the event is read.
        const EVENT_UNMAP = UFFD_FEATURE_EVENT_UNMAP as u64;
        /// A fault raises `SIGBUS` in its thread and is not reported (Linux 4.14).
        const SIGBUS = UFFD_FEATURE_SIGBUS as u64;
        /// A fault reports [its thread](crate::Event::PageFault::thread) (Linux 4.14).
        const THREAD_ID = UFFD_FEATURE_THREAD_ID as u64;
        /// [`Modes::MINOR`] for hugetlbfs (Linux 5.13).
        const MINOR_HUGETLBFS = UFFD_FEATURE_MINOR_HUGETLBFS as u64;
        /// [`Modes::MINOR`] for shared memory (Linux 5.14).
        const MINOR_SHMEM = UFFD_FEATURE_MINOR_SHMEM as u64;
        /// A fault reports the accessed address and not the start of its page (Linux 5.18).
        const EXACT_ADDRESS = UFFD_FEATURE_EXACT_ADDRESS as u64;
        /// [`Modes::WRITE_PROTECT`] for hugetlbfs and shared memory (Linux 5.19).
        const WP_HUGETLBFS_SHMEM = UFFD_FEATURE_WP_HUGETLBFS_SHMEM as u64;
        /// Pages of anonymous memory that were never touched are write-protected too (Linux 6.4).
        const WP_UNPOPULATED = UFFD_FEATURE_WP_UNPOPULATED as u64;
        /// [`Userfaultfd::poison`](crate::Userfaultfd::poison) (Linux 6.6).
        const POISON = UFFD_FEATURE_POISON as u64;
        /// The kernel resolves faults on write-protected pages itself (Linux 6.7).
        const WP_ASYNC = UFFD_FEATURE_WP_ASYNC as u64;
        /// [`Userfaultfd::move_`](crate::Userfaultfd::move_) (Linux 6.8).
        const MOVE = UFFD_FEATURE_MOVE as u64;
        /// Features of newer kernels.
        const _ = !0;
    }
}

bitflags! {
    /// The kinds of page faults that a registered range reports.
    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    pub struct Modes: u64 {
        /// Accesses to missing pages.
        const MISSING = UFFDIO_REGISTER_MODE_MISSING as u64;
        /// Writes to write-protected pages.
        const WRITE_PROTECT = UFFDIO_REGISTER_MODE_WP as u64;
        /// Accesses to pages that the mapped file has, and the mapping does not have.
        const MINOR = UFFDIO_REGISTER_MODE_MINOR as u64;
    }
}

bitflags! {
    /// The operations that a registered range supports. They depend on its kind of memory and on
    /// the [modes](Modes).
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct Operations: u64 {
        /// [`Userfaultfd::wake`](crate::Userfaultfd::wake)
        const WAKE = 1 << _UFFDIO_WAKE;
        /// [`Userfaultfd::copy`](crate::Userfaultfd::copy)
        const COPY = 1 << _UFFDIO_COPY;
        /// [`Userfaultfd::zeropage`](crate::Userfaultfd::zeropage): not for hugetlbfs.
        const ZEROPAGE = 1 << _UFFDIO_ZEROPAGE;
        /// [`Userfaultfd::move_`](crate::Userfaultfd::move_)
        const MOVE = 1 << _UFFDIO_MOVE;
        /// [`Userfaultfd::write_protect`](crate::Userfaultfd::write_protect)
        const WRITE_PROTECT = 1 << _UFFDIO_WRITEPROTECT;
        /// [`Userfaultfd::continue_`](crate::Userfaultfd::continue_)
        const CONTINUE = 1 << _UFFDIO_CONTINUE;
        /// [`Userfaultfd::poison`](crate::Userfaultfd::poison)
        const POISON = 1 << _UFFDIO_POISON;
        /// Operations of newer kernels.
        const _ = !0;
    }
}

bitflags! {
    /// The kind of a page fault.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FaultFlags: u64 {
        /// The access was a write.
        const WRITE = UFFD_PAGEFAULT_FLAG_WRITE as u64;
        /// The page was write-protected ([`Modes::WRITE_PROTECT`]).
        const WRITE_PROTECT = UFFD_PAGEFAULT_FLAG_WP as u64;
        /// The mapped file had the page ([`Modes::MINOR`]). Without this flag and
        /// [`WRITE_PROTECT`](Self::WRITE_PROTECT), the page was missing.
        const MINOR = UFFD_PAGEFAULT_FLAG_MINOR as u64;
        /// Flags of newer kernels.
        const _ = !0;
    }
}

bitflags! {
    /// Options of filling pages. The default wakes the waiting accesses and permits writes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct FillFlags: u64 {
        /// Accesses that wait for the pages are not woken:
        /// [`Userfaultfd::wake`](crate::Userfaultfd::wake) must follow.
        const NO_WAKE = FILL_MODE_DONTWAKE;
        /// The pages are write-protected. Only for [`copy`](crate::Userfaultfd::copy) and
        /// [`continue_`](crate::Userfaultfd::continue_), in ranges with [`Modes::WRITE_PROTECT`].
        const WRITE_PROTECTED = FILL_MODE_WP;
    }
}

bitflags! {
    /// Options of moving pages. The default wakes the waiting accesses and fails for holes.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct MoveFlags: u64 {
        /// Accesses that wait for the pages are not woken:
        /// [`Userfaultfd::wake`](crate::Userfaultfd::wake) must follow.
        const NO_WAKE = MOVE_MODE_DONTWAKE;
        /// Missing pages of the source are skipped. The pages of the destination stay missing, and
        /// count as moved.
        const ALLOW_HOLES = MOVE_MODE_ALLOW_SRC_HOLES;
    }
}
