//! Writes of a VMM's devices through the `vm-memory` crate, in the diff of a snapshot.

use std::fs;
use std::sync::Arc;

use dirty_bitmap::{DirtyBitmap, DirtyBitmapSlice};
use memory_writer::MemoryWriter;
use page_reader::{GuestMemoryReader, PageReader};
use vm_memory::bitmap::{AtomicBitmap, Bitmap, NewBitmap};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, GuestRegionMmap};

const REGION: u64 = 1 << 20;
/// Guest-physical regions with a gap between them.
const STARTS: [u64; 2] = [0, 0x1_0000_0000];
const SIZE: u64 = 2 * REGION;
const PAGE: u64 = 4096;

fn memory<B: Bitmap>(make: impl Fn(u64) -> B) -> GuestMemoryMmap<B> {
    let region = |index: usize| {
        let bitmap = make(index as u64 * REGION);
        let mapping = MmapRegionBuilder::new_with_bitmap(REGION as usize, bitmap)
            .with_mmap_prot(libc::PROT_READ | libc::PROT_WRITE)
            .with_mmap_flags(libc::MAP_ANONYMOUS | libc::MAP_PRIVATE)
            .build()
            .unwrap();
        GuestRegionMmap::new(mapping, GuestAddress(STARTS[index])).unwrap()
    };
    GuestMemoryMmap::from_regions(vec![region(0), region(1)]).unwrap()
}

/// Writes a full dump, lets a device write, and adds the pages of the bitmap. Returns whether the
/// file equals the memory.
fn snapshot_has_device_writes<B: Bitmap>(
    memory: &GuestMemoryMmap<B>,
    bitmap: &DirtyBitmap,
    harvest: impl Fn(),
) -> bool {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("guest.mem");
    let reader = GuestMemoryReader::new(memory).unwrap();
    let mut epoch = bitmap.begin_epoch().unwrap();
    let mut writer = MemoryWriter::open(&dest, SIZE, PAGE).unwrap();
    writer.write_full(&reader).unwrap();

    memory
        .write_slice(b"console", GuestAddress(STARTS[0] + 0x5000))
        .unwrap();
    memory
        .write_slice(&[7; 9000], GuestAddress(STARTS[1] + 0x8100))
        .unwrap();

    harvest();
    let dirtied = epoch.extend().unwrap();
    writer.write_diff(&reader, &dirtied).unwrap();
    writer.commit_and_release(epoch).unwrap();
    let mut expected = vec![0; SIZE as usize];
    reader.read_at(0, &mut expected).unwrap();
    fs::read(&dest).unwrap() == expected
}

fn bitmap() -> Arc<DirtyBitmap> {
    Arc::new(DirtyBitmap::new(0, SIZE, PAGE).unwrap())
}

#[test]
fn a_diff_has_device_writes_that_mark_by_themselves() {
    let bitmap = bitmap();
    let slice = |offset| DirtyBitmapSlice::new(Arc::clone(&bitmap), offset, REGION).unwrap();
    assert!(snapshot_has_device_writes(&memory(slice), &bitmap, || ()));
}

#[test]
fn a_diff_has_device_writes_of_atomic_bitmaps() {
    let bitmap = bitmap();
    let memory = memory(|_| AtomicBitmap::with_len(REGION as usize));
    let harvest = || assert!(bitmap.mark_guest_memory(&memory).unwrap() > 0);
    assert!(snapshot_has_device_writes(&memory, &bitmap, harvest));
}

#[test]
fn a_diff_lacks_device_writes_that_nothing_marks() {
    let bitmap = bitmap();
    assert!(!snapshot_has_device_writes(&memory(|_| ()), &bitmap, || ()));
}
