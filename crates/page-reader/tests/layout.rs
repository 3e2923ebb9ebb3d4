//! `RamLayout`, compared with an oracle: a list of every 4 KiB page of RAM, in file order.

use std::hint::black_box;
use std::time::{Duration, Instant};

use page_reader::{LayoutError, OutsideRam, RamLayout, RamRange};
use proptest::prelude::*;
use rstest::rstest;

const PAGE: u64 = RamLayout::ALIGNMENT;
const GIB: u64 = 1 << 30;

fn ranges(layout: &RamLayout) -> Vec<(u64, u64, u64)> {
    layout.regions().iter().map(parts).collect()
}

fn parts(range: &RamRange) -> (u64, u64, u64) {
    (range.guest_start, range.offset, range.size)
}

/// Readers call `ram_size` for each page. A walk over these regions takes 17 us, and all calls of
/// this test would take 140 s.
#[test]
fn ram_size_does_not_walk_over_the_regions() {
    const REGIONS: u64 = 32_768;
    let layout = RamLayout::new((0..REGIONS).map(|region| (region * 2 * PAGE, PAGE))).unwrap();
    let start = Instant::now();
    for round in 0..1_u32 << 23 {
        assert_eq!(black_box(&layout).ram_size(), REGIONS * PAGE);
        if round.is_multiple_of(1 << 16) {
            assert!(start.elapsed() < Duration::from_secs(60), "{round} rounds");
        }
    }
}

#[test]
fn regions_are_packed_in_guest_physical_order() {
    let layout = RamLayout::new([(4 * GIB, PAGE), (0, 2 * PAGE), (GIB, 3 * PAGE)]).unwrap();
    assert_eq!(
        ranges(&layout),
        [
            (0, 0, 2 * PAGE),
            (GIB, 2 * PAGE, 3 * PAGE),
            (4 * GIB, 5 * PAGE, PAGE)
        ]
    );
    assert_eq!(layout.ram_size(), 6 * PAGE);
}

#[rstest]
#[case::below_the_gap(GIB, &[(0, 0, GIB)])]
#[case::up_to_the_gap(3 * GIB, &[(0, 0, 3 * GIB)])]
#[case::one_page_past_the_gap(3 * GIB + PAGE, &[(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, PAGE)])]
#[case::far_past_the_gap(16 * GIB, &[(0, 0, 3 * GIB), (4 * GIB, 3 * GIB, 13 * GIB)])]
fn x86_ram_has_its_gap_from_3_to_4_gib(
    #[case] ram_size: u64,
    #[case] expected: &[(u64, u64, u64)],
) {
    let layout = RamLayout::x86_with_gap(ram_size).unwrap();
    assert_eq!(ranges(&layout), expected);
    assert_eq!(layout.ram_size(), ram_size);
}

#[rstest]
#[case::no_region(&[], LayoutError::NoRegion)]
#[case::empty_region(&[(0, PAGE), (GIB, 0)], LayoutError::EmptyRegion { guest_start: GIB })]
#[case::start_inside_a_page(
    &[(0x800, PAGE)],
    LayoutError::Misaligned { guest_start: 0x800, size: PAGE }
)]
#[case::end_inside_a_page(
    &[(PAGE, PAGE + 1)],
    LayoutError::Misaligned { guest_start: PAGE, size: PAGE + 1 }
)]
#[case::overlap_by_a_page(
    &[(2 * PAGE, PAGE), (0, 3 * PAGE)],
    LayoutError::Overlap { previous_start: 0, previous_end: 3 * PAGE, guest_start: 2 * PAGE }
)]
#[case::equal_regions(
    &[(GIB, PAGE), (GIB, PAGE)],
    LayoutError::Overlap { previous_start: GIB, previous_end: GIB + PAGE, guest_start: GIB }
)]
#[case::end_at_2_to_the_64(
    &[(PAGE.wrapping_neg(), PAGE)],
    LayoutError::PastAddressSpace { guest_start: PAGE.wrapping_neg(), size: PAGE }
)]
#[case::end_past_2_to_the_64(
    &[(GIB, PAGE.wrapping_neg())],
    LayoutError::PastAddressSpace { guest_start: GIB, size: PAGE.wrapping_neg() }
)]
#[case::size_of_2_to_the_63(&[(0, 1 << 63)], LayoutError::TooLarge)]
#[case::sum_of_2_to_the_63(&[(0, 1 << 62), (1 << 63, 1 << 62)], LayoutError::TooLarge)]
fn invalid_regions_are_refused(#[case] regions: &[(u64, u64)], #[case] expected: LayoutError) {
    assert_eq!(
        RamLayout::new(regions.iter().copied()).unwrap_err(),
        expected
    );
    #[cfg(feature = "serde")]
    assert!(
        postcard::from_bytes::<RamLayout>(&postcard::to_allocvec(regions).unwrap()).is_err(),
        "deserialized an invalid layout"
    );
}

#[test]
fn layouts_at_the_numeric_limits_are_accepted() {
    let most = (1 << 63) - PAGE;
    assert_eq!(
        RamLayout::single(0, most)
            .unwrap()
            .guest_address_of(most - 1),
        Some(most - 1)
    );
    let last = PAGE.wrapping_neg() - PAGE;
    let layout = RamLayout::single(last, PAGE).unwrap();
    assert_eq!(layout.offset_of(last + PAGE - 1), Some(PAGE - 1));
    assert_eq!(layout.offset_of(u64::MAX), None);
    assert!(layout.guest_pieces(last, u64::MAX).is_err());
}

#[test]
fn an_x86_guest_without_ram_is_refused() {
    assert_eq!(
        RamLayout::x86_with_gap(0).unwrap_err(),
        LayoutError::EmptyRegion { guest_start: 0 }
    );
}

#[test]
fn a_guest_range_over_adjacent_regions_is_split() {
    let layout = RamLayout::new([(0, PAGE), (PAGE, PAGE)]).unwrap();
    let pieces: Vec<_> = layout.guest_pieces(PAGE - 1, 2).unwrap().collect();
    assert_eq!(parts(&pieces[0]), (PAGE - 1, PAGE - 1, 1));
    assert_eq!(parts(&pieces[1]), (PAGE, PAGE, 1));
    assert_eq!((pieces[0].region, pieces[1].region), (0, 1));
}

#[test]
fn a_guest_range_into_a_gap_names_the_start_of_the_gap() {
    let layout = RamLayout::x86_with_gap(5 * GIB).unwrap();
    let error = layout.guest_pieces(3 * GIB - 1, 2).err().unwrap();
    let expected = OutsideRam::Guest {
        guest_start: 3 * GIB - 1,
        size: 2,
        outside: 3 * GIB,
    };
    assert_eq!(error, expected);
    assert!(
        layout.guest_pieces(3 * GIB - 1, GIB + 2).is_err(),
        "RAM on both sides"
    );
    assert!(
        layout.guest_pieces(6 * GIB - 1, 2).is_err(),
        "past the last"
    );
    assert!(layout.guest_pieces(1, u64::MAX).is_err(), "overflow");
}

#[test]
fn an_offset_range_past_the_ram_is_refused() {
    let layout = RamLayout::x86_with_gap(5 * GIB).unwrap();
    for (offset, size) in [(5 * GIB, 1), (5 * GIB - 1, 2), (u64::MAX, 1), (1, u64::MAX)] {
        let expected = OutsideRam::File {
            offset,
            size,
            ram_size: 5 * GIB,
        };
        assert_eq!(layout.offset_pieces(offset, size).err(), Some(expected));
    }
}

#[rstest]
#[case(0)]
#[case(1)]
#[case(3 * GIB)]
#[case(5 * GIB)]
fn an_empty_range_has_no_pieces(#[case] start: u64) {
    let layout = RamLayout::x86_with_gap(5 * GIB).unwrap();
    assert_eq!(layout.offset_pieces(start, 0).unwrap().count(), 0);
    assert_eq!(layout.guest_pieces(start, 0).unwrap().count(), 0);
}

#[cfg(feature = "serde")]
#[test]
fn a_layout_is_serialized_as_its_regions() {
    let regions = [(0, 3 * GIB), (4 * GIB, GIB)];
    let layout = RamLayout::new(regions).unwrap();
    let bytes = postcard::to_allocvec(&layout).unwrap();
    assert_eq!(bytes, postcard::to_allocvec(&regions[..]).unwrap());
    assert_eq!(postcard::from_bytes::<RamLayout>(&bytes).unwrap(), layout);
}

#[test]
fn a_layout_error_names_the_region_and_the_remedy() {
    let error = RamLayout::new([(0x800, PAGE)]).unwrap_err().to_string();
    assert_eq!(
        error,
        "the RAM region at 0x800 of 4096 bytes does not start and end at a multiple of 4096 \
         bytes: give whole pages"
    );
}

/// Returns up to six regions of up to four pages, each after a gap of up to three pages, shuffled.
fn any_regions() -> impl Strategy<Value = Vec<(u64, u64)>> {
    prop::collection::vec((0..=3_u64, 1..=4_u64), 1..=6)
        .prop_map(|gaps_and_sizes| {
            let mut next = 0;
            let region = |(gap, size)| {
                let start = next + gap * PAGE;
                next = start + size * PAGE;
                (start, size * PAGE)
            };
            gaps_and_sizes.into_iter().map(region).collect::<Vec<_>>()
        })
        .prop_shuffle()
}

/// Returns the guest-physical address and region of each page of the memory file, without
/// arithmetic on offsets.
fn pages_in_file_order(regions: &[(u64, u64)]) -> Vec<(u64, usize)> {
    let mut sorted = regions.to_vec();
    sorted.sort_unstable();
    let pages = |(region, &(start, size)): (usize, &(u64, u64))| {
        (start..start + size)
            .step_by(PAGE as usize)
            .map(move |address| (address, region))
            .collect::<Vec<_>>()
    };
    sorted.iter().enumerate().flat_map(pages).collect()
}

/// Returns the guest-physical address and region of a byte of the file.
fn byte_at(pages: &[(u64, usize)], offset: u64) -> (u64, usize) {
    let (address, region) = pages[(offset / PAGE) as usize];
    (address + offset % PAGE, region)
}

fn check_pieces(
    pieces: &[RamRange],
    pages: &[(u64, usize)],
    offset: u64,
    size: u64,
) -> Result<(), TestCaseError> {
    let mut next = offset;
    for (i, piece) in pieces.iter().enumerate() {
        prop_assert!(piece.size > 0);
        prop_assert_eq!(piece.offset, next, "no gap and no overlap in the file");
        for byte in [0, piece.size - 1] {
            let expected = byte_at(pages, piece.offset + byte);
            prop_assert_eq!((piece.guest_start + byte, piece.region), expected);
        }
        prop_assert!(
            i == 0 || pieces[i - 1].region != piece.region,
            "split once only"
        );
        next = piece.offset_end();
    }
    prop_assert_eq!(next, offset + size);
    Ok(())
}

proptest! {
    #[test]
    fn addresses_and_offsets_agree_with_the_oracle(
        regions in any_regions(),
        address in 0..45 * PAGE,
    ) {
        let layout = RamLayout::new(regions.clone()).unwrap();
        let pages = pages_in_file_order(&regions);
        prop_assert_eq!(layout.ram_size(), pages.len() as u64 * PAGE);

        let page = pages.iter().position(|&(page, _)| page == address / PAGE * PAGE);
        let offset = page.map(|page| page as u64 * PAGE + address % PAGE);
        prop_assert_eq!(layout.offset_of(address), offset);
        if let Some(offset) = offset {
            prop_assert_eq!(layout.guest_address_of(offset), Some(address));
        }
        let past = address >= layout.ram_size();
        prop_assert_eq!(layout.guest_address_of(address).is_none(), past);
    }

    #[test]
    fn pieces_of_an_offset_range_cover_each_byte_once(
        regions in any_regions(),
        (from, to) in (0.0..=1.0, 0.0..=1.0),
    ) {
        let layout = RamLayout::new(regions.clone()).unwrap();
        let at = |part: f64| (part * layout.ram_size() as f64) as u64;
        let (offset, end) = (at(from).min(at(to)), at(from).max(at(to)));
        let pieces: Vec<_> = layout.offset_pieces(offset, end - offset).unwrap().collect();
        check_pieces(&pieces, &pages_in_file_order(&regions), offset, end - offset)?;
    }

    #[test]
    fn guest_pieces_exist_only_if_every_page_is_ram(
        regions in any_regions(),
        guest_start in 0..45 * PAGE,
        size in 1..12 * PAGE,
    ) {
        let layout = RamLayout::new(regions.clone()).unwrap();
        let pages = pages_in_file_order(&regions);
        let is_ram = |address: u64| pages.iter().any(|&(page, _)| page == address / PAGE * PAGE);
        let outside = std::iter::once(guest_start)
            .chain((guest_start / PAGE + 1..).map(|page| page * PAGE))
            .take_while(|&address| address < guest_start + size)
            .find(|&address| !is_ram(address));
        match layout.guest_pieces(guest_start, size) {
            Ok(pieces) => {
                prop_assert_eq!(outside, None);
                let pieces: Vec<_> = pieces.collect();
                prop_assert_eq!(pieces[0].guest_start, guest_start);
                check_pieces(&pieces, &pages, pieces[0].offset, size)?;
                prop_assert_eq!(pieces.last().unwrap().guest_end(), guest_start + size);
            }
            Err(OutsideRam::Guest { outside: found, .. }) => prop_assert_eq!(outside, Some(found)),
            Err(other) => prop_assert!(false, "{}", other),
        }
    }
}
