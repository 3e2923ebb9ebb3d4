//! The memory of another process as a source of pages.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use host_memory::check_range;
use page_reader::{
    AddressSpace, FileReader, Layered, LayeredError, MemoryFiles, PageReader, PopulatedRanges,
};

/// A guest's RAM in the VMM's process, read from another process through `/proc/<pid>/mem`.
///
/// The memory is that of the process at the time of opening, never that of another process. If the
/// process ends or executes another program, reads fail, even if its process id is reused.
/// (`process_vm_readv` identifies processes by id, so it could read the memory of an unrelated
/// process. It is only 1.2 times as fast: 7.6 against 6.3 GB/s in reads of 1 MiB.)
///
/// Opening requires permission to trace the process: the same user and no Yama restriction, or
/// `CAP_SYS_PTRACE`. The process keeps running. For bytes of a single point in time, stop it first
/// ([`StoppedProcess`](crate::StoppedProcess)). There is no host memory.
///
/// Reading RAM that was never touched allocates memory in the other process: a page of shared
/// memory, page tables for private memory. Skip the ranges that
/// [`populated`](PageReader::populated) excludes; it touches nothing. It has the same knowledge of
/// the other process as of this one, from the page map and the files of that process. Pages that
/// were swapped out, private mappings of files, huge pages and device memory are always included.
/// Memory that userfaultfd fills on first touch (a guest that is being restored) cannot be read
/// until it is filled. Such a read fails with [`Unreadable`](ProcessMemoryError::Unreadable), it
/// does not return zeros.
///
/// Shared memory that a *third* process fills on first touch reads as zeros where it is not filled
/// yet. [`check_lazy_fill_of_region`](crate::check_lazy_fill_of_region) finds such a process; call
/// it for each region, before and after the copy.
///
/// # Examples
/// A region of the guest, here of this process. Its address comes from the VMM or from
/// [`ProcessMaps`](crate::ProcessMaps):
/// ```
/// use page_reader::PageReader;
/// use process_memory::ProcessMemory;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let region = vec![5_u8; 8192];
/// let guest = ProcessMemory::open(std::process::id(), [(region.as_ptr() as u64, 8192)])?;
/// let mut page = [0; 4096];
/// guest.read_at(4096, &mut page)?;
/// assert!(page == [5; 4096]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ProcessMemory {
    pid: u32,
    memory: Layered<FileReader<Arc<File>>>,
    /// `None` if the files cannot be opened: then everything may be populated.
    files: Option<Arc<MemoryFiles>>,
}

/// An error of reading the memory of another process.
///
/// The [`io::Error`] of a failed [`read_at`](PageReader::read_at) contains it, for
/// [`io::Error::downcast`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessMemoryError {
    /// The process does not exist, or this process may not trace it.
    #[error(
        "failed to open /proc/{pid}/mem: check that the process runs, and that this process may \
         trace it (same user, or CAP_SYS_PTRACE): {source}"
    )]
    Open {
        /// The process id.
        pid: u32,
        /// The system error.
        source: io::Error,
    },
    /// The address ranges do not form a source.
    #[error("the address ranges in process {pid} are invalid: give non-empty ranges: {source}")]
    Ranges {
        /// The process id.
        pid: u32,
        /// The reason.
        source: LayeredError,
    },
    /// An address range ends past the highest address of a process.
    #[error(
        "a range of length {size} at address {start:#x} ends past the highest address of a process"
    )]
    PastAddressSpace {
        /// The address of the first byte of the range.
        start: u64,
        /// The size of the range in bytes.
        size: u64,
    },
    /// The process has ended or executed another program, so the memory no longer exists.
    #[error(
        "process {pid} has ended or executed another program, so its memory no longer exists: keep \
         the VMM running until the snapshot is committed"
    )]
    Gone {
        /// The process id.
        pid: u32,
    },
    /// Part of the range is not mapped in the process, or cannot be read, such as a missing page
    /// that a userfaultfd fills when it is accessed.
    #[error(
        "failed to read a range of length {len} at offset {offset:#x} of the memory of process \
         {pid}: part of it is not mapped there, not readable, or not filled yet by a userfaultfd: if the guest \
         is being restored, wait until the restore has finished: {source}"
    )]
    Unreadable {
        /// The process id.
        pid: u32,
        /// The offset in this source in bytes.
        offset: u64,
        /// The length of the read in bytes.
        len: usize,
        /// The system error.
        source: io::Error,
    },
}

impl ProcessMemory {
    /// Opens the address ranges (address of the first byte, size in bytes) of process `pid`, one
    /// after another.
    ///
    /// The ranges usually are the host addresses of the guest's RAM regions, in ascending
    /// guest-physical order. They are not checked: reading an unmapped range fails.
    ///
    /// # Errors
    /// Returns an error if the process cannot be opened, or ends during the call. Returns an error
    /// if there is no range, or if a range is empty or past the highest address of a process.
    pub fn open(
        pid: u32,
        ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, ProcessMemoryError> {
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|source| ProcessMemoryError::Open { pid, source })?;
        let files = MemoryFiles::open(pid).ok();
        // The memory still exists, so the files opened after it belong to the same program.
        if is_gone(&memory) {
            return Err(ProcessMemoryError::Gone { pid });
        }
        let memory = Arc::new(memory);
        let parts: Vec<_> = ranges
            .into_iter()
            .map(|(start, size)| {
                // An address is a file position in mem, which is signed.
                match start.checked_add(size).map(i64::try_from) {
                    Some(Ok(_)) => Ok((FileReader::range(Arc::clone(&memory), start, size), size)),
                    _ => Err(ProcessMemoryError::PastAddressSpace { start, size }),
                }
            })
            .collect::<Result<_, _>>()?;
        let memory =
            Layered::concat(parts).map_err(|source| ProcessMemoryError::Ranges { pid, source })?;
        Ok(Self {
            pid,
            memory,
            files: files.map(Arc::new),
        })
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl PageReader for ProcessMemory {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        check_range(offset, buf.len(), self.memory.ram_size())?;
        let pid = self.pid;
        self.memory.read_at(offset, buf).map_err(|source| {
            // Inside the ranges, mem ends only if no memory is left. An unmapped address is EIO.
            let error = match source.kind() {
                io::ErrorKind::UnexpectedEof => ProcessMemoryError::Gone { pid },
                _ => ProcessMemoryError::Unreadable {
                    pid,
                    offset,
                    len: buf.len(),
                    source,
                },
            };
            io::Error::other(error)
        })
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let space = self
            .files
            .as_ref()
            .map_or_else(AddressSpace::unknown, |files| AddressSpace::of(files));
        self.memory.populated_by(range, move |part, queried| {
            let address = part.start();
            let found = space.populated(address + queried.start..address + queried.end);
            Box::new(found.map(move |found| found.start - address..found.end - address))
        })
    }

    fn known_size(&self) -> Option<u64> {
        Some(self.memory.ram_size())
    }
}

/// Returns `true` if the process of `mem` has no memory left.
///
/// Address 0 is not mapped: reading it is an error while the process has memory, and the end of the
/// file later.
fn is_gone(mem: &File) -> bool {
    matches!(mem.read_at(&mut [0], 0), Ok(0))
}
