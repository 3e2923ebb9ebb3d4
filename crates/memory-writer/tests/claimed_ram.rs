//! RAM of any size takes memory only for what is written of it. The only test of its process, whose
//! memory it measures.

#![cfg(target_os = "linux")]

use std::fs;
use std::io;
use std::ops::Range;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, MemoryWriter};
use page_reader::{PageReader, PopulatedRanges};
use test_memory::peak_memory;

/// Half of the maximum size of a file on ext4. A bit per page would take 256 MiB.
const RAM: u64 = 8 << 40;
const PAGE: u64 = 4096;

/// RAM that is untouched except for one page.
struct Untouched;

const TOUCHED: Range<u64> = RAM / 2..RAM / 2 + PAGE;

impl PageReader for Untouched {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(u8::from(TOUCHED.contains(&offset)));
        Ok(())
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        let found = TOUCHED.start.max(range.start)..TOUCHED.end.min(range.end);
        Box::new(Some(found).filter(|found| !found.is_empty()).into_iter())
    }
}

#[test]
fn raw_snapshot_takes_memory_for_written_pages_only() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("mem");
    let dirty = DirtyBitmap::new(0, RAM, PAGE).unwrap();
    dirty.mark(TOUCHED.start).unwrap();
    let before = peak_memory();
    let write = |full: bool, recycle: u64| {
        let options = MemoryWriter::options()
            .durability(Durability::None)
            .skip_untouched(true)
            .recycle(recycle);
        let mut writer = options.open(&dest, RAM, PAGE).unwrap();
        let recycled = writer.recycled();
        assert_eq!(writer.write_diff(&Untouched, &dirty).unwrap(), 1);
        if full {
            writer.write_full(&Untouched).unwrap();
        }
        writer.commit().unwrap();
        assert_eq!(fs::metadata(&dest).unwrap().len(), RAM);
        recycled
    };
    write(false, 0);
    write(true, 0);
    // The first recyclable file is left for the next one, where the file system can.
    let _ = (write(false, 1 << 30), write(false, 1 << 30));
    // The kernel counts pages approximately: the peak may be below the earlier one.
    let taken = peak_memory().saturating_sub(before);
    assert!(taken < 64 << 20, "{taken} bytes");
}
