//! Fills memory from random chains of all kinds of images, and compares it with the RAM.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::path::Path;

use image_format::{Footer, ImageId, ImageKind, Run, Version};
use lazy_restore::LazyRam;
use memory_image::{Chain, ChainError, Image};
use memory_writer::Layout;
use page_reader::PageReader;
use proptest::prelude::*;
use test_images::{RandomGuest, layer};
use test_machine::needs;

/// Opens the chain of the guest's images.
fn random_chain(guest: &RandomGuest) -> Chain {
    let open = |path: &Path| Image::open(path).or_else(|_| Image::open_raw(path));
    let full = open(&guest.images[0].0).unwrap();
    let mut chain = Chain::from_image(full, guest.page()).unwrap();
    for (path, runs) in &guest.images[1..] {
        match chain.push_image(open(path).unwrap()) {
            // Every page was dirty.
            Err(ChainError::AmbiguousDiff { .. }) => {
                chain.push_pages(path, runs.iter().cloned()).unwrap();
            }
            pushed => pushed.unwrap(),
        }
    }
    chain
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
        base in layer(true),
        diffs in prop::collection::vec(layer(false), 0..5),
        prefetch in any::<bool>(),
        around in prop::sample::select(vec![1, 8192, 65536_u64]),
    ) {
        needs!(Userfaultfd => Ok(()));
        // Whole pages of every layer, but not always of the host.
        let mut guest = RandomGuest::new(pages * (page << 2), page);
        guest.take(&base);
        diffs.iter().for_each(|layer| guest.take(layer));
        let (chain, expected) = (random_chain(&guest), &guest.ram);
        let options = LazyRam::options().prefetch(prefetch).fault_around(around);
        let ram = options.start(chain).unwrap();
        for _ in 0..2 {
            let mut found = vec![0xee; expected.len()];
            ram.read_at(0, &mut found).unwrap();
            prop_assert!(found == *expected);
            ram.wait().unwrap();
        }
    }
}
