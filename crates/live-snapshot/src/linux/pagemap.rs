//! Which pages of this process are write-protected by userfaultfd.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

/// The bit of an entry of `/proc/self/pagemap` that is set for a write-protected page: `PM_UFFD_WP`
/// in the kernel's `fs/proc/task_mmu.c` (Linux 5.13).
const WRITE_PROTECTED: u64 = 1 << 57;

/// The number of entries that are read at once.
const ENTRIES: usize = 512;

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

    /// Returns the first run of pages of a range of addresses that are not write-protected. It may
    /// be a part of a longer run.
    pub(super) fn first_unprotected(
        &self,
        addresses: Range<u64>,
    ) -> io::Result<Option<Range<u64>>> {
        let mut page = addresses.start / self.page_size;
        let end = addresses.end.div_ceil(self.page_size);
        let mut bytes = [0; ENTRIES * 8];
        while page < end {
            let count = ENTRIES.min(usize::try_from(end - page).unwrap_or(ENTRIES));
            let bytes = &mut bytes[..count * 8];
            self.file.read_exact_at(bytes, page * 8)?;
            let (entries, _) = bytes.as_chunks::<8>();
            let is_open = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & WRITE_PROTECTED == 0;
            if let Some(first) = entries.iter().position(is_open) {
                let run = entries[first..].iter().take_while(|entry| is_open(entry));
                let start = page + first as u64;
                let run = start..start + run.count() as u64;
                return Ok(Some(run.start * self.page_size..run.end * self.page_size));
            }
            page += count as u64;
        }
        Ok(None)
    }
}
