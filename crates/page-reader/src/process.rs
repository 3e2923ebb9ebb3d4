//! The memory of another process. Linux only: elsewhere the module isn't there.

mod lazy_fill;
mod maps;
mod smaps;
mod stop;

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use nix::errno::Errno;

pub use lazy_fill::{LazyFillError, UnexaminedProcess, check_filled};
pub(crate) use maps::supersede;
pub use maps::{Permissions, ProcessMaps, ProcessMapsError, ProcessRegion};
pub use smaps::{FlaggedRegion, RegionFlags};
pub use stop::{ProcessStopError, StoppedProcess, Unresponsive};

use crate::sys::{AddressSpace, MemoryFiles};
use crate::{FileReader, Layered, LayeredError, PageReader, PopulatedRanges, range};

/// A guest's RAM in the monitor's process, read from outside of it, over `/proc/<pid>/mem`.
///
/// The memory is that of the process as it is when it's opened. It's never another's: if the process ends or runs
/// another program (`exec`), reads fail, also when its process id is in use again (`process_vm_readv`, which goes by
/// the id, would read a stranger's memory, and is only 1.2 times as fast: 7.6 against 6.3 GB/s in reads of 1 MiB).
///
/// Opening needs the right to trace the process: the same user and no Yama restriction, or `CAP_SYS_PTRACE`. The
/// process runs on; where the bytes must be of one instant, stop it first ([`StoppedProcess`]). There's no host memory to hand out.
///
/// Reading RAM that was never touched makes the other process pay for it: a page of memory where it's shared, page tables
/// where it's private. Ask [`populated`](PageReader::populated), which touches nothing, and leave out what isn't. It knows what it knows
/// of this process's memory, by the other one's page map and files: nothing is taken for empty that was swapped out, maps a file
/// privately or is of huge pages or a device. Memory that userfaultfd fills on first touch (a guest that is being restored) can't be
/// read where it isn't filled yet: that's [`Unreadable`](ProcessMemoryError::Unreadable), not zeros.
///
/// Shared memory that *another* process fills on first touch is read as zeros where it is not filled
/// yet. [`ProcessRegion::check_filled`] finds such a process: call it for each region, before and
/// after the copy.
///
/// # Examples
/// A guest region whose address, here of this very process, came from the monitor or from [`ProcessMaps`]:
/// ```
/// use page_reader::{PageReader, ProcessMemory};
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
    /// Not to be had everywhere: then all may be populated.
    files: Option<Arc<MemoryFiles>>,
}

/// Why another process's memory can't be read.
///
/// A failed [`read_at`](PageReader::read_at) has it inside its [`io::Error`], for [`io::Error::downcast`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessMemoryError {
    /// The process isn't there, or this one may not trace it.
    #[error(
        "opening /proc/{pid}/mem: the process must run, and be traceable by this one (same user, or CAP_SYS_PTRACE)"
    )]
    Open {
        /// The process.
        pid: u32,
        /// What the system says.
        source: io::Error,
    },
    /// The address ranges are no source.
    #[error("the address ranges in process {pid} can't be laid one after another")]
    Ranges {
        /// The process.
        pid: u32,
        /// Why.
        source: LayeredError,
    },
    /// An address range ends past any address of a process.
    #[error("{size:#x} bytes at address {start:#x} end past any address of a process")]
    PastAddressSpace {
        /// The address of the range's first byte.
        start: u64,
        /// Its size in bytes.
        size: u64,
    },
    /// The process has ended, or runs another program now: the memory is gone.
    #[error(
        "process {pid} has ended or runs another program, its memory is gone: keep the monitor running until the \
         snapshot is committed"
    )]
    Gone {
        /// The process.
        pid: u32,
    },
    /// Part of the range isn't mapped in the process, or can't be read.
    #[error(
        "{len} bytes at offset {offset} of process {pid}'s ranges: part of them isn't mapped there or can't be read"
    )]
    Unreadable {
        /// The process.
        pid: u32,
        /// The offset in this source, in bytes.
        offset: u64,
        /// The length of the read in bytes.
        len: usize,
        /// What the system says.
        source: io::Error,
    },
}

impl ProcessMemory {
    /// The address ranges (address of the first byte, size in bytes) of process `pid`, one after another.
    ///
    /// They're usually the host addresses of the guest's RAM regions, in ascending guest-physical order. Whether
    /// they're mapped shows when they're read.
    ///
    /// # Errors
    /// The process can't be opened, or ends meanwhile; there's no range, an empty one, or one past any process's addresses.
    pub fn open(
        pid: u32,
        ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, ProcessMemoryError> {
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|source| ProcessMemoryError::Open { pid, source })?;
        let files = MemoryFiles::open(format!("/proc/{pid}")).ok();
        // There still, so that what was opened after it is of the same program.
        if is_gone(&memory) {
            return Err(ProcessMemoryError::Gone { pid });
        }
        let memory = Arc::new(memory);
        let parts: Vec<_> = ranges
            .into_iter()
            .map(|(start, size)| {
                // An address is a file position in mem, a signed number.
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

    /// The process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }
}

impl PageReader for ProcessMemory {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        range::check(offset, buf.len(), self.memory.size())?;
        let pid = self.pid;
        self.memory.read_at(offset, buf).map_err(|source| {
            // Inside the ranges mem only ends where there's no memory left to it: at an unmapped address it's EIO.
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
        self.memory.populated_by(range, move |part, asked| {
            let address = part.start();
            let found = space.populated(address + asked.start..address + asked.end);
            Box::new(found.map(move |found| found.start - address..found.end - address))
        })
    }
}

/// Address 0 isn't mapped, which is an error while there is any memory, and the end of the file later.
fn is_gone(mem: &File) -> bool {
    matches!(mem.read_at(&mut [0], 0), Ok(0))
}

/// What `/proc` says of a process that has ended, by path or by a file that's open.
fn is_not_there(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}
