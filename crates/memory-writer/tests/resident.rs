//! Memory use of dumps. The only test of its process, whose memory it measures.
#![cfg(target_os = "linux")]

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use test_memory::peak_memory;
use write_faults::Memory;

/// The parts run one after the other, because the peak is that of the whole process.
#[test]
fn dumps_neither_touch_nor_buffer_the_ram() {
    untouched();
    written();
}

fn untouched() {
    const SIZE: u64 = 1 << 30;
    let dir = tempfile::tempdir().unwrap();
    let ram = Memory::new(SIZE).unwrap();
    ram.write(SIZE / 4 * 3, b"!");
    let before = peak_memory();
    for zeros in [false, true] {
        let dest = dir.path().join("mem");
        let options = MemoryWriter::options()
            .skip_untouched(true)
            .skip_zeros(zeros);
        let mut writer = options.open(&dest, SIZE, 4096).unwrap();
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        let file = std::fs::File::open(&dest).unwrap();
        assert!(sparse_file::allocated_bytes(&file).unwrap() <= 64 << 10);
    }
    // The kernel counts pages approximately: the peak may be below the earlier one.
    let grown = peak_memory().saturating_sub(before);
    assert!(grown <= 4 << 20, "{grown} bytes more");
}

fn written() {
    // Larger than the limit below.
    const SIZE: u64 = 40 << 20;
    let dir = tempfile::tempdir().unwrap();
    let ram = Memory::new(SIZE).unwrap();
    let words: Vec<u8> = (0..1 << 20).map(|at: u32| (at % 251) as u8).collect();
    for start in (0..SIZE).step_by(words.len()) {
        ram.write(start, &words);
    }
    let dirty = DirtyBitmap::new(0, SIZE, 4096).unwrap();
    for page in (0..SIZE / 4096).step_by(3) {
        dirty.mark_range(page * 4096, 1).unwrap();
    }
    let taken = dirty.drain().unwrap();
    let before = peak_memory();
    for layout in Layout::ALL {
        for full in [true, false] {
            let options = MemoryWriter::options()
                .layout(layout)
                .seal(Seal::new().on_raw_image())
                .durability(Durability::None);
            let mut writer = options.open(dir.path().join("mem"), SIZE, 4096).unwrap();
            if full {
                writer.write_full(&ram).unwrap();
            } else {
                writer.write_diff(&ram, &taken).unwrap();
            }
            writer.commit().unwrap();
        }
    }
    // The kernel counts pages approximately: the peak may be below the earlier one.
    let grown = peak_memory().saturating_sub(before);
    assert!(grown <= 24 << 20, "{grown} bytes more");
}
