//! Recognition of images: it does not depend on bytes that a guest can write, and detects files
//! that were cut off.

mod support;

use std::os::unix::fs::FileExt;

use image_format::{
    Checksums, Footer, FooterError, ImageId, ImageKind, Layout, RAW_UNIT, Run, Version,
    packed_start,
};
use proptest::prelude::*;
use rstest::rstest;
use support::{read_as as parse, read_at};

/// The smallest page size, for as many cuts at page boundaries as possible.
const PAGE: u64 = 512;

/// Returns a full image of `ram`, with every page in the file.
fn image(version: Version, layout: Layout, ram: &[u8], metadata: usize) -> Vec<u8> {
    let ram_size = ram.len() as u64;
    let at = match (version, layout) {
        (Version::V2, Layout::Packed) => packed_start(PAGE),
        _ => 0,
    };
    let mut checksums = Checksums::new(ram_size);
    checksums.update(0, ram);
    let footer = Footer {
        version,
        id: ImageId::from_bytes([7; 16]),
        kind: ImageKind::Full,
        layout,
        ram_size,
        page_size: PAGE,
        regions: vec![0..ram_size],
        runs: vec![Run::present(0..ram_size, at)],
        checksums: checksums.finish(),
        metadata: vec![1; metadata],
    };
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(ram, at).unwrap();
    let len = footer.write(&file).unwrap();
    let mut bytes = vec![0; len as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Reads a footer. Without a format, its id is also read alone.
fn read_as(bytes: &[u8], format: Option<Layout>) -> Result<Footer, FooterError> {
    let footer = parse(bytes, format);
    if format.is_none() {
        let id = Footer::read_id_from(bytes.len() as u64, |buf, at| read_at(bytes, buf, at));
        match (&footer, id) {
            (Ok(footer), id) => assert_eq!(id.unwrap(), footer.id),
            (Err(FooterError::Damaged { .. }), _) | (Err(_), Err(_)) => {}
            (Err(error), Ok(id)) => panic!("{error:?}, but its id is {id}"),
        }
    }
    footer
}

fn read(bytes: &[u8]) -> Result<Footer, FooterError> {
    read_as(bytes, None)
}

/// Returns an image of version 1 with metadata of such a length that raw RAM can have the length of
/// the file.
fn aligned(layout: Layout, ram: &[u8]) -> Vec<u8> {
    let images = (0..RAW_UNIT as usize).map(|len| image(Version::V1, layout, ram, len));
    let mut aligned = images.filter(|bytes| (bytes.len() as u64).is_multiple_of(RAW_UNIT));
    aligned.next().unwrap()
}

#[rstest]
fn no_image_has_a_length_of_raw_ram(#[values(Layout::Sealed, Layout::Packed)] layout: Layout) {
    let mut padded = 0;
    for metadata in 0..2 * RAW_UNIT as usize {
        let bytes = image(Version::V2, layout, &[3; 1024], metadata);
        assert_ne!(bytes.len() as u64 % RAW_UNIT, 0, "{metadata}");
        let footer = read(&bytes).unwrap();
        assert_eq!(footer.metadata.len(), metadata);
        assert_eq!(footer.file_len(), bytes.len() as u64);
        let unpadded = image(Version::V1, layout, &[3; 1024], metadata).len() as u64;
        padded += footer.file_len() - footer.data_start() - unpadded;
    }
    assert_eq!(padded, 2 * 8);
}

#[test]
fn a_packed_image_cut_anywhere_is_reported_as_truncated() {
    let bytes = image(Version::V2, Layout::Packed, &[3; 8192], 100);
    for cut in 8..bytes.len() {
        for format in [None, Some(Layout::Packed)] {
            let error = read_as(&bytes[..cut], format).unwrap_err();
            let whole = (cut >= 4096).then_some(bytes.len() as u64);
            assert!(
                matches!(
                    error,
                    FooterError::Truncated { claimed, actual }
                        if claimed == whole && actual == cut as u64
                ),
                "{cut}: {error:?}"
            );
        }
    }
}

/// The rest of the footer is not read.
#[rstest]
fn id_of_an_image_with_a_damaged_footer_is_read(
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    let mut bytes = image(Version::V2, layout, &[3; 8192], 1 << 20);
    let end = bytes.len() - 64;
    bytes[end - 1000] ^= 1;
    assert!(matches!(
        parse(&bytes, None),
        Err(FooterError::Damaged { .. })
    ));
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&bytes, 0).unwrap();
    let id = Footer::read_id(&file).unwrap();
    assert_eq!(id, ImageId::from_bytes([7; 16]));
}

#[test]
fn bytes_appended_to_a_packed_image_are_reported() {
    let mut bytes = image(Version::V2, Layout::Packed, &[3; 8192], 100);
    let claimed_len = bytes.len() as u64;
    bytes.push(0);
    let error = read(&bytes).unwrap_err();
    assert!(
        matches!(
            error,
            FooterError::Trailing { claimed, actual }
                if claimed == claimed_len && actual == claimed + 1
        ),
        "{error:?}"
    );
}

#[test]
fn every_flipped_bit_of_a_header_is_detected() {
    let mut bytes = image(Version::V2, Layout::Packed, &[3; 8192], 100);
    for bit in 0..8 * 4096 {
        bytes[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bytes).is_err(), "bit {bit}");
        bytes[bit / 8] ^= 1 << (bit % 8);
    }
    assert!(read(&bytes).is_ok());
}

#[test]
fn the_header_of_another_image_is_refused() {
    let mut bytes = image(Version::V2, Layout::Packed, &[3; 8192], 100);
    let other = image(Version::V2, Layout::Packed, &[3; 8192 - 512], 101);
    bytes[..4096].copy_from_slice(&other[..4096]);
    assert!(read(&bytes).is_err());
}

#[rstest]
fn raw_ram_that_ends_like_an_image_is_refused(
    #[values(Version::V1, Version::V2)] version: Version,
    #[values(Layout::Sealed, Layout::Packed)] layout: Layout,
) {
    // A complete image at the end of the RAM.
    let image = image(version, layout, &[3; 2048], 0);
    for before in [0, 512, 4096] {
        let len = (before + image.len()).next_multiple_of(512);
        let mut ram = vec![0; len - image.len()];
        ram.extend(&image);
        assert!(read(&ram).is_err());
    }
    // An image of version 1 that is also valid raw RAM.
    let whole = aligned(layout, &[3; 2048]);
    let error = read(&whole).unwrap_err();
    assert!(matches!(error, FooterError::Ambiguous { len } if len == whole.len() as u64));
}

#[rstest]
#[case::in_place(Layout::Sealed, Layout::Packed)]
#[case::packed(Layout::Packed, Layout::Sealed)]
fn an_ambiguous_image_opens_if_its_format_is_named(#[case] layout: Layout, #[case] other: Layout) {
    let bytes = aligned(layout, &[3; 2048]);
    let footer = read_as(&bytes, Some(layout)).unwrap();
    assert_eq!((footer.version, footer.layout), (Version::V1, layout));
    let error = read_as(&bytes, Some(other)).unwrap_err();
    assert!(matches!(error, FooterError::OtherLayout { found } if found == layout));
}

#[rstest]
fn a_magic_number_at_the_end_of_ram_is_ambiguous(#[values(0, 1, 2, 3, u32::MAX)] version: u32) {
    let mut ram = vec![9; 8192];
    ram[8192 - 8..].copy_from_slice(b"memsnap\xff");
    ram[8192 - 16..8192 - 12].copy_from_slice(&version.to_le_bytes());
    assert!(matches!(
        read(&ram),
        Err(FooterError::Ambiguous { len: 8192 })
    ));
}

#[test]
fn a_header_in_the_ram_of_a_sealed_image_is_ignored() {
    let forged = image(Version::V2, Layout::Packed, &[5; 4096], 0);
    let sealed = image(Version::V2, Layout::Sealed, &forged[..8192], 30);
    assert_eq!(read(&sealed).unwrap().layout, Layout::Sealed);
    assert_eq!(read(&sealed).unwrap().ram_size, 8192);
}

#[test]
fn a_sealed_image_in_the_ram_of_a_packed_one_is_ignored() {
    let inner = image(Version::V2, Layout::Sealed, &[5; 1024], 0);
    let mut ram = vec![0; 4096 - inner.len()];
    ram.extend(&inner);
    let packed = image(Version::V2, Layout::Packed, &ram, 30);
    assert_eq!(read(&packed).unwrap().layout, Layout::Packed);
    // Cut after the inner image.
    assert!(read(&packed[..8192]).is_err());
}

/// A sealed image of the RAM `ram` as a guest can plant it: with an id and a header page of its
/// own.
fn planted_footer(version: Version, ram: &[u8], runs: Vec<Run>) -> Vec<u8> {
    let ram_size = ram.len() as u64;
    let mut checksums = Checksums::new(ram_size);
    for run in &runs {
        if let Some(at) = run.stored_at(run.start) {
            let end = at + (run.range().end - run.start);
            checksums.update(at, &ram[at as usize..end as usize]);
        }
    }
    let footer = Footer {
        version,
        id: ImageId::from_bytes([8; 16]),
        kind: ImageKind::Full,
        layout: Layout::Sealed,
        ram_size,
        page_size: if version == Version::V1 { 8 } else { PAGE },
        regions: vec![0..ram_size],
        runs,
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    let file = tempfile::tempfile().unwrap();
    let len = footer.write(&file).unwrap();
    let mut bytes = vec![0; (len - ram_size) as usize];
    file.read_exact_at(&mut bytes, ram_size).unwrap();
    bytes
}

/// The guest knows all of its RAM, where the footer will be in the file, and not the id.
#[rstest]
#[case::all_present(Version::V2, vec![Run::present(0..8192, 0)])]
#[case::header_is_zeros(Version::V2, vec![Run::zeros(0..4096), Run::present(4096..8192, 4096)])]
#[case::id_is_zeros(Version::V1, vec![Run::present(0..8, 0), Run::zeros(8..4096), Run::present(4096..8192, 4096)])]
#[case::nothing_present(Version::V2, vec![Run::zeros(0..8192)])]
fn a_packed_image_cut_at_a_planted_footer_is_reported(
    #[case] version: Version,
    #[case] runs: Vec<Run>,
    #[values(None, Some(Layout::Sealed), Some(Layout::Packed))] format: Option<Layout>,
) {
    let guess = image(Version::V2, Layout::Packed, &[5; 4096], 0);
    let planted = planted_footer(version, &guess[..8192], runs);
    let mut ram = vec![5; 4096];
    ram.extend(&planted);
    ram.resize(ram.len().next_multiple_of(512) + 512, 5);
    let mut packed = image(Version::V2, Layout::Packed, &ram, 30);
    let cut = 8192 + planted.len();
    assert_eq!(packed[8192..cut], planted);
    assert_ne!(cut % 512, 0);
    let whole = packed.len() as u64;
    packed.truncate(cut);
    let error = read_as(&packed, format).unwrap_err();
    assert!(
        matches!(error, FooterError::Truncated { claimed: Some(claimed), actual } if claimed == whole && actual == cut as u64),
        "{error:?}"
    );
}

/// The length in the planted header is shorter than, equal to, or longer than the sealed image.
#[test]
fn a_sealed_image_of_ram_with_a_planted_header_is_opened() {
    for forged in [1024, 4096, 1 << 20] {
        let forged = image(Version::V2, Layout::Packed, &vec![5; forged], 0);
        for (ram, metadata) in [(8192, 30), (4096, 0), (4096, 1000)] {
            let mut ram_bytes = forged[..ram.min(forged.len() / 512 * 512)].to_vec();
            ram_bytes.resize(ram, 3);
            let sealed = image(Version::V2, Layout::Sealed, &ram_bytes, metadata);
            for format in [None, Some(Layout::Sealed)] {
                let footer = read_as(&sealed, format).unwrap();
                assert_eq!(footer.ram_size, ram as u64);
            }
            assert!(read_as(&sealed, Some(Layout::Packed)).is_err());
            // Pages of zeros inside the planted header are not in the file.
            let zeros = vec![
                Run::present(0..512, 0),
                Run::zeros(512..3584),
                Run::present(3584..ram as u64, 3584),
            ];
            let mut sealed = ram_bytes.clone();
            sealed.extend(planted_footer(Version::V2, &ram_bytes, zeros));
            assert_eq!(read(&sealed).unwrap().layout, Layout::Sealed);
        }
    }
}

#[test]
fn the_header_is_as_long_as_a_large_page() {
    let page = 64 << 10;
    let file = tempfile::tempfile().unwrap();
    file.write_all_at(&vec![4; page as usize], page).unwrap();
    let mut checksums = Checksums::new(2 * page);
    checksums.update(page, &vec![4; page as usize]);
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::from_bytes([7; 16]),
        kind: ImageKind::Diff { parent: None },
        layout: Layout::Packed,
        ram_size: 2 * page,
        page_size: page,
        regions: vec![0..2 * page],
        runs: vec![Run::present(page..2 * page, page)],
        checksums: checksums.finish(),
        metadata: Vec::new(),
    };
    footer.write(&file).unwrap();
    assert_eq!(Footer::read(&file).unwrap(), footer);
}

/// Returns RAM of whole pages with arbitrary bytes, or with an image in it.
fn any_ram() -> impl Strategy<Value = Vec<u8>> {
    let bytes = (1..20_usize, any::<u64>()).prop_map(|(pages, seed)| {
        let mut random = seed;
        let mut next = || {
            random = random.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            (random >> 56) as u8
        };
        (0..pages * PAGE as usize).map(|_| next()).collect()
    });
    let forged = (
        any::<bool>(),
        any::<bool>(),
        1..10_usize,
        0..600_usize,
        0..3_usize,
    )
        .prop_map(|(old, packed, pages, metadata, before)| {
            let version = if old { Version::V1 } else { Version::V2 };
            let layout = match packed {
                true => Layout::Packed,
                false => Layout::Sealed,
            };
            let image = image(version, layout, &vec![6; pages * 512], metadata);
            let mut ram = vec![0; before * 512];
            ram.extend(image);
            // The image is at the end of the RAM.
            let gap = ram.len().next_multiple_of(512) - ram.len();
            ram.splice(..0, vec![0; gap]);
            ram
        });
    prop_oneof![bytes, forged]
}

proptest! {
    #[test]
    fn raw_ram_with_any_contents_is_refused(ram in any_ram()) {
        prop_assert!(read(&ram).is_err());
        let packed = read_as(&ram, Some(Layout::Packed));
        prop_assert!(packed.is_err() || ram.ends_with(b"memsnap\xff"));
    }

    #[test]
    fn an_image_cut_at_any_page_boundary_is_refused(
        ram in any_ram(),
        packed in any::<bool>(),
        metadata in 0..600_usize,
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Sealed };
        let bytes = image(Version::V2, layout, &ram, metadata);
        let footer = read(&bytes).unwrap();
        prop_assert_eq!((footer.layout, footer.ram_size), (layout, ram.len() as u64));
        for cut in (0..bytes.len()).step_by(512) {
            prop_assert!(read(&bytes[..cut]).is_err(), "cut to {}", cut);
        }
    }

    #[test]
    fn an_image_cut_at_any_length_is_refused(
        seed in any::<u8>(),
        pages in 1..8_usize,
        packed in any::<bool>(),
        metadata in 0..600_usize,
    ) {
        let layout = if packed { Layout::Packed } else { Layout::Sealed };
        let bytes = image(Version::V2, layout, &vec![seed; pages * 512], metadata);
        for cut in 0..bytes.len() {
            prop_assert!(read(&bytes[..cut]).is_err(), "cut to {}", cut);
        }
    }
}
