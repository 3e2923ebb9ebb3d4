//! Writing: inconsistent footers and unsuitable files are refused.

mod support;

use std::fs::File;
use std::os::unix::fs::FileExt;

use image_format::{
    CHUNK_SIZE, Footer, FooterError, ImageKind, InvalidFooter, Layout, MAX_RAM_SIZE, Run, Storage,
};
use rstest::rstest;
use support::{PAGE, RAM, diff, read, sealed};

#[test]
fn a_file_open_for_appending_is_refused_unchanged() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().write_all_at(&[7; 100], 0).unwrap();
    let appending = File::options().append(true).open(file.path()).unwrap();
    let error = diff(Layout::Packed).write(&appending).unwrap_err();
    assert!(matches!(error, FooterError::Append), "{error}");
    assert_eq!(std::fs::read(file.path()).unwrap(), [7; 100]);
}

/// InvalidFooter changes, each made to a valid footer.
#[rstest]
#[case::overlapping(|f: &mut Footer| f.runs[1].start -= 2 * PAGE, InvalidFooter::Order { index: 1 })]
#[case::unsorted(|f: &mut Footer| f.runs.swap(0, 1), InvalidFooter::Order { index: 1 })]
#[case::beyond_the_ram(|f: &mut Footer| f.runs[3].len += PAGE, InvalidFooter::Run { index: 3 })]
#[case::around_the_address_space(
    |f: &mut Footer| f.runs[3].len = u64::MAX - PAGE + 1,
    InvalidFooter::Run { index: 3 }
)]
#[case::empty(|f: &mut Footer| f.runs[0].len = 0, InvalidFooter::Run { index: 0 })]
#[case::part_of_a_page(|f: &mut Footer| f.runs[0].len -= 1, InvalidFooter::Run { index: 0 })]
#[case::misaligned_file_offset(
    |f: &mut Footer| f.runs[0].stored = Storage::At(100),
    InvalidFooter::StoredAt { index: 0, offset: 100 }
)]
#[case::stored_twice(
    |f: &mut Footer| f.runs[2].stored = Storage::At(PAGE),
    InvalidFooter::Packing { expected: 3 * PAGE, offset: PAGE }
)]
#[case::in_the_header(
    |f: &mut Footer| f.runs[0].stored = Storage::At(0),
    InvalidFooter::StoredAt { index: 0, offset: 0 }
)]
#[case::too_much_ram(
    |f: &mut Footer| f.ram_size = MAX_RAM_SIZE + PAGE,
    InvalidFooter::Sizes { ram_size: MAX_RAM_SIZE + PAGE, page_size: PAGE }
)]
#[case::too_small_a_page(
    |f: &mut Footer| f.page_size = 256,
    InvalidFooter::Sizes { ram_size: RAM, page_size: 256 }
)]
#[case::a_gap(
    |f: &mut Footer| f.runs[3].stored = Storage::At(64 * PAGE),
    InvalidFooter::Packing { expected: 5 * PAGE, offset: 64 * PAGE }
)]
#[case::one_checksum_too_many(
    |f: &mut Footer| f.checksums.push([0; 32]),
    InvalidFooter::Checksums { checksums: 4, chunks: 3 }
)]
#[case::one_checksum_too_few(
    |f: &mut Footer| f.checksums.truncate(2),
    InvalidFooter::Checksums { checksums: 2, chunks: 3 }
)]
#[case::full_with_gaps(|f: &mut Footer| f.kind = ImageKind::Full, InvalidFooter::Order { index: 0 })]
#[case::own_parent(
    |f: &mut Footer| f.kind = ImageKind::Diff { parent: Some(f.id) },
    InvalidFooter::OwnParent
)]
#[case::no_ram(|f: &mut Footer| f.ram_size = 0, InvalidFooter::Sizes { ram_size: 0, page_size: PAGE })]
#[case::odd_page_size(
    |f: &mut Footer| f.page_size = 3000,
    InvalidFooter::Sizes { ram_size: RAM, page_size: 3000 }
)]
#[case::regions_too_small(
    |f: &mut Footer| f.regions.truncate(1),
    InvalidFooter::RegionsSum { sum: CHUNK_SIZE, ram_size: RAM }
)]
#[case::regions_overlapping(|f: &mut Footer| f.regions[1].start = 0, InvalidFooter::Region { index: 1 })]
#[case::too_much_metadata(
    |f: &mut Footer| f.metadata = vec![0; Footer::MAX_METADATA + 1],
    InvalidFooter::Metadata { len: Footer::MAX_METADATA as u64 + 1 }
)]
fn an_inconsistent_footer_is_not_written(
    #[case] corrupt: fn(&mut Footer),
    #[case] expected: InvalidFooter,
) {
    let mut footer = diff(Layout::Packed);
    footer.check().expect("a valid footer");
    corrupt(&mut footer);
    assert_eq!(footer.check(), Err(expected));
    let file = tempfile::tempfile().unwrap();
    let error = footer.write(&file).expect_err("it is refused");
    assert!(matches!(error, FooterError::Invalid(invalid) if invalid == expected));
    assert_eq!(file.metadata().unwrap().len(), 0);
}

#[test]
fn a_full_image_covers_every_page() {
    let mut footer = diff(Layout::Packed);
    footer.kind = ImageKind::Full;
    footer.runs = vec![Run::zeros(0..RAM)];
    footer.checksums.clear();
    assert_eq!(read(&sealed(&footer)).unwrap(), footer);
    footer.runs = vec![Run::zeros(0..RAM - PAGE)];
    let offset = RAM - PAGE;
    assert_eq!(footer.check(), Err(InvalidFooter::NotFull { offset }));
}

/// A stream gets the bytes of the file: the header, the pages and the footer.
#[rstest]
fn a_stream_has_the_bytes_of_a_file(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
    #[values(0, 5, 400)] metadata: usize,
) {
    let mut footer = diff(layout);
    // Some lengths need padding.
    footer.metadata = vec![3; metadata];
    let expected = sealed(&footer);
    let (runs, sums) = (footer.runs.len() as u64, footer.checksums.len() as u64);
    let mut stream = footer
        .planned_header(runs, sums, footer.present_bytes())
        .unwrap();
    assert_eq!(stream.len() as u64, footer.data_start());
    stream.resize(footer.data_end() as usize, 0);
    let len = footer.write_to(&mut stream).unwrap();
    assert_eq!(len, footer.file_len() - footer.data_end());
    assert!(stream == expected);
}

#[test]
fn an_inconsistent_footer_is_not_written_to_a_stream() {
    let mut footer = diff(Layout::Packed);
    footer.checksums.clear();
    let mut stream = Vec::new();
    let error = footer.write_to(&mut stream).unwrap_err();
    assert!(matches!(error, FooterError::Invalid(_)), "{error:?}");
    assert!(stream.is_empty());
}
