//! The memory that reading and writing takes. A separate test binary, because it counts the
//! allocations of its process.

use std::os::unix::fs::FileExt;

use image_format::{
    CHUNK_SIZE, Checksums, Footer, ImageId, ImageKind, Layout, MAX_RAM_SIZE, Run, Version,
};
use peak_alloc::PeakAlloc;

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// Returns the result of `work`, and the peak of the memory that it allocated, in bytes.
fn peak<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let made = work();
    (made, MEMORY.peak_usage().saturating_sub(before))
}

/// One test for all parts, because the peak is that of the process.
#[test]
fn memory_is_allocated_for_valid_entries_only() {
    claimed_checksums();
    largest_ram();
    runs_of_a_footer();
}

/// A file of 8 KiB, the rest of it holes, that claims to have 1 GiB of checksums.
fn claimed_checksums() {
    let file = tempfile::tempfile().unwrap();
    let footer = Footer {
        version: Version::V1,
        id: ImageId::from_bytes([1; 16]),
        kind: ImageKind::Full,
        layout: Layout::Packed,
        ram_size: 4096,
        page_size: 4096,
        regions: vec![0..4096],
        runs: vec![Run::zeros(0..4096)],
        checksums: Vec::new(),
        metadata: Vec::new(),
    };
    let len = footer.write(&file).unwrap();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    let sums = 30_000_000_u64;
    let (body, trailer) = bytes.split_at_mut(len as usize - 64);
    body[80..88].copy_from_slice(&sums.to_le_bytes());
    let claimed = body.len() as u64 + 32 * sums;
    trailer[40..48].copy_from_slice(&claimed.to_le_bytes());
    file.write_all_at(body, 0).unwrap();
    file.write_all_at(trailer, claimed).unwrap();

    let (read, peak) = peak(|| Footer::read_as(&file, Layout::Packed));
    assert!(read.is_err());
    assert!(peak < 1 << 20, "{peak} bytes");
}

/// The checksums of the largest RAM, two chunks of which are present.
fn largest_ram() {
    let (sums, peak) = peak(|| {
        let mut sums = Checksums::new(MAX_RAM_SIZE);
        sums.update(0, &[1; 4096]);
        sums.update(MAX_RAM_SIZE - 4096, &[1; 4096]);
        sums.finish()
    });
    assert_eq!(sums.len(), 2);
    assert!(peak < 1 << 20, "{peak} bytes");
}

/// Runs that are written from an iterator need no memory. Runs that are read need 32 bytes each,
/// and twice that while the list grows.
fn runs_of_a_footer() {
    const RUNS: u64 = 1 << 18;
    let ram_size = 2 * RUNS * 4096;
    let run = |at| Run::present(2 * at * 4096..(2 * at + 1) * 4096, (at + 1) * 4096);
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::from_bytes([1; 16]),
        kind: ImageKind::Diff { parent: None },
        layout: Layout::Packed,
        ram_size,
        page_size: 4096,
        regions: vec![0..ram_size],
        runs: Vec::new(),
        checksums: vec![[0; 32]; (ram_size / CHUNK_SIZE) as usize],
        metadata: Vec::new(),
    };
    let file = tempfile::tempfile().unwrap();
    let (len, wrote) = peak(|| footer.write_with(&file, (0..RUNS).map(run)).unwrap());
    let checksums = footer.checksums.len() as u64;
    assert_eq!(
        footer.planned_len(RUNS, checksums, RUNS * 4096).unwrap(),
        len
    );
    assert!(wrote < 1 << 20, "{wrote} bytes");
    let (read, peak) = peak(|| Footer::read(&file).unwrap());
    assert_eq!(read.runs.len() as u64, RUNS);
    let limit = RUNS as usize * 64 + (2 << 20);
    assert!(peak < limit, "{peak} bytes");
}
