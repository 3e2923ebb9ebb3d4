//! The seals of merged images, including chains whose newest image is raw or of version 1.

use std::ops::Range;
use std::path::{Path, PathBuf};

use dirty_bitmap::DirtyBitmap;
use image_format::ImageKind;
use memory_image::{Chain, ChainError, Image, ImageId, MergeError};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;
use test_images::write_version_1;

const PAGE: u64 = 4096;
const SIZE: u64 = 1 << 20;
const REGIONS: [Range<u64>; 2] = [0..PAGE, 1 << 32..(1 << 32) + SIZE - PAGE];

struct Guest {
    dir: tempfile::TempDir,
    ram: Vec<u8>,
}

impl Guest {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            ram: vec![1; SIZE as usize],
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn full(&self, name: &str, seal: Seal) -> PathBuf {
        let path = self.path(name);
        let mut writer = options(Layout::Packed, seal)
            .open(&path, SIZE, PAGE)
            .unwrap();
        writer.write_full(&self.ram).unwrap();
        writer.commit().unwrap();
        path
    }

    /// Takes a diff of one page, which becomes `value`.
    fn diff(&mut self, name: &str, layout: Layout, seal: Seal, page: u64, value: u8) -> PathBuf {
        let path = self.path(name);
        let at = page * PAGE;
        self.ram[at as usize..][..PAGE as usize].fill(value);
        let dirty = DirtyBitmap::new(0, SIZE, PAGE).unwrap();
        dirty.mark(at).unwrap();
        let mut writer = options(layout, seal).open(&path, SIZE, PAGE).unwrap();
        writer.write_diff(&self.ram, &dirty).unwrap();
        writer.commit().unwrap();
        path
    }
}

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
}

fn id(path: &Path) -> ImageId {
    Image::open(path).unwrap().id().unwrap()
}

fn whole(reader: &impl PageReader) -> Vec<u8> {
    let mut bytes = vec![0xee; SIZE as usize];
    reader.read_at(0, &mut bytes).unwrap();
    bytes
}

/// Regions belong to the guest. Metadata and id belong to one state.
#[test]
fn merging_with_a_raw_newest_image_keeps_the_regions_alone() {
    let mut guest = Guest::new();
    let seal = Seal::new().regions(REGIONS).metadata([7; 10]);
    let full = guest.full("full", seal);
    let raw = guest.diff("raw", Layout::Raw, Seal::new(), 3, 2);
    let mut chain = Chain::open(&full, PAGE).unwrap();
    chain.push_pages(&raw, [3 * PAGE..4 * PAGE]).unwrap();
    let merged = guest.path("merged");
    chain
        .merge(options(Layout::Packed, chain.seal()), &merged)
        .unwrap();
    let footer = Image::open(&merged).unwrap().footer().cloned().unwrap();
    assert_eq!(footer.regions, REGIONS);
    assert_eq!(footer.metadata, []);
    assert_ne!(footer.id, id(&full));
    assert!(whole(&Chain::open(&merged, PAGE).unwrap()) == guest.ram);
}

#[test]
fn merging_diffs_with_a_raw_newest_one_makes_a_diff_that_fits() {
    let mut guest = Guest::new();
    let full = guest.full("full", Seal::new().regions(REGIONS));
    let seal = Seal::new().regions(REGIONS).parent(id(&full));
    let diff = guest.diff("diff", Layout::Packed, seal, 1, 2);
    let raw = guest.diff("raw", Layout::Raw, Seal::new(), 3, 2);
    let mut chain = Chain::open_diff(&diff, PAGE).unwrap();
    chain.push_pages(&raw, [3 * PAGE..4 * PAGE]).unwrap();
    let merged = guest.path("merged");
    chain
        .merge(options(Layout::Packed, chain.seal()), &merged)
        .unwrap();
    let chain = Chain::open_sealed(&[full, merged]).unwrap();
    assert!(whole(&chain) == guest.ram);
}

/// A diff from a newer state to an older one has the id of the older state.
#[test]
fn a_diff_may_lead_back_to_an_older_state() {
    let mut guest = Guest::new();
    let full = guest.full("full", Seal::new());
    let seal = Seal::new().parent(id(&full));
    let there = guest.diff("there", Layout::Packed, seal, 3, 2);
    let seal = Seal::new().parent(id(&there)).id(id(&full));
    let back = guest.diff("back", Layout::Packed, seal, 3, 1);
    let chain = Chain::open_sealed(&[&full, &there, &back]).unwrap();
    assert_eq!(chain.id(), Some(id(&full)));
    assert!(whole(&chain) == vec![1; SIZE as usize]);
    let merged = guest.path("merged");
    chain
        .merge(options(Layout::Packed, chain.seal()), &merged)
        .unwrap();
    assert_eq!(id(&merged), id(&full));
    // Forward again, by a copy. The same file twice is refused.
    let copy = guest.path("copy");
    std::fs::copy(&there, &copy).unwrap();
    assert!(Chain::open_sealed(&[&full, &there, &back, &copy]).is_ok());
    let error = Chain::open_sealed(&[&full, &there, &back, &there]).unwrap_err();
    assert!(matches!(error, ChainError::Link { .. }), "{error:?}");
    // A copy that does not follow is refused as repeated.
    let error = Chain::open_sealed(&[&full, &there, &copy]).unwrap_err();
    let repeated = memory_image::LinkError::Repeated;
    assert!(
        matches!(&error, ChainError::Link { why, .. } if *why == repeated),
        "{error:?}"
    );
}

#[test]
fn images_of_version_1_in_small_pages_are_merged_and_flattened() {
    let guest = Guest::new();
    let old = guest.path("old");
    write_version_1(&old, ImageKind::Full, &guest.ram);
    let open = || Image::open_as(&old, Layout::Packed).unwrap();
    let chain = Chain::from_image(open(), 256).unwrap();
    assert_eq!((chain.page_size(), chain.writable_page_size()), (256, 512));
    let merged = guest.path("merged");
    chain
        .merge(options(Layout::Packed, chain.seal()), &merged)
        .unwrap();
    let image = Image::open(&merged).unwrap();
    assert_eq!(image.footer().unwrap().page_size, 512);
    assert!(whole(&Chain::open(&merged, 512).unwrap()) == guest.ram);
    chain.flatten(guest.path("flat")).unwrap();
    assert!(std::fs::read(guest.path("flat")).unwrap() == guest.ram);
    // A diff in these pages cannot be written in larger ones.
    let diff = guest.path("diff");
    write_version_1(&diff, ImageKind::Diff { parent: None }, &guest.ram);
    let image = Image::open_as(&diff, Layout::Packed).unwrap();
    let chain = Chain::from_image(image, 256).unwrap();
    let error = chain
        .merge(options(Layout::Packed, chain.seal()), guest.path("d"))
        .unwrap_err();
    assert!(
        matches!(
            error,
            MergeError::LargerPages {
                writer: 512,
                chain: 256
            }
        ),
        "{error:?}"
    );
    assert!(!guest.path("d").exists());
}
