//! Marking, iteration, draining and import of dirty logs, and their errors.

use dirty_bitmap::{DirtyBitmap, DirtyLogError, GeometryError, MAX_RAM_SIZE};
use rstest::rstest;

const START: u64 = 0x8000_0000;
const SIZE: u64 = 1 << 20;

fn bitmap() -> DirtyBitmap {
    DirtyBitmap::new(START, SIZE, 4096).unwrap()
}

fn runs(bitmap: &DirtyBitmap) -> Vec<std::ops::Range<u64>> {
    bitmap.runs().collect()
}

#[rstest]
#[case::no_ram(0, 0, 4096, GeometryError::NoRam)]
#[case::page_size_zero(0, SIZE, 0, GeometryError::PageSizeNotPowerOfTwo { page_size: 0 })]
#[case::page_size_not_power_of_two(0, SIZE, 12288, GeometryError::PageSizeNotPowerOfTwo { page_size: 12288 })]
#[case::page_larger_than_ram(0, SIZE, 2 * SIZE, GeometryError::PageLargerThanRam { page_size: 2 * SIZE, ram_size: SIZE })]
#[case::ram_of_2_63(0, 1 << 63, 4096, GeometryError::RamTooLarge { ram_size: 1 << 63 })]
#[case::just_too_large(0, MAX_RAM_SIZE + 1, 4096, GeometryError::RamTooLarge { ram_size: MAX_RAM_SIZE + 1 })]
#[case::past_the_last_address(u64::MAX - 4096, SIZE, 4096, GeometryError::AddressOverflow { ram_start: u64::MAX - 4096, ram_size: SIZE })]
fn an_invalid_geometry_is_an_error(
    #[case] start: u64,
    #[case] size: u64,
    #[case] page: u64,
    #[case] error: GeometryError,
) {
    assert_eq!(DirtyBitmap::new(start, size, page).unwrap_err(), error);
}

#[test]
fn addresses_count_from_the_start_of_the_ram() {
    let bitmap = bitmap();
    assert!(bitmap.mark(START + 0x5000).unwrap());
    assert_eq!(runs(&bitmap), [0x5000..0x6000]);
    assert!(bitmap.is_dirty(START + 0x5fff).unwrap());
    assert!(!bitmap.is_dirty(START + 0x6000).unwrap());
    let error = bitmap.mark(0x5000).unwrap_err();
    assert_eq!(
        (error.start, error.ram_start, error.ram_end),
        (0x5000, START, START + SIZE)
    );
}

#[test]
fn mark_returns_the_clean_to_dirty_edge() {
    let bitmap = bitmap();
    assert!(bitmap.mark(START).unwrap());
    assert!(!bitmap.mark(START + 4095).unwrap());
    assert!(
        bitmap.mark_range(START, 4097).unwrap(),
        "the second page was clean"
    );
    assert!(!bitmap.mark_page(1).unwrap());
}

#[rstest]
#[case::before(START - 1)]
#[case::after(START + SIZE)]
#[case::zero(0)]
#[case::last_address(u64::MAX)]
fn a_mark_outside_the_ram_is_an_error_and_marks_nothing(#[case] address: u64) {
    let bitmap = bitmap();
    assert_eq!(bitmap.mark(address).unwrap_err().start, address);
    assert!(bitmap.is_dirty(address).is_err());
    assert!(bitmap.is_clean());
}

#[rstest]
#[case::one_past_the_last(256)]
#[case::offset_overflow(u64::MAX / 4096 + 1)]
#[case::the_largest(u64::MAX)]
fn an_index_outside_the_ram_is_an_error(#[case] index: u64) {
    let bitmap = bitmap();
    assert!(bitmap.mark_page(index).is_err());
    assert!(bitmap.is_clean());
    assert!(bitmap.mark_page(255).unwrap());
}

#[rstest]
#[case::over_the_end(START + SIZE - 1, 2, Some(SIZE - 4096..SIZE))]
#[case::over_the_start(START - 1, 2, Some(0..4096))]
#[case::over_both(0, u64::MAX, Some(0..SIZE))]
#[case::outside(0, 4096, None)]
fn a_partly_outside_range_is_an_error_but_marks_the_inside(
    #[case] address: u64,
    #[case] len: u64,
    #[case] marked: Option<std::ops::Range<u64>>,
) {
    let bitmap = bitmap();
    bitmap.mark_range(address, len).unwrap_err();
    assert_eq!(runs(&bitmap), Vec::from_iter(marked));
}

#[test]
fn an_empty_range_marks_nothing_and_must_be_in_the_ram() {
    let bitmap = bitmap();
    assert!(!bitmap.mark_range(START + 17, 0).unwrap());
    assert!(!bitmap.mark_range(START + SIZE, 0).unwrap());
    assert!(bitmap.is_clean());
    bitmap.mark_range(START + SIZE + 1, 0).unwrap_err();
    bitmap.mark_range(0, 0).unwrap_err();
}

#[test]
fn the_last_page_ends_where_the_ram_ends() {
    let bitmap = DirtyBitmap::new(0, 10_000, 4096).unwrap();
    assert!(bitmap.mark_page(2).unwrap());
    assert_eq!(runs(&bitmap), [8192..10_000]);
    assert_eq!(bitmap.dirty_bytes(), 10_000 - 8192);
    bitmap.mark(0).unwrap();
    assert_eq!(bitmap.dirty_bytes(), 4096 + 10_000 - 8192);
}

#[test]
fn runs_are_maximal_across_words_and_summary_words() {
    let pages = 3 * 64 * 64;
    let bitmap = DirtyBitmap::new(0, pages * 4096, 4096).unwrap();
    bitmap.mark_range(63 * 4096, 2 * 4096).unwrap();
    bitmap.mark_range(4000 * 4096, 5000 * 4096).unwrap();
    bitmap.mark_page(pages - 1).unwrap();
    let expected =
        [63..65, 4000..9000, pages - 1..pages].map(|run| run.start * 4096..run.end * 4096);
    assert_eq!(runs(&bitmap), expected);
    assert_eq!(bitmap.dirty_bytes(), (2 + 5000 + 1) * 4096);
}

#[test]
fn marks_far_apart_are_found() {
    // A summary word covers 4,096 pages. Iteration reads eight of them together, and the last five
    // one by one.
    let groups = 61;
    let bitmap = DirtyBitmap::new(0, groups * 4096 * 4096, 4096).unwrap();
    let pages = (0..groups).map(|group| group * 4096 + 67 * group % 4096);
    let expected: Vec<_> = pages.map(|page| page * 4096..(page + 1) * 4096).collect();
    for run in &expected {
        bitmap.mark(run.start).unwrap();
        assert_eq!(runs(&bitmap.drain().unwrap()), std::slice::from_ref(run));
    }
    for run in &expected {
        bitmap.mark(run.start).unwrap();
    }
    assert_eq!(runs(&bitmap), expected);
    assert_eq!(bitmap.dirty_bytes(), groups * 4096);
}

/// A summary word covers 4,096 pages. Where few pages are marked, iteration reads eight of them
/// together.
#[test]
fn marks_at_the_same_bit_of_eight_summary_words_are_found() {
    const PAGES: u64 = 64 * 64 * 4096;
    for count in 1..=8 {
        let bitmap = DirtyBitmap::new(0, 24 * PAGES, 4096).unwrap();
        let starts: Vec<_> = (8..8 + count).map(|word| word * PAGES + 0x5000).collect();
        for start in &starts {
            bitmap.mark(*start).unwrap();
        }
        let expected: Vec<_> = starts
            .into_iter()
            .map(|start| start..start + 4096)
            .collect();
        assert_eq!(runs(&bitmap), expected);
    }
}

#[test]
fn more_runs_than_a_batch_are_in_order() {
    let bitmap = DirtyBitmap::new(0, 4 << 20, 4096).unwrap();
    (0..512).for_each(|i| _ = bitmap.mark_page(2 * i).unwrap());
    let expected: Vec<_> = (0..512).map(|i| i * 8192..i * 8192 + 4096).collect();
    assert_eq!(runs(&bitmap), expected);
}

#[rstest]
fn a_run_across_the_end_of_a_batch_is_one_run(#[values(0, 1)] first: u64) {
    let bitmap = DirtyBitmap::new(0, 4096 * 2000, 4096).unwrap();
    for before in 0..300 {
        // Every other page, then a long run.
        let mut pages: Vec<_> = (0..before)
            .map(|i| first + 2 * i..first + 2 * i + 1)
            .collect();
        pages.push(first + 2 * before..first + 2 * before + 1300);
        let expected: Vec<_> = pages
            .iter()
            .map(|run| run.start * 4096..run.end * 4096)
            .collect();
        for run in &expected {
            bitmap.mark_range(run.start, run.end - run.start).unwrap();
        }
        assert_eq!(runs(&bitmap), expected);
        drop(bitmap.drain().unwrap());
    }
}

#[test]
fn draining_during_iteration_is_allowed() {
    let bitmap = DirtyBitmap::new(0, 4 << 20, 4096).unwrap();
    (0..512).for_each(|i| _ = bitmap.mark_page(2 * i).unwrap());
    let mut walk = bitmap.runs();
    assert_eq!(walk.next(), Some(0..4096));
    let drained = bitmap.drain().unwrap();
    assert_eq!(runs(&drained).len(), 512);
    assert!(
        walk.count() < 511,
        "marks that were drained before their batch are not returned"
    );
}

#[test]
fn drain_takes_all_marks() {
    let bitmap = bitmap();
    bitmap.mark_range(START + 0x3000, 0x9000).unwrap();
    let drained = bitmap.drain().unwrap();
    assert!(bitmap.is_clean());
    assert_eq!(runs(&drained), [0x3000..0xc000]);
    assert_eq!(
        (drained.ram_start(), drained.ram_size(), drained.page_size()),
        (START, SIZE, 4096)
    );
}

#[rstest]
#[case::finer(512, vec![0x3000..0x4000])]
#[case::same(4096, vec![0x3000..0x4000])]
#[case::coarser(16384, vec![0..0x4000])]
fn drain_into_converts_the_page_size(
    #[case] page_size: u64,
    #[case] expected: Vec<std::ops::Range<u64>>,
) {
    let (from, into) = (bitmap(), DirtyBitmap::new(START, SIZE, page_size).unwrap());
    from.mark(START + 0x3000).unwrap();
    from.drain_into(&into).unwrap();
    assert!(from.is_clean());
    assert_eq!(runs(&into), expected);
}

#[rstest]
#[case::start(START + SIZE, SIZE)]
#[case::size(START, SIZE / 2)]
fn drain_into_other_ram_is_an_error_and_moves_nothing(#[case] start: u64, #[case] size: u64) {
    let (from, into) = (bitmap(), DirtyBitmap::new(start, size, 4096).unwrap());
    from.mark(START).unwrap();
    from.drain_into(&into).unwrap_err();
    assert!(into.is_clean() && !from.is_clean());
}

#[test]
fn drain_into_itself_keeps_the_marks() {
    let bitmap = bitmap();
    bitmap.mark_range(START + 0x3000, 0x9000).unwrap();
    bitmap.drain_into(&bitmap).unwrap();
    assert_eq!(runs(&bitmap), [0x3000..0xc000]);
}

#[rstest]
#[case::same(4096, 0b1011, vec![0..8192, 12288..16384], 3)]
#[case::finer(1024, 0b1000_0001, vec![0..8192], 2)]
#[case::coarser(65536, 0b10, vec![65536..131_072], 1)]
fn a_dirty_log_of_any_page_size_is_imported(
    #[case] page_size: u64,
    #[case] word: u64,
    #[case] expected: Vec<std::ops::Range<u64>>,
    #[case] pages: u64,
) {
    let bitmap = bitmap();
    assert_eq!(
        bitmap
            .mark_dirty_log(START, page_size, &[word.to_le()])
            .unwrap(),
        pages
    );
    assert_eq!(runs(&bitmap), expected);
}

#[test]
fn a_dirty_log_is_marked_at_the_address_of_its_slot() {
    let bitmap = bitmap();
    bitmap
        .mark_dirty_log(START + 0x4_0000, 4096, &[0, (1u64 << 63).to_le()])
        .unwrap();
    let page = 0x4_0000 + 127 * 4096;
    assert_eq!(runs(&bitmap), [page..page + 4096]);
}

#[test]
fn a_dirty_log_may_have_padding_but_no_pages_outside_the_ram() {
    let bitmap = bitmap();
    bitmap
        .mark_dirty_log(START + SIZE - 4096, 4096, &[1u64.to_le(), 0, 0])
        .unwrap();
    assert!(bitmap.drain().unwrap().is_dirty(START + SIZE - 1).unwrap());

    let error = bitmap
        .mark_dirty_log(START + SIZE - 4096, 4096, &[0b11u64.to_le()])
        .unwrap_err();
    assert!(matches!(error, DirtyLogError::OutOfRange(_)));
    assert_eq!(
        runs(&bitmap),
        [SIZE - 4096..SIZE],
        "pages inside are marked nevertheless"
    );

    for page_size in [0, 4097] {
        let error = bitmap.mark_dirty_log(START, page_size, &[1]).unwrap_err();
        assert_eq!(error, DirtyLogError::PageSizeNotPowerOfTwo { page_size });
    }
    bitmap
        .mark_dirty_log(u64::MAX, 1 << 63, &[u64::MAX; 3])
        .unwrap_err();
}

#[test]
fn a_page_set_is_a_copy_that_can_be_marked_again() {
    let bitmap = bitmap();
    bitmap.mark_range(START + 0x3000, 0x9000).unwrap();
    let set = bitmap.page_set();
    assert_eq!((set.page_size(), set.page_count()), (4096, 9));
    assert_eq!(set.range(), START..START + SIZE);
    assert!(!bitmap.is_clean());

    let coarse = DirtyBitmap::new(START, SIZE, 32768).unwrap();
    coarse.mark_pages(&set).unwrap();
    assert_eq!(runs(&coarse), [0..0x10000]);

    // RAM that ends inside the set.
    let smaller = DirtyBitmap::new(START, 0x8000, 4096).unwrap();
    let error = smaller.mark_pages(&set).unwrap_err();
    assert_eq!((error.start, error.end), (START + 0x3000, START + 0xc000));
    assert_eq!(runs(&smaller), [0x3000..0x8000]);
}
