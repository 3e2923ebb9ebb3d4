//! Which pages of this process are write-protected by userfaultfd.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The bit of an entry of `/proc/self/pagemap` that is set for a write-protected page: `PM_UFFD_WP`
/// in the kernel's `fs/proc/task_mmu.c` (Linux 5.13).
const WRITE_PROTECTED: u64 = 1 << 57;

/// The number of entries that are read at once.
const ENTRIES: usize = 64;

/// The page table of this process.
#[derive(Debug)]
pub(super) struct Pagemap {
    file: File,
    /// The size of a page of the processor, which an entry stands for.
    page_size: u64,
}

impl Pagemap {
    /// Opens the page table.
    pub(super) fn open(page_size: u64) -> io::Result<Self> {
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self { file, page_size })
    }

    /// Returns whether all pages of a range of addresses are write-protected.
    pub(super) fn is_protected(&self, addresses: Range<u64>) -> io::Result<bool> {
        let mut page = addresses.start / self.page_size;
        let end = addresses.end.div_ceil(self.page_size);
        let mut bytes = [0; ENTRIES * 8];
        while page < end {
            let count = ENTRIES.min(usize::try_from(end - page).unwrap_or(ENTRIES));
            let bytes = &mut bytes[..count * 8];
            self.file.read_exact_at(bytes, page * 8)?;
            let (entries, _) = bytes.as_chunks::<8>();
            let mut entries = entries.iter().map(|entry| u64::from_ne_bytes(*entry));
            if entries.any(|entry| entry & WRITE_PROTECTED == 0) {
                return Ok(false);
            }
            page += count as u64;
        }
        Ok(true)
    }
}
