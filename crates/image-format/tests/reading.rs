//! Reading: valid footers are read back, and invalid ones are refused.

mod support;

use std::os::unix::fs::FileExt;

use image_format::{
    CHUNK_SIZE, Checksums, Footer, FooterError, ImageId, ImageKind, InvalidFooter, Layout,
    Placement, Run, Storage, Version, packed_start,
};
use proptest::prelude::*;
use rstest::rstest;
use support::{PAGE, diff, read, sealed};

/// Returns `bytes` with the correct checksum of the footer, like those of an attacker.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 64;
    let start = u64::from_le_bytes(*bytes[end + 32..].first_chunk().unwrap()) as usize;
    let sum = blake3_of(&bytes[start..end]);
    bytes[end..end + 32].copy_from_slice(&sum);
    bytes
}

fn blake3_of(bytes: &[u8]) -> [u8; 32] {
    // The checksum of a chunk is the hash of its bytes, and a footer of these tests is shorter than
    // a chunk.
    let mut sums = Checksums::new(CHUNK_SIZE);
    sums.update(0, bytes);
    sums.finish()[0]
}

/// Returns the layouts that have a footer.
fn with_footer() -> impl Iterator<Item = Layout> {
    Layout::ALL.into_iter().filter(|layout| layout.has_footer())
}

#[test]
fn a_written_footer_is_read_back() {
    with_footer().for_each(written_and_read_back);
}

fn written_and_read_back(layout: Layout) {
    let footer = diff(layout);
    let bytes = sealed(&footer);
    assert_eq!(read(&bytes).unwrap(), footer);
    let chunks: Vec<_> = footer.chunks().collect();
    assert_eq!(chunks.len(), 3);
    let second: Vec<_> = chunks[1].pieces().collect();
    let at = match layout.placement() {
        Placement::ByOffset => CHUNK_SIZE,
        Placement::Appended => 3 * PAGE,
    };
    let at = footer.data_start() + at;
    assert_eq!(second, [(CHUNK_SIZE..CHUNK_SIZE + PAGE, at)]);
    assert_eq!(footer.run_at(5 * PAGE).unwrap().stored, Storage::Zeros);
    assert_eq!(footer.run_at(3 * PAGE), None);
    assert_eq!(footer.zero_bytes(), 2 * PAGE);
}

#[test]
fn a_file_cut_anywhere_in_its_footer_is_refused() {
    with_footer().for_each(cut_anywhere_in_the_footer);
}

fn cut_anywhere_in_the_footer(layout: Layout) {
    let bytes = sealed(&diff(layout));
    let data = diff(layout).data_end() as usize;
    for len in data..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "cut to {len}");
    }
    // Appended bytes are refused as well.
    let longer = [&bytes[..], &[0]].concat();
    assert!(read(&longer).is_err());
}

#[rstest]
#[case::in_place(Layout::Sealed)]
#[case::packed(Layout::Packed)]
fn every_flipped_bit_of_a_footer_is_detected(#[case] layout: Layout) {
    let mut bytes = sealed(&diff(layout));
    for at in diff(layout).data_end() as usize..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert!(read(&bytes).is_err(), "bit {bit} of byte {at}");
            bytes[at] ^= 1 << bit;
        }
    }
    assert!(read(&bytes).is_ok());
}

/// The offsets of the numbers in the footer.
const NUMBERS: [usize; 6] = [48, 56, 64, 72, 80, 88];

#[rstest]
fn extreme_numbers_with_a_valid_checksum_are_refused(
    #[values(0, 1, 7, 1 << 20, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX)] extreme: u64,
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let footer = diff(layout);
    let start = footer.data_end() as usize;
    for at in NUMBERS.map(|at| start + at) {
        let mut bytes = sealed(&footer);
        if bytes[at..at + 8] == extreme.to_le_bytes() {
            continue;
        }
        bytes[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
        let bytes = resealed(bytes);
        assert!(read(&bytes).is_err(), "{extreme} at {at}");
    }
    // The numbers of regions and runs.
    for field in 0..(2 * 2 + 4 * 3) {
        let at = start + 96 + 8 * field;
        let mut bytes = sealed(&footer);
        let current = u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        // A region may start at any address.
        if current == extreme || field < 4 && field % 2 == 0 {
            continue;
        }
        bytes[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
        let found = read(&resealed(bytes));
        let allowed = found
            .as_ref()
            .is_ok_and(|read| field >= 4 && read.runs != footer.runs && read.check().is_ok());
        assert!(
            allowed || found.is_err(),
            "{extreme} in field {field}: {found:?}"
        );
    }
}

#[test]
fn a_file_of_one_large_hole_is_refused_at_its_first_run() {
    let mut footer = diff(Layout::Packed);
    footer.version = Version::V1;
    footer.runs.clear();
    footer.checksums.clear();
    let mut bytes = sealed(&footer);
    // Claims millions of runs, whose bytes are zeros in a hole.
    let runs = 40_000_000_u64;
    bytes[72..80].copy_from_slice(&runs.to_le_bytes());
    let body = u64::from_le_bytes(*bytes[bytes.len() - 24..].first_chunk().unwrap()) + 24 * runs;
    let trailer = bytes.len() - 64;
    bytes[trailer + 40..trailer + 48].copy_from_slice(&body.to_le_bytes());
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes[..trailer], 0).unwrap();
    file.write_all_at(&bytes[trailer..], body).unwrap();
    let Err(FooterError::Damaged { source, .. }) = Footer::read(&file) else {
        panic!("it is refused");
    };
    assert_eq!(source, Some(InvalidFooter::Run { index: 0 }));
}

#[rstest]
#[case::empty(&[])]
#[case::short(b"memsnap\xff")]
#[case::raw(&[7; 8192])]
fn a_file_without_footer_is_not_sealed(#[case] bytes: &[u8]) {
    assert!(matches!(read(bytes), Err(FooterError::NotSealed)));
}

#[test]
fn an_unknown_version_is_reported() {
    let mut bytes = sealed(&diff(Layout::Sealed));
    let at = bytes.len() - 16;
    bytes[at..at + 4].copy_from_slice(&3_u32.to_le_bytes());
    assert!(matches!(
        read(&bytes),
        Err(FooterError::Version { version: 3 })
    ));
}

/// Returns a footer with clean (0), zero (1) and present (2) pages.
fn any_footer() -> impl Strategy<Value = Footer> {
    let pages = prop::collection::vec(0..3_u8, 1..700);
    (
        pages,
        any::<bool>(),
        any::<bool>(),
        prop::collection::vec(any::<u8>(), 0..100),
    )
        .prop_map(|(mut pages, packed, full, metadata)| {
            if full {
                pages.iter_mut().for_each(|page| *page = (*page).max(1));
            }
            let ram_size = pages.len() as u64 * PAGE;
            let mut checksums = Checksums::new(ram_size);
            let mut runs = Vec::<Run>::new();
            let mut stored = packed_start(PAGE);
            for (page, what) in pages.iter().enumerate() {
                let range = page as u64 * PAGE..(page as u64 + 1) * PAGE;
                match what {
                    0 => {}
                    1 => runs.push(Run::zeros(range)),
                    _ => {
                        checksums.update(range.start, &[page as u8; PAGE as usize]);
                        let at = if packed { stored } else { range.start };
                        runs.push(Run::present(range, at));
                        stored += PAGE;
                    }
                }
            }
            Footer {
                version: Version::CURRENT,
                id: ImageId::from_bytes([3; 16]),
                kind: match full {
                    true => ImageKind::Full,
                    false => ImageKind::Diff { parent: None },
                },
                layout: match packed {
                    true => Layout::Packed,
                    false => Layout::Sealed,
                },
                ram_size,
                page_size: PAGE,
                regions: vec![0..ram_size],
                runs,
                checksums: checksums.finish(),
                metadata,
            }
        })
}

proptest! {
    #[test]
    fn any_footer_is_read_back_with_all_present_pages(footer in any_footer()) {
        prop_assert_eq!(&read(&sealed(&footer)).unwrap(), &footer);
        let pieces = footer.chunks().flat_map(|chunk| chunk.pieces().collect::<Vec<_>>());
        let mut pieces: Vec<_> = pieces.collect();
        // Each page is a separate run here, and no page spans two chunks.
        let present: Vec<_> = footer
            .runs
            .iter()
            .filter_map(|run| Some((run.range(), run.stored_at(run.start)?)))
            .collect();
        prop_assert_eq!(&pieces, &present);
        pieces.dedup();
        prop_assert_eq!(pieces.len(), present.len());
    }

    #[test]
    fn any_bytes_before_a_trailer_are_refused_or_valid(
        mut bytes in prop::collection::vec(any::<u8>(), 200..2000),
        start in 0..120_usize,
        header in any::<bool>(),
    ) {
        let end = bytes.len() - 64;
        if header {
            bytes[start..start + 12].copy_from_slice(b"memsnap\0\x01\0\0\0");
            bytes[start + 12..start + 16].copy_from_slice(&[1, 1, 1, 0]);
        }
        bytes[end + 32..end + 40].copy_from_slice(&(start as u64).to_le_bytes());
        bytes[end + 40..end + 48].copy_from_slice(&((end - start) as u64).to_le_bytes());
        bytes[end + 48..end + 56].copy_from_slice(&[1, 0, 0, 0, 0, 0, 0, 0]);
        bytes[end + 56..].copy_from_slice(b"memsnap\xff");
        if let Ok(footer) = read(&resealed(bytes)) {
            prop_assert_eq!(footer.check(), Ok(()));
        }
    }
}
