//! Fills memory from random chains of all kinds of images, and compares it with the RAM.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use image_format::{Footer, ImageId, ImageKind, Run, Version};
use lazy_restore::LazyRam;
use memory_image::{Chain, ChainError, Image};
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use page_reader::PageReader;
use proptest::prelude::*;
use test_machine::needs;

#[derive(Clone, Copy, Debug)]
enum Form {
    Raw,
    Sealed,
    Packed,
}

/// Writes of a guest between two images: first page, number of pages, and value, which may be 0.
type Writes = Vec<(u64, u64, u8)>;

fn layer() -> impl Strategy<Value = (Form, Writes)> {
    // Mostly single pages, so that adjacent pages of the RAM are scattered in a packed file.
    let write = (
        0..64_u64,
        prop::sample::select(vec![1, 1, 1, 2, 12_u64]),
        prop::sample::select(vec![0, 1, 2, 3_u8]),
    );
    let forms = vec![Form::Raw, Form::Sealed, Form::Packed, Form::Packed];
    (
        prop::sample::select(forms),
        prop::collection::vec(write, 0..30),
    )
}

/// Writes the images of a guest, and returns their chain and its RAM.
fn images(dir: &Path, size: u64, page: u64, layers: &[(Form, Writes)]) -> (Chain, Vec<u8>) {
    let (mut ram, mut newest, mut written) = (vec![0; size as usize], None, 0_u64);
    let mut chain: Option<Chain> = None;
    for (number, (form, writes)) in layers.iter().enumerate() {
        let dirty = DirtyBitmap::new(0, size, page).unwrap();
        for (start, len, value) in writes {
            let start = start % (size / page);
            for at in (start * page..size.min((start + len) * page)).step_by(page as usize) {
                written += u64::from(*value != 0);
                let unique = match value {
                    0 => 0,
                    _ => written.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
                };
                let bytes = &mut ram[at as usize..][..page as usize];
                let words = bytes.chunks_mut(8);
                words.for_each(|word| word.copy_from_slice(&unique.to_le_bytes()));
                dirty.set_dirty(at).unwrap();
            }
        }
        let seal = match newest {
            Some(id) => Seal::new().parent(id),
            None => Seal::new().on_raw_image(),
        };
        let layout = match form {
            Form::Raw => Layout::Raw,
            Form::Sealed => Layout::Sealed,
            Form::Packed => Layout::Packed,
        };
        let path = dir.join(format!("{number}.mem"));
        let options = MemoryWriter::options()
            .layout(layout)
            .seal(seal)
            .durability(Durability::None);
        let options = options.skip_zeros(true).allow_ambiguous_diff(true);
        let mut writer = options.open(&path, size, page).unwrap();
        match number {
            0 => writer.write_full(&ram).unwrap(),
            _ => _ = writer.write_diff(&ram, &dirty).unwrap(),
        }
        newest = writer.image_id();
        writer.commit().unwrap();
        let image = match form {
            Form::Raw => Image::open_raw(&path),
            Form::Sealed | Form::Packed => Image::open(&path),
        };
        let image = image.unwrap();
        match &mut chain {
            None => chain = Some(Chain::from_image(image, page).unwrap()),
            Some(chain) => match chain.push_image(image) {
                // The holes do not show its pages.
                Err(ChainError::AmbiguousDiff { .. }) => {
                    chain.push_pages(&path, dirty.runs()).unwrap();
                }
                pushed => pushed.unwrap(),
            },
        }
    }
    (chain.unwrap(), ram)
}

/// No writer of diffs records zeros on its own account.
#[test]
fn zeros_of_a_diff_hide_the_pages_of_its_base() {
    const PAGE: u64 = 4096;
    const SIZE: u64 = 8 * PAGE;
    needs!(Userfaultfd);
    let dir = tempfile::tempdir().unwrap();
    let (base, diff) = (dir.path().join("base"), dir.path().join("diff"));
    std::fs::write(&base, [7; SIZE as usize]).unwrap();
    let footer = Footer {
        version: Version::CURRENT,
        id: ImageId::random().unwrap(),
        kind: ImageKind::Diff { parent: None },
        layout: Layout::Packed,
        ram_size: SIZE,
        page_size: PAGE,
        regions: vec![0..SIZE],
        runs: vec![Run::zeros(PAGE..3 * PAGE)],
        checksums: Vec::new(),
        metadata: Vec::new(),
    };
    footer.write(&File::create(&diff).unwrap()).unwrap();
    let mut chain = Chain::open_raw(&base, PAGE).unwrap();
    chain.push(&diff).unwrap();
    let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
    for _ in 0..2 {
        for (page, value) in [(0, 7), (1, 0), (2, 0), (3, 7)] {
            let mut bytes = [0xee; PAGE as usize];
            ram.read_at(page * PAGE, &mut bytes).unwrap();
            assert_eq!(bytes, [value; PAGE as usize], "page {page}");
        }
        ram.wait().unwrap();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(64, 500)))]

    #[test]
    fn filled_memory_is_the_ram_of_any_chain(
        page in prop::sample::select(vec![512, 1024, 4096, 16384_u64]),
        pages in 1..24_u64,
        layers in prop::collection::vec(layer(), 1..6),
        prefetch in any::<bool>(),
        around in prop::sample::select(vec![1, 8192, 65536_u64]),
    ) {
        needs!(Userfaultfd => Ok(()));
        let dir = tempfile::tempdir().unwrap();
        // Whole pages of the images, but not always of the host.
        let (chain, expected) = images(dir.path(), pages * page, page, &layers);
        let options = LazyRam::options().prefetch(prefetch).fault_around(around);
        let ram = options.start(chain).unwrap();
        for _ in 0..2 {
            let mut found = vec![0xee; expected.len()];
            ram.read_at(0, &mut found).unwrap();
            prop_assert!(found == expected);
            ram.wait().unwrap();
        }
    }
}
