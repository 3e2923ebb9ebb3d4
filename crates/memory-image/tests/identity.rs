//! What a file is opened as: what the caller says, or what the library wrote, and never what a
//! guest wrote to its RAM.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use image_format::{Footer, Version};
use memory_image::{Chain, Damage, Image, OpenImageError, compare};
use memory_writer::{Durability, FooterError, Layout, MemoryWriter, Seal};
use page_reader::PageReader;
use proptest::prelude::*;
use rstest::rstest;

const PAGE: u64 = 512;

fn save(path: &Path, layout: Layout, seal: Seal, ram: &Vec<u8>, page: u64) {
    let options = MemoryWriter::options().layout(layout).seal(seal);
    let options = options.durability(Durability::None);
    let mut writer = options.open(path, ram.len() as u64, page).unwrap();
    writer.write_full(ram).unwrap();
    writer.commit().unwrap();
}

fn dir() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    (dir, path)
}

fn ram_of(image: &Path, page: u64) -> Vec<u8> {
    let chain = Chain::from_image(Image::open_raw(image).unwrap(), page).unwrap();
    let mut ram = vec![0xee; chain.ram_size() as usize];
    chain.read_at(0, &mut ram).unwrap();
    ram
}

#[rstest]
#[case::sealed(Layout::Sealed, 0)]
#[case::packed(Layout::Packed, 4096)]
fn an_image_cut_at_a_page_is_neither_opened_nor_taken_for_ram(
    #[case] layout: Layout,
    #[case] start: usize,
) {
    let (_dir, path) = dir();
    save(&path, layout, Seal::new(), &vec![5; 64 << 10], 4096);
    let bytes = fs::read(&path).unwrap();
    for pages in 1..=(start + (64 << 10)) / 4096 {
        fs::write(&path, &bytes[..pages * 4096]).unwrap();
        for format in [None, Some(Layout::Sealed), Some(Layout::Packed)] {
            let opened = match format {
                None => Image::open(&path),
                Some(format) => Image::open_as(&path, format),
            };
            let error = opened.unwrap_err();
            let OpenImageError::Footer { source, .. } = &error else {
                panic!("{error:?}");
            };
            let reported = match source {
                FooterError::Truncated { claimed, actual } => {
                    start > 0
                        && *claimed == Some(bytes.len() as u64)
                        && *actual == pages as u64 * 4096
                }
                FooterError::NotSealed => start == 0,
                _ => false,
            };
            assert!(reported, "{pages} pages: {error:?}");
        }
    }
}

#[test]
fn an_image_opens_as_its_own_format_alone() {
    Layout::ALL
        .into_iter()
        .for_each(opens_as_its_own_format_alone);
}

fn opens_as_its_own_format_alone(own: Layout) {
    let (_dir, path) = dir();
    save(&path, own, Seal::new(), &vec![5; 64 << 10], 4096);
    for format in Layout::ALL {
        let opened = Image::open_as(&path, format);
        assert_eq!(opened.is_ok(), format == own, "{opened:?}");
        if let Ok(image) = opened {
            assert_eq!((image.layout(), image.ram_size()), (own, 64 << 10));
        }
    }
    assert_eq!(Image::open(&path).is_ok(), own != Layout::Raw);
    assert_eq!(Image::open_raw(&path).is_ok(), own == Layout::Raw);
}

#[test]
fn image_of_version_1_as_long_as_raw_ram_opens_if_named() {
    let (_dir, path) = dir();
    save(&path, Layout::Sealed, Seal::new(), &vec![5; 64 << 10], 4096);
    let mut footer = Image::open(&path).unwrap().footer().cloned().unwrap();
    footer.version = Version::V1;
    let short = footer.file_len();
    footer.metadata = vec![0; (short.next_multiple_of(4096) - short) as usize];
    let file = fs::File::options().write(true).open(&path).unwrap();
    let len = footer.write(&file).unwrap();
    assert!(len.is_multiple_of(4096));
    let error = Image::open(&path).unwrap_err();
    assert!(
        matches!(&error, OpenImageError::Footer { source: FooterError::Ambiguous { len: of }, .. } if *of == len),
        "{error:?}"
    );
    assert_eq!(
        Image::open_as(&path, Layout::Sealed).unwrap().footer(),
        Some(&footer)
    );
}

#[test]
fn bytes_between_the_header_and_a_large_page_are_damage() {
    let (_dir, path) = dir();
    save(
        &path,
        Layout::Packed,
        Seal::new(),
        &vec![5; 256 << 10],
        64 << 10,
    );
    let mut on = |_| std::ops::ControlFlow::Continue(());
    assert!(Image::open(&path).unwrap().verify(&mut on).unwrap().is_ok());
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[1], 5000).unwrap();
    let found = Image::open(&path).unwrap().verify(&mut on).unwrap();
    assert_eq!(found.damage, [Damage::NotZero { offset: 5000 }]);
}

#[test]
fn a_sealed_diff_of_raw_images_says_so_again_when_it_is_merged() {
    let (_dir, path) = dir();
    let dirty = DirtyBitmap::new(0, 1 << 20, 4096).unwrap();
    dirty.mark(8192).unwrap();
    let seal = Seal::new().on_raw_image();
    let options = MemoryWriter::options().layout(Layout::Packed).seal(seal);
    let mut writer = options.open(&path, 1 << 20, 4096).unwrap();
    writer.write_diff(&vec![3; 1 << 20], &dirty).unwrap();
    writer.commit().unwrap();
    let diffs = Chain::open_diff(&path, 4096).unwrap();
    let merged = path.with_extension("merged");
    let options = MemoryWriter::options()
        .layout(Layout::Sealed)
        .seal(diffs.seal());
    diffs.merge(options, &merged).unwrap();
    assert!(Image::open(&merged).unwrap().is_diff());
}

/// A packed file of some hundred bytes, all of whose RAM is zeros.
fn image_of_zeros(path: &Path, ram_size: u64) {
    let footer = Footer {
        version: Version::CURRENT,
        id: image_format::ImageId::from_bytes([1; 16]),
        kind: image_format::ImageKind::Full,
        layout: Layout::Packed,
        ram_size,
        page_size: 4096,
        regions: vec![0..ram_size],
        runs: vec![image_format::Run::zeros(0..ram_size)],
        checksums: Vec::new(),
        metadata: Vec::new(),
    };
    footer.write(&fs::File::create(path).unwrap()).unwrap();
}

#[test]
fn ram_of_more_pages_than_memory_is_taken_for_is_not_compared() {
    struct Zeros;
    impl PageReader for Zeros {
        fn read_at(&self, _: u64, _: &mut [u8]) -> std::io::Result<()> {
            unreachable!("refused before anything is read")
        }
    }
    let mut on = |_| std::ops::ControlFlow::Continue(());
    let error = compare(&Zeros, &Zeros, 1 << 49, 4096, &mut on).unwrap_err();
    assert!(
        matches!(error, memory_image::CompareError::TooManyPages { .. }),
        "{error:?}"
    );
}

#[test]
fn an_image_of_more_ram_than_any_machine_has_is_refused() {
    let (_dir, path) = dir();
    image_of_zeros(&path, 1 << 52);
    assert_eq!(Image::open(&path).unwrap().ram_size(), 1 << 52);
    let mut footer = Image::open(&path).unwrap().footer().cloned().unwrap();
    footer.ram_size *= 2;
    let file = tempfile::tempfile().unwrap();
    assert!(footer.write(&file).is_err());
}

/// Bytes that a guest may leave at the end or the start of its RAM: whole images, parts of them,
/// and what is none.
fn planted() -> impl Strategy<Value = Vec<u8>> {
    let image = (any::<bool>(), any::<bool>(), 1..6_usize, 0..700_usize).prop_map(
        |(packed, old, pages, metadata)| {
            let (_dir, path) = dir();
            let layout = if packed {
                Layout::Packed
            } else {
                Layout::Sealed
            };
            let seal = Seal::new().metadata(vec![1; metadata]);
            save(&path, layout, seal, &vec![6; pages * 512], PAGE);
            let image = Image::open(&path).unwrap();
            let mut bytes = fs::read(&path).unwrap();
            if old && !packed {
                let mut footer = image.footer().cloned().unwrap();
                footer.version = Version::V1;
                let file = fs::File::options().write(true).open(&path).unwrap();
                footer.write(&file).unwrap();
                bytes = fs::read(&path).unwrap();
            }
            bytes
        },
    );
    prop_oneof![
        3 => image,
        1 => prop::collection::vec(any::<u8>(), 1..200),
        1 => Just(b"memsnap\xff".to_vec()),
        1 => Just(b"memsnap\x01".to_vec()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(64, 2000)))]

    #[test]
    fn raw_ram_is_read_byte_for_byte_for_any_content(
        planted in planted(),
        at_end in any::<bool>(),
        pages in 1..8_usize,
    ) {
        let (_dir, path) = dir();
        let len = planted.len().next_multiple_of(512) + 512 * pages;
        let mut ram = vec![3; len];
        let at = if at_end { len - planted.len() } else { 0 };
        ram[at..at + planted.len()].copy_from_slice(&planted);
        save(&path, Layout::Raw, Seal::new(), &ram, PAGE);
        prop_assert!(Image::open(&path).is_err());
        prop_assert!(ram_of(&path, PAGE) == ram);
    }

    #[test]
    fn what_a_guest_writes_changes_no_image_of_its_ram(
        planted in planted(),
        at_end in any::<bool>(),
        packed in any::<bool>(),
    ) {
        let (_dir, path) = dir();
        let len = planted.len().next_multiple_of(512) + 1024;
        let mut ram = vec![3; len];
        let at = if at_end { len - planted.len() } else { 0 };
        ram[at..at + planted.len()].copy_from_slice(&planted);
        let layout = if packed { Layout::Packed } else { Layout::Sealed };
        save(&path, layout, Seal::new(), &ram, PAGE);
        let image = Image::open(&path).unwrap();
        prop_assert_eq!(image.ram_size(), len as u64);
        prop_assert_eq!(image.layout(), if packed { Layout::Packed } else { Layout::Sealed });
        let bytes = fs::read(&path).unwrap();
        for cut in (512..bytes.len()).step_by(512) {
            fs::write(&path, &bytes[..cut]).unwrap();
            prop_assert!(Image::open(&path).is_err(), "cut to {}", cut);
        }
    }
}
