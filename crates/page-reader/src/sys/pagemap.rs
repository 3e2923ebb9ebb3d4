//! `/proc/<pid>/pagemap`: the written pages of private anonymous memory.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::vec;

use linux_raw_sys::general::{
    PAGE_IS_PFNZERO, PAGE_IS_PRESENT, PAGE_IS_SWAPPED, page_region, pm_scan_arg,
};

use super::page_size;

/// The number of ranges in one `PAGEMAP_SCAN`: 6 KiB.
const REGIONS: usize = 256;
/// The number of entries in one read: 4 KiB, for 2 MiB in small pages.
const ENTRIES: usize = 512;

/// An iterator over the addresses of populated pages: those in memory, except for the zero page,
/// and those swapped out.
#[derive(Debug)]
pub(crate) struct Scan {
    pagemap: Arc<File>,
    within: Range<u64>,
    page_size: u64,
    /// Whole pages that were not queried yet.
    left: Range<u64>,
    found: vec::IntoIter<Range<u64>>,
    query: fn(&File, Range<u64>, u64) -> io::Result<Found>,
}

/// The ranges found, and the end of the examined range.
type Found = (Vec<Range<u64>>, u64);

impl Scan {
    /// Creates an iterator over `within`, a range of bytes in private anonymous mappings.
    pub(crate) fn new(pagemap: Arc<File>, within: Range<u64>) -> Self {
        Self::with_query(scan_ioctl, pagemap, within)
    }

    fn with_query(
        query: fn(&File, Range<u64>, u64) -> io::Result<Found>,
        pagemap: Arc<File>,
        within: Range<u64>,
    ) -> Self {
        let page_size = page_size();
        let left = within.start - within.start % page_size..within.end.next_multiple_of(page_size);
        Self {
            pagemap,
            within,
            page_size,
            left,
            found: Vec::new().into_iter(),
            query,
        }
    }

    /// Returns an error if the process has ended.
    ///
    /// Kernels scan the memory of a process that has ended since it was opened as empty: Linux 6.7
    /// walks the remaining page tables, and there are none. Reading an entry fails on every kernel.
    fn check_alive(&self) -> io::Result<()> {
        let entry = self.left.start / self.page_size * 8;
        self.pagemap.read_exact_at(&mut [0; 8], entry)
    }
}

impl Iterator for Scan {
    type Item = Range<u64>;

    fn next(&mut self) -> Option<Range<u64>> {
        loop {
            if let Some(found) = self.found.next() {
                return Some(found.start.max(self.within.start)..found.end.min(self.within.end));
            }
            if self.left.is_empty() {
                return None;
            }
            let result = (self.query)(&self.pagemap, self.left.clone(), self.page_size);
            let (found, end) = result
                .and_then(validated(&self.left))
                .and_then(|result| self.check_alive().map(|()| result))
                .or_else(|_| {
                    self.query = read_entries;
                    read_entries(&self.pagemap, self.left.clone(), self.page_size)
                        .and_then(validated(&self.left))
                })
                .unwrap_or_else(|_| (vec![self.left.clone()], self.left.end));
            self.found = found.into_iter();
            self.left.start = end;
        }
    }
}

/// Returns a check that a result is within the queried range and advances.
fn validated(queried: &Range<u64>) -> impl Fn(Found) -> io::Result<Found> {
    move |(found, end)| {
        let inside = found
            .iter()
            .all(|one| queried.start <= one.start && one.start < one.end && one.end <= end);
        if queried.start < end && end <= queried.end && inside {
            Ok((found, end))
        } else {
            Err(io::ErrorKind::InvalidData.into())
        }
    }
}

/// Queries with `PAGEMAP_SCAN` (Linux 6.7), which skips empty page tables.
fn scan_ioctl(pagemap: &File, queried: Range<u64>, _: u64) -> io::Result<Found> {
    const POPULATED: u64 = (PAGE_IS_PRESENT | PAGE_IS_SWAPPED) as u64;
    const EMPTY: page_region = page_region {
        start: 0,
        end: 0,
        categories: 0,
    };

    let mut regions = [EMPTY; REGIONS];
    let mut scan = pm_scan_arg {
        size: size_of::<pm_scan_arg>() as u64,
        flags: 0,
        start: queried.start,
        end: queried.end,
        walk_end: 0,
        vec: regions.as_mut_ptr().expose_provenance() as u64,
        vec_len: REGIONS as u64,
        max_pages: 0,
        category_inverted: PAGE_IS_PFNZERO.into(),
        category_mask: PAGE_IS_PFNZERO.into(),
        category_anyof_mask: POPULATED,
        return_mask: POPULATED,
    };
    // SAFETY: the kernel reads and writes the structure, which has the layout of the kernel's
    // (asserted below) and states its size. It writes at most `vec_len` regions to `vec`, a live
    // array of that many regions of integers. No flag is set that would write-protect pages.
    let found = unsafe { ioctl::pagemap_scan(pagemap.as_raw_fd(), &raw mut scan) }?;
    let found = usize::try_from(found).map_or(0, |found| found.min(REGIONS));
    let regions = regions[..found].iter();
    Ok((
        regions.map(|region| region.start..region.end).collect(),
        scan.walk_end,
    ))
}

/// Queries by one 64-bit entry for each page, which every kernel supports. The zero page is not
/// distinguished from others.
fn read_entries(pagemap: &File, queried: Range<u64>, page_size: u64) -> io::Result<Found> {
    /// Bits 62 and 63: swapped, present. From `Documentation/admin-guide/mm/pagemap.rst`.
    const POPULATED: u64 = 0b11 << 62;

    let pages = ((queried.end - queried.start) / page_size).min(ENTRIES as u64);
    let mut bytes = [0; ENTRIES * 8];
    let bytes = &mut bytes[..pages as usize * 8];
    pagemap.read_exact_at(bytes, queried.start / page_size * 8)?;
    let mut found = Vec::<Range<u64>>::new();
    let mut address = queried.start;
    for entry in bytes.as_chunks().0 {
        let end = address + page_size;
        if u64::from_ne_bytes(*entry) & POPULATED != 0 {
            match found.last_mut() {
                Some(last) if last.end == address => last.end = end,
                _ => found.push(address..end),
            }
        }
        address = end;
    }
    Ok((found, address))
}

mod ioctl {
    use linux_raw_sys::general::{page_region, pm_scan_arg};

    const _: () = assert!(size_of::<page_region>() == 24 && size_of::<pm_scan_arg>() == 96);

    // `PAGEMAP_SCAN` in Linux `include/uapi/linux/fs.h`: _IOWR('f', 16, struct pm_scan_arg). The
    // generated bindings lack this number.
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, pm_scan_arg);
}

#[cfg(test)]
mod tests {
    use super::*;
    use nix::sys::mman::{MapFlags, MmapAdvise, ProtFlags, madvise, mmap_anonymous, munmap};
    use rstest::rstest;
    use std::process::Command;

    const PAGES: u64 = 3000;

    fn unsupported(_: &File, _: Range<u64>, _: u64) -> io::Result<Found> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn without_progress(_: &File, queried: Range<u64>, _: u64) -> io::Result<Found> {
        Ok((Vec::new(), queried.start))
    }

    /// The mapping has more ranges than one query returns, and queries end inside of ranges.
    #[rstest]
    #[case::scan_ioctl(scan_ioctl)]
    #[case::read_entries(read_entries)]
    #[case::without_the_call(unsupported)]
    #[case::with_a_call_without_progress(without_progress)]
    fn exactly_the_pages_written_are_found(
        #[case] query: fn(&File, Range<u64>, u64) -> io::Result<Found>,
        #[values(0, 100)] inward: u64,
    ) {
        let page = page_size();
        let len = ((PAGES * page) as usize).try_into().unwrap();
        // SAFETY: a new mapping, unmapped below, to which no reference exists.
        let start = unsafe {
            let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
            let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
            let start = mmap_anonymous(None, len, access, flags).unwrap();
            let _ = madvise(start, len.get(), MmapAdvise::MADV_NOHUGEPAGE);
            start
        };
        let written = |index: &u64| index.is_multiple_of(3) || (1000..2000).contains(index);
        let base = start.addr().get() as u64;
        for index in (0..PAGES).filter(written) {
            // SAFETY: inside the mapping.
            unsafe { start.cast::<u8>().add((index * page) as usize).write(1) };
        }
        let pagemap = Arc::new(File::open("/proc/self/pagemap").unwrap());
        let within = base + inward..base + PAGES * page - inward;
        let mut found = vec![false; PAGES as usize];
        let mut before = within.start;
        for range in Scan::with_query(query, pagemap, within.clone()) {
            assert!(before <= range.start && range.start < range.end && range.end <= within.end);
            before = range.end;
            let first = (range.start - base) / page;
            found[first as usize..(range.end - base).div_ceil(page) as usize].fill(true);
        }
        let expected: Vec<_> = (0..PAGES).map(|index| written(&index)).collect();
        assert!(found == expected);
        // SAFETY: the mapping made above.
        unsafe { munmap(start, len.get()) }.unwrap();
    }

    #[test]
    fn an_unreadable_page_map_reports_everything_populated() {
        let pagemap = Arc::new(File::open("/dev/null").unwrap());
        let found: Vec<_> = Scan::new(pagemap, 4096 + 5..65536 - 3).collect();
        assert_eq!(found, [4096 + 5..65536 - 3]);
    }

    #[test]
    fn memory_of_an_ended_process_is_not_reported_as_empty() {
        fn empty(_: &File, queried: Range<u64>, _: u64) -> io::Result<Found> {
            Ok((Vec::new(), queried.end))
        }

        let mut process = Command::new("sleep").arg("60").spawn().unwrap();
        let pagemap = File::open(format!("/proc/{}/pagemap", process.id())).unwrap();
        let pagemap = Arc::new(pagemap);
        let scan = || Scan::with_query(empty, Arc::clone(&pagemap), 0..65536);
        assert_eq!(scan().count(), 0);
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(scan().collect::<Vec<_>>(), [0..65536]);
    }
}
