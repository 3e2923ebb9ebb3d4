//! The memory of another process. Linux only: elsewhere the module isn't there.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::{FileReader, Layered, LayeredError, PageReader, range};

/// A guest's RAM in the monitor's process, read from outside of it, over `/proc/<pid>/mem`.
///
/// The memory is that of the process as it is when it's opened. It's never another's: if the process ends or runs
/// another program (`exec`), reads fail, also when its process id is in use again (`process_vm_readv`, which goes by
/// the id, would read a stranger's memory, and is only 1.2 times as fast: 7.6 against 6.3 GB/s in reads of 1 MiB).
///
/// Opening needs the right to trace the process: the same user and no Yama restriction, or `CAP_SYS_PTRACE`. The
/// process runs on; stop its vCPUs where the bytes must be of one instant. There's no host memory to hand out.
///
/// # Examples
/// A guest region whose address, here of this very process, came from the monitor or `/proc/<pid>/maps`:
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
    /// The process can't be opened; there's no range, an empty one, or one past any process's addresses.
    pub fn open(
        pid: u32,
        ranges: impl IntoIterator<Item = (u64, u64)>,
    ) -> Result<Self, ProcessMemoryError> {
        let memory = File::open(format!("/proc/{pid}/mem"))
            .map_err(|source| ProcessMemoryError::Open { pid, source })?;
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
        Ok(Self { pid, memory })
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
}
