//! Errors of filling memory on demand.

use std::io;

use page_reader::MappingsError;
use thiserror::Error;
use uffd::AdoptError;

/// Errors of filling memory on demand.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum UserfaultfdError {
    /// The kernel was built without userfaultfd.
    #[error(
        "this kernel has no userfaultfd (CONFIG_USERFAULTFD): restore or map the chain instead"
    )]
    Missing,
    /// The process is not permitted to handle faults that the kernel takes, such as on behalf of a
    /// vCPU.
    #[error(
        "userfaultfd is not permitted: let the process open /dev/userfaultfd (Linux 6.1) or pass it \
         an open one (LazyRamOptions::userfaultfd), give it CAP_SYS_PTRACE, or set the sysctl \
         vm.unprivileged_userfaultfd to 1: {0}"
    )]
    NotPermitted(#[source] io::Error),
    /// The kernel returned no descriptor for another reason.
    #[error("failed to open userfaultfd: {0}")]
    Open(#[source] io::Error),
    /// The descriptor that the caller [passed](crate::LazyRamOptions::userfaultfd) cannot be used.
    #[error("the descriptor that was passed cannot fill the guest's RAM on demand: {0}")]
    Passed(#[source] AdoptError),
    /// The kernel refused to register the memory.
    #[error(
        "memory of length {len} at {start:#x} cannot be registered with userfaultfd: give whole pages of \
         private anonymous memory that is mapped writable and registered with no other userfaultfd: \
         {source}"
    )]
    Register {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The memory consists of huge pages, which cannot be filled page by page.
    #[error(
        "memory of length {len} at {start:#x} consists of huge pages of hugetlbfs: \
         give memory of the host's own page size"
    )]
    HugePages {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
    },
    /// Other users may share the memory: they would find zeros in pages that are still missing.
    #[error(
        "memory of length {len} at {start:#x} is not private anonymous memory ({mapping}), and its other \
         users would find zeros in missing pages: restore the chain into it before anything else uses it \
         (Chain::restore)"
    )]
    Shared {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The mapping that is shared or of a file, as listed in `/proc/self/smaps`.
        mapping: String,
    },
    /// The check that the memory is private failed.
    #[error("failed to check that the memory is private: mount /proc: {0}")]
    Unchecked(#[source] MappingsError),
    /// The memory cannot be discarded, or cannot be excluded from forked children.
    #[error("failed to prepare memory of length {len} at {start:#x}: {what}: {source}")]
    Prepare {
        /// The address of the memory.
        start: u64,
        /// Its length in bytes.
        len: u64,
        /// The step that failed, as text.
        what: &'static str,
        /// The error of the operating system.
        source: io::Error,
    },
    /// Something other than this restore put a page into the memory.
    #[error(
        "the page at offset {offset:#x} of the guest's RAM was filled by something else, and was \
         made inaccessible: do not write to the memory until the restore has finished"
    )]
    Occupied {
        /// The offset of the first affected byte in the RAM.
        offset: u64,
    },
    /// Memory was unmapped or moved while it was being filled.
    #[error(
        "memory of length {len} at offset {offset:#x} of the guest's RAM was unmapped or moved: keep \
         the memory mapped until the restore has finished"
    )]
    Unmapped {
        /// The offset of the first affected byte in the RAM.
        offset: u64,
        /// The number of affected bytes.
        len: u64,
    },
    /// A thread could not be started, or panicked.
    #[error("failed to run a thread that fills the memory: {0}")]
    Thread(#[source] io::Error),
    /// Faults can no longer be received. The memory was made inaccessible.
    #[error("failed to receive faults: the memory was made inaccessible: {0}")]
    Wait(#[source] io::Error),
    /// The process that owns the memory has moved it.
    #[error("memory of the guest was moved by its process: keep it in place until it is filled")]
    MovedElsewhere,
    /// Another process has accessed memory that its message does not list.
    #[error("the process accessed {address:#x}, which is in none of the regions that it has sent")]
    Outside {
        /// The address.
        address: u64,
    },
    /// A page of another process cannot be poisoned.
    #[error(
        "the page at offset {offset:#x} of the guest's RAM cannot be poisoned: something else has \
         filled it, or the kernel is older than Linux 6.6"
    )]
    NotPoisoned {
        /// The offset of the page in the RAM.
        offset: u64,
    },
    /// A page could not be put into the memory.
    #[error(
        "failed to fill the page at offset {offset:#x} of the guest's RAM: check that the memory \
         is mapped and that the host has free memory: {source}"
    )]
    Fill {
        /// The offset of the first affected byte in the RAM.
        offset: u64,
        /// The error of the operating system.
        source: io::Error,
    },
}
