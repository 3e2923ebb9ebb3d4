//! Memory use of a sealed snapshot. The only test of its process, whose allocations it counts.

use dirty_bitmap::DirtyBitmap;
use memory_writer::{Durability, Layout, MemoryWriter, PackedStream, Seal};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

const PAGE: u64 = 512;
const RUNS: u64 = 300_000;
const SIZE: u64 = (2 * PAGE * RUNS).next_multiple_of(1 << 20);

struct Sevens;

impl page_reader::PageReader for Sevens {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> std::io::Result<()> {
        buf.fill(7);
        Ok(())
    }
}

/// Returns the peak memory use of a diff of the pages that `dirty` marks, while pages and while the
/// footer are written, and the memory that is kept between the two.
fn peaks(layout: Layout, dirty: &DirtyBitmap) -> (usize, usize, usize) {
    let dir = tempfile::tempdir().unwrap();
    let before = MEMORY.current_usage();
    let since = |usage: usize| usage.saturating_sub(before);
    MEMORY.reset_peak_usage();
    let mut writer = MemoryWriter::options()
        .layout(layout)
        .seal(Seal::new().on_raw_image())
        .durability(Durability::None)
        .open(dir.path().join("mem"), SIZE, PAGE)
        .unwrap();
    assert_eq!(writer.write_diff(&Sevens, dirty).unwrap(), RUNS);
    let writing = since(MEMORY.peak_usage());
    let kept = since(MEMORY.current_usage());
    MEMORY.reset_peak_usage();
    writer.commit().unwrap();
    (writing, kept, since(MEMORY.peak_usage()))
}

/// Returns the peak memory use of a stream of the pages that `dirty` marks.
fn peak_of_stream(dirty: &DirtyBitmap) -> usize {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let options = PackedStream::options().seal(Seal::new().on_raw_image());
    let mut stream = options.open(std::io::sink(), SIZE, PAGE).unwrap();
    assert_eq!(stream.write_diff(&Sevens, dirty).unwrap(), RUNS);
    stream.finish().unwrap();
    MEMORY.peak_usage().saturating_sub(before)
}

#[test]
fn diff_takes_24_bytes_a_run_and_its_footer_no_more() {
    let [scattered, one_run] = [(); 2].map(|()| DirtyBitmap::new(0, SIZE, PAGE).unwrap());
    for run in 0..RUNS {
        scattered.mark(2 * PAGE * run).unwrap();
    }
    one_run.mark_range(0, RUNS * PAGE).unwrap();
    for layout in [Layout::Sealed, Layout::Packed] {
        // Both use the same buffers of the engine.
        let (buffers, _, _) = peaks(layout, &one_run);
        let (writing, kept, sealing) = peaks(layout, &scattered);
        let runs = 24 * RUNS as usize;
        let grown = writing.saturating_sub(buffers);
        assert!(kept <= runs + (1 << 20), "{kept} bytes kept");
        assert!(grown <= runs + (1 << 20), "{grown} bytes while writing");
        let footer = sealing.saturating_sub(kept);
        assert!(footer <= 1 << 20, "{footer} bytes for the footer");
    }
    let [buffers, grown] = [&one_run, &scattered].map(peak_of_stream);
    assert!(buffers <= 2 << 20, "{buffers} bytes for one run");
    let runs = 24 * RUNS as usize;
    assert!(grown <= runs + buffers + (1 << 20), "{grown} bytes");
}
