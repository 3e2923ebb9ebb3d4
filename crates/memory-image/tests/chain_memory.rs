//! The memory of a chain depends on the pages that its images store, not on the size of the RAM.

#![allow(unsafe_code)]

mod support;

use std::alloc::{GlobalAlloc, Layout, System};
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use image_format::{Checksums, Footer, ImageId, ImageKind, Run, Storage, Version, packed_start};
use memory_image::{Chain, Image};
use memory_writer::MemoryWriter;
use page_reader::PageReader;
use test_images::write_packed;

/// The system's allocator with counters.
struct Counting;

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static CALLS: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is forwarded unchanged to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        CALLS.fetch_add(1, Ordering::Relaxed);
        let live = LIVE.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(live, Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(memory, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const PAGE: u64 = 4096;
/// The bitmap of one layer would be 2 MiB.
const RAM: u64 = 64 << 30;
/// Upper bound of the memory of a layer of one page: its footer, path, descriptor entry and extent.
const A_LAYER: usize = 2048;

/// Writes a full image of one page, and diffs of one page each.
fn images(dir: &std::path::Path, count: u64) -> Vec<PathBuf> {
    let mut parent = None;
    let image = |number: u64| {
        let path = dir.join(format!("{number}.mem"));
        let page = number * 7919 % (RAM / PAGE);
        let bytes = vec![number as u8 | 1; PAGE as usize];
        parent = Some(write_packed(&path, RAM, PAGE, parent, &[(page, bytes)]));
        path
    };
    (0..count).map(image).collect()
}

/// Returns the number of allocator calls, and the peak of the additional bytes in use.
fn counted<T>(work: impl FnOnce() -> T) -> (T, usize, usize) {
    let (calls, live) = (CALLS.load(Ordering::Relaxed), LIVE.load(Ordering::Relaxed));
    PEAK.store(live, Ordering::Relaxed);
    let result = work();
    let calls = CALLS.load(Ordering::Relaxed) - calls;
    (result, calls, PEAK.load(Ordering::Relaxed) - live)
}

/// One test, because nothing else of the process may be counted.
#[test]
fn memory_depends_on_stored_pages_and_reads_allocate_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let paths = images(dir.path(), 250);
    let open = |count: usize| Chain::open_sealed(&paths[..count]).unwrap();
    let (few, calls_for_few, _) = counted(|| open(125));
    let (many, calls_for_many, peak) = counted(|| open(250));
    // The reader of the footer has a buffer of 64 KiB.
    assert!(peak < 250 * A_LAYER + (128 << 10), "{peak} bytes");
    let ratio = calls_for_many as f64 / calls_for_few as f64;
    assert!(ratio < 2.2, "{calls_for_few} and {calls_for_many} calls");

    let read = |chain: &Chain| {
        let mut page = [0; PAGE as usize];
        for number in 0..100 {
            chain.read_at(number * 7919 * PAGE, &mut page).unwrap();
            assert_eq!(page[17], number as u8 | 1);
        }
    };
    for chain in [&few, &many] {
        let ((), calls, _) = counted(|| read(chain));
        assert_eq!(calls, 0);
        let (populated, calls, _) = counted(|| chain.populated(0..RAM / 2).count());
        assert!(populated > 0);
        assert_eq!(calls, 1, "the iterator's own");
    }

    // Runs that are not adjacent, and the zeros between them.
    const RUNS: u64 = 20_000;
    const SMALL: u64 = 512;
    let runs: Vec<_> = (0..RUNS).map(|run| (2 * run, vec![1; 512])).collect();
    let scattered = dir.path().join("scattered.mem");
    let ram = 2 * RUNS * SMALL;
    write_packed(&scattered, ram, SMALL, None, &runs);
    let footer = 2 * RUNS as usize * size_of::<Run>() + (ram as usize).div_ceil(1 << 20) * 32;
    let before = LIVE.load(Ordering::Relaxed);
    let chain = Chain::open(&scattered, SMALL).unwrap();
    let taken = LIVE.load(Ordering::Relaxed) - before;
    let extents = RUNS as usize * 64;
    assert!(taken < footer + extents + A_LAYER, "{taken} bytes");
    drop(chain);
    merging_claimed_zeros_takes_no_memory(dir.path());
}

/// A bit for each page would be 32 MiB.
const CLAIMED: u64 = 1 << 40;

/// Writes a diff of RAM of [`CLAIMED`] bytes, with `runs` at `id`, on top of `parent`.
fn write_diff(path: &std::path::Path, [parent, id]: [u8; 2], runs: Vec<Run>, page: &[u8]) {
    let file = File::create(path).unwrap();
    let mut checksums = Checksums::new(CLAIMED);
    for run in &runs {
        if let Storage::At(offset) = run.stored {
            file.write_all_at(page, offset).unwrap();
            checksums.update(run.start, page);
        }
    }
    let [parent, id] = [parent, id].map(|byte| ImageId::from_bytes([byte; 16]));
    let footer = Footer {
        version: Version::CURRENT,
        id,
        kind: ImageKind::Diff {
            parent: Some(parent),
        },
        layout: memory_writer::Layout::Packed,
        ram_size: CLAIMED,
        page_size: PAGE,
        regions: vec![0..CLAIMED],
        runs,
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    footer.write(&file).unwrap();
}

/// Writes and merges a diff that records nearly all of the RAM as zeros, and a diff of one page.
fn merging_claimed_zeros_takes_no_memory(dir: &std::path::Path) {
    let paths = ["zeros.mem", "page.mem"].map(|name| dir.join(name));
    let (page, at) = (vec![7; PAGE as usize], CLAIMED / 2);
    let zeros = vec![Run::zeros(PAGE..CLAIMED)];
    write_diff(&paths[0], [1, 2], zeros, &page);
    let one = vec![Run::present(at..at + PAGE, packed_start(PAGE))];
    write_diff(&paths[1], [2, 3], one, &page);
    let merged = dir.join("merged.mem");
    for layout in [memory_writer::Layout::Packed, memory_writer::Layout::Sealed] {
        let (bytes, _, peak) = counted(|| {
            let chain = Chain::open_sealed(&paths).unwrap();
            let options = MemoryWriter::options().layout(layout).seal(chain.seal());
            chain.merge(options, &merged).unwrap()
        });
        assert_eq!(bytes, PAGE);
        // Buffers of the I/O engine.
        assert!(peak < 16 << 20, "{peak} bytes");
        let image = Image::open(&merged).unwrap();
        let footer = image.footer().unwrap();
        assert_eq!(footer.present_bytes(), PAGE);
        let zeros = footer
            .runs
            .iter()
            .filter(|run| run.stored == Storage::Zeros);
        let zeros: Vec<_> = zeros.map(Run::range).collect();
        assert_eq!(zeros, [PAGE..at, at + PAGE..CLAIMED]);
        assert!(fs::metadata(&merged).unwrap().blocks() < 4096);
    }
}
