//! What is written is read back; what is not right is refused, whatever it says.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use image_format::{
    CHUNK_SIZE, Checksums, Footer, FooterError, ImageId, Invalid, Kind, MAX_RAM_SIZE, Placement,
    Run, Stored, Version, packed_start,
};
use proptest::prelude::*;
use rstest::rstest;
use support::read_as;

const PAGE: u64 = 4096;
const RAM: u64 = 2 * CHUNK_SIZE + 4 * PAGE;

/// A diff of four runs, reaching into all chunks.
fn diff(placement: Placement) -> Footer {
    let present = [
        PAGE..3 * PAGE,
        CHUNK_SIZE - PAGE..CHUNK_SIZE + PAGE,
        2 * CHUNK_SIZE..RAM,
    ];
    let mut packed = packed_start(PAGE);
    let mut runs = vec![];
    let mut checksums = Checksums::new(RAM);
    for range in present {
        let at = match placement {
            Placement::InPlace => range.start,
            Placement::Packed => packed,
        };
        packed += range.end - range.start;
        checksums.feed(range.start, &vec![9; (range.end - range.start) as usize]);
        runs.push(Run::present(range, at));
    }
    runs.insert(1, Run::zeros(4 * PAGE..6 * PAGE));
    Footer {
        version: Version::CURRENT,
        id: ImageId::from_bytes([1; 16]),
        kind: Kind::Diff {
            parent: Some(ImageId::from_bytes([2; 16])),
        },
        placement,
        ram_size: RAM,
        page_size: PAGE,
        regions: vec![0..CHUNK_SIZE, 1 << 32..(1 << 32) + RAM - CHUNK_SIZE],
        runs,
        checksums: checksums.finish(),
        metadata: b"state".to_vec(),
    }
}

#[test]
fn a_file_open_for_appending_is_refused_and_left_as_it_is() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[7; 100], 0).unwrap();
    let appending = File::options().append(true).open(file.path()).unwrap();
    let error = diff(Placement::Packed).write(&appending).unwrap_err();
    assert!(matches!(error, FooterError::Append), "{error}");
    assert_eq!(std::fs::read(file.path()).unwrap(), [7; 100]);
}

/// The bytes of a file that ends in `footer`, its pages all zeros.
fn sealed(footer: &Footer) -> Vec<u8> {
    let file = tempfile::tempfile().unwrap();
    let len = footer.write(&file).expect("a footer that fits");
    assert_eq!(file.metadata().unwrap().len(), len);
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn read(bytes: &[u8]) -> Result<Footer, FooterError> {
    read_as(bytes, None)
}

/// `bytes` with the checksum of the footer made right again, as someone would who means harm.
fn resealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 64;
    let start = u64::from_le_bytes(*bytes[end + 32..].first_chunk().unwrap()) as usize;
    let sum = blake3_of(&bytes[start..end]);
    bytes[end..end + 32].copy_from_slice(&sum);
    bytes
}

fn blake3_of(bytes: &[u8]) -> [u8; 32] {
    // What one chunk is summed to is the hash of its bytes, and a footer of these tests is shorter than one.
    let mut sums = Checksums::new(CHUNK_SIZE);
    sums.feed(0, bytes);
    sums.finish()[0]
}

#[rstest]
#[case::in_place(Placement::InPlace)]
#[case::packed(Placement::Packed)]
fn a_footer_comes_back_as_it_was_written(#[case] placement: Placement) {
    let footer = diff(placement);
    let bytes = sealed(&footer);
    assert_eq!(read(&bytes).unwrap(), footer);
    let chunks: Vec<_> = footer.chunks().collect();
    assert_eq!(chunks.len(), 3);
    let second: Vec<_> = chunks[1].pieces().collect();
    let at = match placement {
        Placement::InPlace => CHUNK_SIZE,
        Placement::Packed => 4 * PAGE,
    };
    assert_eq!(second, [(CHUNK_SIZE..CHUNK_SIZE + PAGE, at)]);
    assert_eq!(footer.run_at(5 * PAGE).unwrap().stored, Stored::Zeros);
    assert_eq!(footer.run_at(3 * PAGE), None);
    assert_eq!(footer.zero_bytes(), 2 * PAGE);
}

#[rstest]
#[case::in_place(Placement::InPlace)]
#[case::packed(Placement::Packed)]
fn a_file_cut_anywhere_in_its_footer_is_not_sealed(#[case] placement: Placement) {
    let bytes = sealed(&diff(placement));
    let data = diff(placement).data_end() as usize;
    for len in data..bytes.len() {
        assert!(read(&bytes[..len]).is_err(), "cut to {len}");
    }
    // Nor one with bytes behind.
    let longer = [&bytes[..], &[0]].concat();
    assert!(read(&longer).is_err());
}

#[rstest]
#[case::in_place(Placement::InPlace)]
#[case::packed(Placement::Packed)]
fn every_flipped_bit_of_a_footer_is_noticed(#[case] placement: Placement) {
    let mut bytes = sealed(&diff(placement));
    for at in diff(placement).data_end() as usize..bytes.len() {
        for bit in 0..8 {
            bytes[at] ^= 1 << bit;
            assert!(read(&bytes).is_err(), "bit {bit} of byte {at}");
            bytes[at] ^= 1 << bit;
        }
    }
    assert!(read(&bytes).is_ok());
}

/// Where the numbers of the header are, from the footer's start on.
const NUMBERS: [usize; 6] = [48, 56, 64, 72, 80, 88];

#[rstest]
fn numbers_at_their_extremes_are_refused_though_the_checksum_is_right(
    #[values(0, 1, 7, 1 << 20, 1 << 40, i64::MAX as u64, 1 << 63, u64::MAX)] extreme: u64,
    #[values(Placement::InPlace, Placement::Packed)] placement: Placement,
) {
    let footer = diff(placement);
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
    // And those of regions and runs.
    for field in 0..(2 * 2 + 4 * 3) {
        let at = start + 96 + 8 * field;
        let mut bytes = sealed(&footer);
        let is = u64::from_le_bytes(*bytes[at..].first_chunk().unwrap());
        // Where a region starts is nobody's business but the guest's.
        if is == extreme || field < 4 && field % 2 == 0 {
            continue;
        }
        bytes[at..at + 8].copy_from_slice(&extreme.to_le_bytes());
        let found = read(&resealed(bytes));
        let allowed = matches!(&found, Ok(read) if field >= 4 && read.runs != footer.runs && read.check().is_ok());
        assert!(
            allowed || found.is_err(),
            "{extreme} in field {field}: {found:?}"
        );
    }
}

/// Changes that make no sense, each made to a footer that does.
#[rstest]
#[case::overlapping(|f: &mut Footer| f.runs[1].start -= 2 * PAGE, Invalid::Order { index: 1 })]
#[case::unsorted(|f: &mut Footer| f.runs.swap(0, 1), Invalid::Order { index: 1 })]
#[case::beyond_the_ram(|f: &mut Footer| f.runs[3].len += PAGE, Invalid::Run { index: 3 })]
#[case::around_the_address_space(|f: &mut Footer| f.runs[3].len = u64::MAX - PAGE + 1, Invalid::Run { index: 3 })]
#[case::empty(|f: &mut Footer| f.runs[0].len = 0, Invalid::Run { index: 0 })]
#[case::part_of_a_page(|f: &mut Footer| f.runs[0].len -= 1, Invalid::Run { index: 0 })]
#[case::stored_out_of_line(|f: &mut Footer| f.runs[0].stored = Stored::At(100), Invalid::StoredAt { index: 0, offset: 100 })]
#[case::stored_twice(|f: &mut Footer| f.runs[2].stored = Stored::At(PAGE), Invalid::Packing { expected: 3 * PAGE, offset: PAGE })]
#[case::in_the_header(|f: &mut Footer| f.runs[0].stored = Stored::At(0), Invalid::StoredAt { index: 0, offset: 0 })]
#[case::more_than_any_machine_has(|f: &mut Footer| f.ram_size = MAX_RAM_SIZE + PAGE, Invalid::Sizes { ram_size: MAX_RAM_SIZE + PAGE, page_size: PAGE })]
#[case::too_small_a_page(|f: &mut Footer| f.page_size = 256, Invalid::Sizes { ram_size: RAM, page_size: 256 })]
#[case::a_gap(|f: &mut Footer| f.runs[3].stored = Stored::At(64 * PAGE), Invalid::Packing { expected: 5 * PAGE, offset: 64 * PAGE })]
#[case::a_sum_too_many(|f: &mut Footer| f.checksums.push([0; 32]), Invalid::Checksums { checksums: 4, chunks: 3 })]
#[case::a_sum_too_few(|f: &mut Footer| f.checksums.truncate(2), Invalid::Checksums { checksums: 2, chunks: 3 })]
#[case::full_with_gaps(|f: &mut Footer| f.kind = Kind::Full, Invalid::Order { index: 0 })]
#[case::no_ram(|f: &mut Footer| f.ram_size = 0, Invalid::Sizes { ram_size: 0, page_size: PAGE })]
#[case::a_crooked_page(|f: &mut Footer| f.page_size = 3000, Invalid::Sizes { ram_size: RAM, page_size: 3000 })]
#[case::regions_too_small(|f: &mut Footer| f.regions.truncate(1), Invalid::RegionsSum { sum: CHUNK_SIZE, ram_size: RAM })]
#[case::regions_overlapping(|f: &mut Footer| f.regions[1].start = 0, Invalid::Region { index: 1 })]
#[case::too_much_metadata(|f: &mut Footer| f.metadata = vec![0; Footer::MAX_METADATA + 1], Invalid::Metadata { len: Footer::MAX_METADATA as u64 + 1 })]
fn a_footer_that_contradicts_itself_is_not_written(
    #[case] spoil: fn(&mut Footer),
    #[case] why: Invalid,
) {
    let mut footer = diff(Placement::Packed);
    footer.check().expect("a footer that fits");
    spoil(&mut footer);
    assert_eq!(footer.check(), Err(why));
    let file = tempfile::tempfile().unwrap();
    let error = footer.write(&file).expect_err("it is refused");
    assert!(matches!(error, FooterError::Invalid(invalid) if invalid == why));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn a_full_image_says_what_becomes_of_every_page() {
    let mut footer = diff(Placement::Packed);
    footer.kind = Kind::Full;
    footer.runs = vec![Run::zeros(0..RAM)];
    footer.checksums.clear();
    assert_eq!(read(&sealed(&footer)).unwrap(), footer);
    footer.runs = vec![Run::zeros(0..RAM - PAGE)];
    let offset = RAM - PAGE;
    assert_eq!(footer.check(), Err(Invalid::NotFull { offset }));
}

#[test]
fn an_absurd_file_of_one_hole_takes_neither_time_nor_memory() {
    let mut footer = diff(Placement::Packed);
    footer.version = Version::V1;
    footer.runs.clear();
    footer.checksums.clear();
    let mut bytes = sealed(&footer);
    // It claims millions of runs, and the bytes for them are there: zeros.
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
    assert_eq!(source, Some(Invalid::Run { index: 0 }));
}

#[rstest]
#[case::empty(&[])]
#[case::short(b"memsnap\xff")]
#[case::raw(&[7; 8192])]
fn what_has_no_footer_is_not_sealed(#[case] bytes: &[u8]) {
    assert!(matches!(read(bytes), Err(FooterError::NotSealed)));
}

#[test]
fn a_later_version_is_named_and_not_guessed_at() {
    let mut bytes = sealed(&diff(Placement::InPlace));
    let at = bytes.len() - 16;
    bytes[at..at + 4].copy_from_slice(&3_u32.to_le_bytes());
    assert!(matches!(
        read(&bytes),
        Err(FooterError::Version { version: 3 })
    ));
}

/// Files of each version, made when it was new.
#[rstest]
fn files_of_all_versions_stay_readable(
    #[values("sealed", "packed", "full")] what: &str,
    #[values(Version::V1, Version::V2)] version: Version,
) {
    let number = if version == Version::V1 { 1 } else { 2 };
    let name = format!("{what}-v{number}.mem");
    let path = format!("{}/tests/files/{name}", env!("CARGO_MANIFEST_DIR"));
    let file = File::open(path).unwrap();
    let footer = Footer::read(&file).unwrap();
    assert_eq!(footer.version, version);
    assert_eq!(footer.ram_size, 64 * 1024);
    assert_eq!(
        footer.metadata,
        format!("made by version {number}").into_bytes()
    );
    for chunk in footer.chunks() {
        let mut sums = Checksums::new(footer.ram_size);
        for (range, at) in chunk.pieces() {
            let mut bytes = vec![0; (range.end - range.start) as usize];
            file.read_exact_at(&mut bytes, at).unwrap();
            // Every page is filled with its number, from 1 on.
            assert!(
                bytes
                    .chunks(4096)
                    .zip(range.start / 4096 + 1..)
                    .all(|(page, number)| page.iter().all(|byte| u64::from(*byte) == number))
            );
            sums.feed(range.start, &bytes);
        }
        assert_eq!(sums.finish(), [chunk.checksum]);
    }
    let (id, parent) = (ImageId::from_bytes([1; 16]), ImageId::from_bytes([2; 16]));
    if what == "full" {
        assert_eq!((footer.id, footer.kind), (parent, Kind::Full));
    } else {
        assert_eq!((footer.id, footer.parent()), (id, Some(parent)));
    }
}

#[rstest]
fn what_is_written_is_byte_for_byte_what_the_version_says(
    #[values("sealed", "packed", "full")] what: &str,
    #[values(1, 2)] version: u32,
) {
    let path = format!(
        "{}/tests/files/{what}-v{version}.mem",
        env!("CARGO_MANIFEST_DIR")
    );
    let bytes = std::fs::read(&path).unwrap();
    let footer = Footer::read(&File::open(&path).unwrap()).unwrap();
    let copy = tempfile::NamedTempFile::new().unwrap();
    let (start, end) = (footer.data_start() as usize, footer.data_end() as usize);
    copy.as_file()
        .write_all_at(&bytes[start..end], start as u64)
        .unwrap();
    footer.write(copy.as_file()).unwrap();
    assert!(std::fs::read(copy.path()).unwrap() == bytes);
}

/// Pages as letters: clean, zero or present.
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
                        checksums.feed(range.start, &[page as u8; PAGE as usize]);
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
                    true => Kind::Full,
                    false => Kind::Diff { parent: None },
                },
                placement: match packed {
                    true => Placement::Packed,
                    false => Placement::InPlace,
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
    fn any_footer_comes_back_and_its_chunks_have_every_present_page_once(footer in any_footer()) {
        prop_assert_eq!(&read(&sealed(&footer)).unwrap(), &footer);
        let mut pieces: Vec<_> = footer.chunks().flat_map(|chunk| chunk.pieces().collect::<Vec<_>>()).collect();
        // Each page is a run of its own here, and no page crosses a chunk.
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
    fn any_bytes_before_a_trailer_are_refused_or_fit(
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
