//! Reading a bitmap in page units and words, copying its marks, and its encoding.

use std::ops::Range;

use dirty_bitmap::{DecodeError, DirtyBitmap, DirtyLogError, GeometryError, TrackedBitmap};
use proptest::prelude::*;
use rstest::rstest;

const START: u64 = 0x8000_0000;
const SIZE: u64 = 1 << 20;

fn bitmap() -> DirtyBitmap {
    DirtyBitmap::new(START, SIZE, 4096).unwrap()
}

fn runs<K>(bitmap: &DirtyBitmap<K>) -> Vec<Range<u64>> {
    bitmap.runs().collect()
}

#[rstest]
#[case::same_granule(4096, &[2..3, 7..9], 3)]
#[case::finer_granule(512, &[2..3, 7..9], 3)]
#[case::coarser_granule(16384, &[0..12], 12)]
fn pages_do_not_depend_on_the_granule(
    #[case] granule: u64,
    #[case] pages: &[Range<u64>],
    #[case] count: u64,
) {
    let bitmap = bitmap();
    for page in [2, 7, 8] {
        bitmap.mark_page(page).unwrap();
    }
    bitmap.rebuild(granule).unwrap();
    assert!(bitmap.pages().eq(pages.iter().cloned()));
    assert_eq!(bitmap.dirty_pages(), count);
    let words = bitmap.to_words();
    assert_eq!(words.len(), 4);
    assert_eq!(
        words
            .iter()
            .map(|word| u64::from(word.count_ones()))
            .sum::<u64>(),
        count
    );
}

#[test]
fn a_page_with_several_marks_counts_once() {
    let bitmap = bitmap();
    bitmap.rebuild(512).unwrap();
    bitmap.mark(START + 4096).unwrap();
    bitmap.mark(START + 4096 + 1024).unwrap();
    assert_eq!(bitmap.page_set().page_count(), 2, "granules");
    assert_eq!(bitmap.dirty_pages(), 1);
    assert_eq!(bitmap.to_words(), [0b10, 0, 0, 0]);
}

#[test]
fn the_last_page_may_be_cut_off() {
    let bitmap = DirtyBitmap::new(0, 64 * 4096 + 1, 4096).unwrap();
    bitmap.mark(64 * 4096).unwrap();
    assert!(bitmap.pages().eq([64..65]));
    assert_eq!(bitmap.to_words(), [0, 1]);
}

#[test]
fn words_of_other_page_sizes_are_marked() {
    let bitmap = bitmap();
    assert_eq!(bitmap.mark_words(16384, &[0b101]), Ok(2));
    assert_eq!(runs(&bitmap), [0..16384, 32768..49152]);
    // Clear bits after the RAM are valid, set bits are not.
    assert_eq!(bitmap.mark_words(1 << 19, &[0b10, 0]), Ok(1));
    let error = bitmap.mark_words(1 << 19, &[0b100]).unwrap_err();
    assert!(matches!(error, DirtyLogError::OutOfRange(_)), "{error}");
    assert!(
        error
            .to_string()
            .starts_with("bits are set for pages outside")
    );
    let error = bitmap.mark_words(4097, &[1]).unwrap_err();
    assert!(error.to_string().starts_with("the page size of the words"));
    assert_eq!(
        error,
        DirtyLogError::PageSizeNotPowerOfTwo { page_size: 4097 }
    );
}

#[test]
fn words_may_cut_off_the_last_page_only() {
    let bitmap = DirtyBitmap::new(0, 4096 + 1, 4096).unwrap();
    assert_eq!(bitmap.mark_words(4096, &[0b11]), Ok(2));
    assert_eq!(runs(&bitmap), [0..4097]);
    bitmap.mark_words(4096, &[0b100]).unwrap_err();
    // A page whose address exceeds 64 bits.
    let bitmap = DirtyBitmap::new(u64::MAX - 4096, 4096, 4096).unwrap();
    bitmap.mark_words(1 << 63, &[0b100]).unwrap_err();
    bitmap
        .mark_dirty_log(u64::MAX - 4096, 1 << 63, &[0b100_u64.to_le()])
        .unwrap_err();
    assert!(bitmap.is_clean());
}

#[test]
fn mark_all_leaves_the_other_bitmap_unchanged() {
    let (ours, theirs) = (bitmap(), bitmap());
    ours.mark(START).unwrap();
    theirs.rebuild(16384).unwrap();
    theirs.mark(START + 0x1_0000).unwrap();
    ours.mark_all(&theirs).unwrap();
    assert_eq!(runs(&ours), [0..4096, 0x1_0000..0x1_4000]);
    assert_eq!(runs(&theirs), [0x1_0000..0x1_4000]);
    // A bitmap may be marked with itself, and with the marks of any kind.
    ours.mark_all(&ours).unwrap();
    let tracked = TrackedBitmap::tracked(START, SIZE, 4096).unwrap();
    let epoch = ours.begin_epoch().unwrap();
    tracked.mark_all(epoch.bitmap()).unwrap();
    assert_eq!(runs(&tracked), runs(epoch.bitmap()));
}

#[test]
fn mark_all_refuses_other_addresses() {
    let other = DirtyBitmap::new(START, 2 * SIZE, 4096).unwrap();
    other.mark(START).unwrap();
    let bitmap = bitmap();
    let error = bitmap.mark_all(&other).unwrap_err();
    assert_eq!((error.this_size, error.other_size), (SIZE, 2 * SIZE));
    assert!(bitmap.is_clean());
}

/// The bytes of a bitmap of 66 pages of 512 bytes in granules of 1 KiB, of which three are marked.
const GOLDEN: [u8; 48] = [
    b'D', b'I', b'R', b'T', b'Y', b'B', b'M', 1, // magic and version
    0, 0, 0, 0x80, 0, 0, 0, 0, // start of the RAM
    0, 0x84, 0, 0, 0, 0, 0, 0, // size of the RAM
    0, 2, 0, 0, 0, 0, 0, 0, // page size
    0, 4, 0, 0, 0, 0, 0, 0, // granule
    0b11, 0, 0, 0, 1, 0, 0, 0, // marks
];

#[test]
fn the_encoding_is_as_documented() {
    let bitmap = DirtyBitmap::new(START, 66 * 512, 512).unwrap();
    bitmap.rebuild(1024).unwrap();
    bitmap.mark_range(START, 2048).unwrap();
    bitmap.mark(START + 32 * 1024).unwrap();
    assert_eq!(bitmap.to_bytes(), GOLDEN);

    let decoded = DirtyBitmap::from_bytes(&GOLDEN).unwrap();
    assert_eq!(decoded.page_size(), 512);
    assert_eq!(decoded.granule(), 1024);
    assert_eq!(runs(&decoded), [0..2048, 32 * 1024..33 * 1024]);
}

/// Returns the golden bytes with one word replaced.
fn with_word(index: usize, word: u64) -> Vec<u8> {
    let mut bytes = GOLDEN.to_vec();
    bytes[index * 8..][..8].copy_from_slice(&word.to_le_bytes());
    bytes
}

#[rstest]
#[case::no_bytes(vec![], DecodeError::NotABitmap)]
#[case::other_magic(with_word(0, 7), DecodeError::NotABitmap)]
#[case::next_version(
    with_word(0, u64::from_le_bytes(*b"DIRTYBM\x02")),
    DecodeError::Version { found: 2 }
)]
#[case::half_a_header(GOLDEN[..39].to_vec(), DecodeError::Length { expected: 40, found: 39 })]
#[case::magic_only(GOLDEN[..7].to_vec(), DecodeError::Length { expected: 40, found: 7 })]
#[case::no_words(GOLDEN[..40].to_vec(), DecodeError::Length { expected: 48, found: 40 })]
#[case::half_a_word(GOLDEN[..44].to_vec(), DecodeError::Length { expected: 48, found: 44 })]
#[case::one_word_more([&GOLDEN[..], &[0; 8]].concat(), DecodeError::Length { expected: 48, found: 56 })]
#[case::more_ram_than_bytes(
    with_word(2, 1 << 52),
    DecodeError::Length { expected: 40 + (1 << 39), found: 48 }
)]
#[case::no_ram(with_word(2, 0), DecodeError::Geometry(GeometryError::NoRam))]
#[case::page_size_of_three(
    with_word(3, 3),
    DecodeError::Geometry(GeometryError::PageSizeNotPowerOfTwo { page_size: 3 })
)]
#[case::granule_of_zero(
    with_word(4, 0),
    DecodeError::Geometry(GeometryError::PageSizeNotPowerOfTwo { page_size: 0 })
)]
#[case::past_the_last_address(
    with_word(1, u64::MAX - 511),
    DecodeError::Geometry(GeometryError::AddressOverflow {
        ram_start: u64::MAX - 511,
        ram_size: 66 * 512,
    })
)]
#[case::mark_after_the_ram(with_word(5, 1 << 33), DecodeError::MarkOutsideRam)]
fn other_bytes_are_refused(#[case] bytes: Vec<u8>, #[case] error: DecodeError) {
    assert_eq!(DirtyBitmap::from_bytes(&bytes).unwrap_err(), error);
}

#[test]
fn a_full_last_word_is_decoded() {
    let bitmap = DirtyBitmap::new(0, 64 * 512, 512).unwrap();
    bitmap.mark_range(0, 64 * 512).unwrap();
    let decoded = DirtyBitmap::from_bytes(&bitmap.to_bytes()).unwrap();
    assert_eq!(runs(&decoded), [0..64 * 512]);
}

proptest! {
    #[test]
    fn words_and_bytes_have_the_same_marks(
        size in 1..300_000_u64,
        shift in 0..13_u32,
        granule in 0..13_u32,
        marks in prop::collection::vec((any::<u64>(), 0..20_000_u64), 0..12),
    ) {
        let size = size.max(1 << shift.max(granule));
        let bitmap = DirtyBitmap::new(START, size, 1 << shift).unwrap();
        bitmap.rebuild(1 << granule).unwrap();
        for (start, len) in marks {
            let start = start % size;
            bitmap.mark_range(START + start, len.min(size - start)).unwrap();
        }
        let decoded = DirtyBitmap::from_bytes(&bitmap.to_bytes()).unwrap();
        prop_assert_eq!(runs(&decoded), runs(&bitmap));
        prop_assert_eq!(decoded.granule(), bitmap.granule());
        prop_assert_eq!(decoded.to_bytes(), bitmap.to_bytes());

        let from_words = DirtyBitmap::new(START, size, 1 << shift).unwrap();
        let count = from_words.mark_words(1 << shift, &bitmap.to_words()).unwrap();
        prop_assert_eq!(count, bitmap.dirty_pages());
        prop_assert!(from_words.pages().eq(bitmap.pages()));
    }

    #[test]
    fn damaged_bytes_are_refused_or_valid(
        at in 0..GOLDEN.len(),
        byte in any::<u8>(),
        len in 0..=GOLDEN.len(),
    ) {
        let mut bytes = GOLDEN.to_vec();
        bytes[at] = byte;
        for bytes in [&bytes[..], &bytes[..len]] {
            if let Ok(decoded) = DirtyBitmap::from_bytes(bytes) {
                prop_assert_eq!(decoded.to_bytes(), bytes);
            }
        }
    }
}
