//! Pages that a full dump skips read back as zeros for any previous contents of the file.

mod support;

use std::io;
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::mpsc;

use dirty_bitmap::DirtyBitmap;
use memory_writer::{CancelToken, MemoryIoStep, MemoryWriter, MemoryWriterOptions, SnapshotError};
use page_reader::{PageReader, PopulatedRanges};
use rstest::rstest;
use support::{Place, Until, pattern, without_memory};
use write_faults::Memory;

const KIB: u64 = 1 << 10;
const SIZE: u64 = 4 << 20;
const PAGE: u64 = 4096;

fn skipping() -> MemoryWriterOptions {
    MemoryWriter::options()
        .skip_zeros(true)
        .skip_untouched(true)
}

/// Asserts that at most `bytes` bytes of blocks are allocated, and the blocks of their extent map.
fn assert_allocates_at_most(path: &Path, bytes: u64) {
    let allocated = allocated(path);
    // Other systems may store a small hole as zeros.
    assert!(
        cfg!(not(target_os = "linux")) || allocated <= bytes + 64 * KIB,
        "{allocated}"
    );
}

fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Returns RAM that is zero outside `data`.
fn sparse(data: &[Range<u64>]) -> Vec<u8> {
    let mut ram = vec![0; SIZE as usize];
    for range in data {
        let range = range.start as usize..range.end as usize;
        ram[range.clone()].copy_from_slice(&pattern(range.len(), 9));
        ram[range.start] = 1;
    }
    ram
}

fn dump(options: MemoryWriterOptions, dest: &Path, reader: &(impl PageReader + ?Sized), page: u64) {
    let mut writer = options.open(dest, SIZE, page).unwrap();
    writer.write_full(reader).unwrap();
    writer.commit().unwrap();
}

#[rstest]
fn zeros_that_are_skipped_take_no_blocks(
    #[values(512, 4096, 16384)] page: u64,
    #[values(true, false)] memory: bool,
) {
    let place = Place::new();
    let ram = sparse(&[0..1, 512 * KIB..768 * KIB, SIZE - 1..SIZE]);
    let options = || MemoryWriter::options().skip_zeros(true);
    if memory {
        dump(options(), &place.dest, &ram, page);
    } else {
        dump(options(), &place.dest, &without_memory(&ram), page);
    }
    assert!(place.read() == ram);
    assert_allocates_at_most(&place.dest, (256 + 2 * 16) * KIB);
}

#[test]
fn nothing_is_skipped_by_default() {
    let place = Place::new();
    dump(MemoryWriter::options(), &place.dest, &sparse(&[]), PAGE);
    assert!(allocated(&place.dest) >= SIZE);
}

#[rstest]
#[case::zeros(MemoryWriter::options().skip_zeros(true))]
#[case::untouched(MemoryWriter::options().skip_untouched(true))]
#[case::both(skipping())]
fn guest_of_zeros_is_a_hole(#[case] options: MemoryWriterOptions) {
    let (place, ram) = (Place::new(), Memory::new(SIZE).unwrap());
    dump(options, &place.dest, &ram, PAGE);
    assert!(place.read() == sparse(&[]));
    assert_allocates_at_most(&place.dest, 0);
}

/// Every other page is zero: skipping them would take longer than writing them.
#[test]
fn short_runs_of_zeros_are_written() {
    let place = Place::new();
    let pages: Vec<_> = (0..SIZE / PAGE / 2)
        .map(|at| at * 2 * PAGE..(at * 2 + 1) * PAGE)
        .collect();
    let ram = sparse(&pages);
    dump(
        MemoryWriter::options().skip_zeros(true),
        &place.dest,
        &ram,
        PAGE,
    );
    assert!(place.read() == ram);
    assert!(allocated(&place.dest) >= SIZE - 32 * KIB);
}

#[test]
fn page_that_became_zero_is_in_the_diff() {
    let (place, dirty) = (Place::new(), DirtyBitmap::new(0, SIZE, PAGE).unwrap());
    dirty.mark_range(0, 256 * KIB).unwrap();
    let mut writer = skipping().open(&place.dest, SIZE, PAGE).unwrap();
    assert_eq!(writer.write_diff(&sparse(&[]), &dirty).unwrap(), 64);
    writer.commit().unwrap();
    assert!(allocated(&place.dest) >= 256 * KIB);
}

#[test]
fn skipped_page_with_an_earlier_write_is_zero() {
    let (place, dirty) = (Place::new(), DirtyBitmap::new(0, SIZE, PAGE).unwrap());
    dirty.mark_range(0, 256 * KIB).unwrap();
    for diff in [true, false] {
        let mut writer = skipping().open(&place.dest, SIZE, PAGE).unwrap();
        let old = pattern(SIZE as usize, 1);
        if diff {
            writer.write_diff(&old, &dirty).unwrap();
        } else {
            writer.write_full(&old).unwrap();
        }
        let ram = sparse(&[1024 * KIB..1100 * KIB]);
        writer.write_full(&ram).unwrap();
        writer.commit().unwrap();
        assert!(place.read() == ram);
        assert_allocates_at_most(&place.dest, 76 * KIB);
    }
}

#[test]
fn skipped_page_of_a_recycled_file_is_zero() {
    let place = Place::recycling();
    let options = || skipping().recycle(1 << 30);
    for seed in 1..=2 {
        dump(options(), &place.dest, &pattern(SIZE as usize, seed), PAGE);
    }
    let ram = sparse(&[1024 * KIB..1100 * KIB]);
    dump(options(), &place.dest, &ram, PAGE);
    assert!(place.read() == ram);
}

#[rstest]
fn unreadable_bytes_do_not_count_as_zeros(#[values(0, 5 * PAGE, 3 << 20)] offset: u64) {
    let place = Place::new();
    let reader = Until {
        ram: sparse(&[]),
        offset,
        then: || io::Error::other("planted"),
    };
    let mut writer = skipping().open(&place.dest, SIZE, PAGE).unwrap();
    let error = writer.write_full(&reader).unwrap_err();
    let SnapshotError::MemoryIo {
        step: MemoryIoStep::Read,
        offset: missing,
        ..
    } = error
    else {
        panic!("{error}")
    };
    assert!(missing <= offset && offset < missing + (1 << 20));
    drop(writer);
    place.assert_untouched();
}

/// Fails reads outside the ranges that `populated` returns.
struct Knows<'a>(&'a [u8], Vec<Range<u64>>);

impl PageReader for Knows<'_> {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u64;
        let known = self.1.iter().any(|range| {
            // Pages close to a range may be read.
            range.start.saturating_sub(64 * KIB) <= offset
                && offset + len <= range.end.saturating_add(64 * KIB)
        });
        assert!(known && len <= 1 << 20, "{len} bytes at {offset} are read");
        self.0.read_at(offset, buf)
    }

    fn populated(&self, range: Range<u64>) -> PopulatedRanges<'_> {
        assert_eq!(range, 0..SIZE);
        Box::new(self.1.clone().into_iter())
    }
}

#[rstest]
#[case::nothing(vec![])]
#[case::everything(vec![0..SIZE])]
#[case::beyond_the_ram(vec![0..u64::MAX])]
#[case::bytes(vec![4097..4098, 4098..4099, 1 << 20..(1 << 20) + 1, SIZE - 1..SIZE])]
#[case::past_the_end(vec![SIZE..SIZE + 5])]
fn only_pages_that_may_be_populated_are_read(
    #[case] ranges: Vec<Range<u64>>,
    #[values(true, false)] zeros: bool,
    #[values(512, 16384)] page: u64,
) {
    let place = Place::new();
    let within: Vec<_> = ranges
        .iter()
        .map(|one| one.start.min(SIZE)..one.end.min(SIZE))
        .collect();
    let ram = sparse(
        &within
            .into_iter()
            .filter(|one| !one.is_empty())
            .collect::<Vec<_>>(),
    );
    let options = MemoryWriter::options()
        .skip_untouched(true)
        .skip_zeros(zeros);
    dump(options, &place.dest, &Knows(&ram, ranges), page);
    assert!(place.read() == ram);
}

/// The ranges descend, against the contract: bytes that were read ahead are of other pages.
#[test]
fn descending_ranges_of_a_reader_are_harmless() {
    let place = Place::new();
    let data = 512 * KIB..512 * KIB + PAGE;
    let ram = sparse(std::slice::from_ref(&data));
    let zeros = [1 << 20, 2 << 20].map(|at| at..at + 64 * KIB);
    let ranges = [&zeros[..], &[0..PAGE, data]].concat();
    dump(skipping(), &place.dest, &Knows(&ram, ranges), PAGE);
    assert!(place.read() == ram);
}

#[rstest]
#[case::zeros_at_the_end(&[0..64 * KIB])]
#[case::zeros_first(&[SIZE - 64 * KIB..SIZE])]
#[case::only_zeros(&[])]
#[case::some(&[KIB..2 * KIB, 300 * KIB..600 * KIB, 3 << 20..(3 << 20) + 1])]
fn progress_ends_at_the_total(#[case] data: &[Range<u64>]) {
    let place = Place::new();
    let (send, receive) = mpsc::channel();
    let options = skipping().progress(move |progress| {
        send.send(progress).unwrap();
        std::ops::ControlFlow::Continue(())
    });
    dump(options, &place.dest, &sparse(data), PAGE);
    let seen: Vec<_> = receive.try_iter().collect();
    assert!(seen.is_sorted_by(|a, b| a.done < b.done), "{seen:?}");
    assert!(seen.iter().all(|progress| progress.total == SIZE));
    assert_eq!(seen.last().unwrap().done, SIZE);
}

#[test]
fn scan_of_zeros_can_be_cancelled() {
    let (place, cancel) = (Place::new(), CancelToken::new());
    let token = cancel.clone();
    let mut writer = MemoryWriter::options()
        .skip_zeros(true)
        .cancel(cancel)
        .progress(move |progress| {
            if progress.done > 0 {
                assert!(progress.done < SIZE);
                token.cancel();
            }
            std::ops::ControlFlow::Continue(())
        })
        .open(&place.dest, SIZE, PAGE)
        .unwrap();
    // All of it may have been touched.
    let ram = without_memory(&sparse(&[]));
    let error = writer.write_full(&ram).unwrap_err();
    assert!(
        matches!(error, SnapshotError::Cancelled { written: 0, .. }),
        "{error}"
    );
    assert!(matches!(
        writer.commit().unwrap_err(),
        SnapshotError::Incomplete { .. }
    ));
    place.assert_untouched();
}
