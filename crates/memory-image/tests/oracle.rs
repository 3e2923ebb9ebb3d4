//! Reads random chains of all kinds of images in every way, and compares the result with the RAM.

use std::fs::{self, File};
use std::io;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::Path;

use memory_image::{
    Chain, ChainError, HostRam, Image, MapError, MappedChain, MappedImage, RamTarget, compare,
};
use memory_writer::{Durability, Layout, MemoryWriter, MemoryWriterOptions, Seal};
use page_reader::PageReader;
use proptest::prelude::*;
use test_images::{Form, RandomGuest, layer, whole};

fn options(layout: Layout, seal: Seal) -> MemoryWriterOptions {
    MemoryWriter::options()
        .layout(layout)
        .seal(seal)
        .durability(Durability::None)
}

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

/// Returns the pages that differ, for the message of a failing test.
fn wrong(found: &[u8], expected: &[u8], page: u64) -> Vec<usize> {
    let pages = found
        .chunks(page as usize)
        .zip(expected.chunks(page as usize));
    let differ = pages.enumerate().filter(|(_, (a, b))| a != b);
    differ.map(|(number, _)| number).collect()
}

struct InFile(File, u64);

impl RamTarget for InFile {
    fn ram_size(&self) -> u64 {
        self.1
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.write_all_at(bytes, offset)
    }
}

fn restored_to_memory(chain: &Chain, split: usize) -> [Vec<u8>; 3] {
    let size = chain.ram_size() as usize;
    let (mut all, mut stored, mut regions) = (vec![0xee; size], vec![0; size], vec![0xee; size]);
    chain.restore(all.as_mut_slice()).unwrap();
    chain.restore_zeroed(stored.as_mut_slice()).unwrap();
    let (low, high) = regions.split_at_mut(split);
    // SAFETY: both halves live until the target is dropped, and nothing else accesses them.
    #[allow(unsafe_code)]
    let mut target = unsafe {
        HostRam::new([
            (low.as_mut_ptr(), low.len()),
            (high.as_mut_ptr(), high.len()),
        ])
    };
    chain.restore(&mut target).unwrap();
    [all, stored, regions]
}

fn restored_to_file(guest: &RandomGuest, chain: &Chain) -> Vec<u8> {
    let path = guest.path("restored");
    let file = File::create(&path).unwrap();
    file.set_len(chain.ram_size()).unwrap();
    chain
        .restore_zeroed(&mut InFile(file, chain.ram_size()))
        .unwrap();
    fs::read(path).unwrap()
}

fn merged(guest: &RandomGuest, chain: &Chain, layout: Layout) -> Vec<u8> {
    let path = guest.path("merged");
    let _ = fs::remove_file(&path);
    chain.merge(options(layout, chain.seal()), &path).unwrap();
    let image = match layout.has_footer() {
        true => Image::open(&path),
        false => Image::open_raw(&path),
    };
    let image = image.unwrap();
    if image.footer().is_some() {
        let found = image.verify(&mut |_| ControlFlow::Continue(())).unwrap();
        assert!(found.is_ok(), "{found:?}");
    }
    let merged = Chain::from_image(image, chain.page_size()).unwrap();
    whole(&merged, chain.ram_size() as usize)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(128, 1000)))]

    #[test]
    fn every_way_to_read_any_chain_yields_the_guest_ram(
        page in prop::sample::select(vec![512, 1024, 4096, 16384_u64]),
        pages in 1..24_u64,
        base in layer(true),
        diffs in prop::collection::vec(layer(false), 0..5),
        reads in prop::collection::vec(any::<[prop::sample::Index; 2]>(), 8),
        most in prop::sample::select(vec![2, 3, 5, 9_usize]),
    ) {
        // Whole pages of every layer, but not always of the host.
        let size = pages * (page << 2);
        let mut guest = RandomGuest::new(size, page);
        guest.take(&base);
        let first = guest.ram.clone();
        diffs.iter().for_each(|layer| guest.take(layer));
        let (chain, ram) = (random_chain(&guest), &guest.ram);
        let assert_ram = |how: &str, found: &[u8]| {
            let wrong = wrong(found, ram, page);
            prop_assert!(wrong.is_empty() && found.len() == ram.len(), "{how}: pages {wrong:?}");
            Ok(())
        };

        assert_ram("read", &whole(&chain, ram.len()))?;
        for [one, other] in reads {
            let (one, other) = (one.index(ram.len()), other.index(ram.len()));
            let range = one.min(other)..one.max(other);
            let mut bytes = vec![0xee; range.len()];
            chain.read_at(range.start as u64, &mut bytes).unwrap();
            prop_assert!(bytes == ram[range]);
        }
        let mut populated = vec![0; ram.len()];
        for run in chain.populated(0..size) {
            let run = run.start as usize..run.end as usize;
            populated[run.clone()].copy_from_slice(&ram[run]);
        }
        assert_ram("populated", &populated)?;

        for found in restored_to_memory(&chain, ram.len() / 3) {
            assert_ram("restored to memory", &found)?;
        }
        assert_ram("restored to a file", &restored_to_file(&guest, &chain))?;
        for most in [1, most, 16_384] {
            let mapped = MappedChain::options().max_mappings(most).map(&chain).unwrap();
            assert_ram(&format!("{most} mappings"), &whole(&mapped, ram.len()))?;
        }
        let path = &guest.images[0].0;
        let (Form::Written(layout) | Form::ByHand(layout)) = base.form;
        let mapped = match layout.has_footer() {
            true => MappedImage::open(path),
            false => MappedImage::open_raw(path),
        };
        match mapped {
            Err(MapError::Packed { .. }) => prop_assert!(!layout.is_in_place()),
            mapped => prop_assert!(whole(&mapped.unwrap(), ram.len()) == first),
        }
        for layout in Layout::ALL {
            let how = format!("merged: {layout:?}");
            assert_ram(&how, &merged(&guest, &chain, layout))?;
        }

        let proceed = &mut |_| ControlFlow::Continue(());
        let changed = compare(&first, &chain, size, page, proceed).unwrap();
        let differ = wrong(&first, ram, page);
        let marked = (0..size / page).filter(|number| changed.is_dirty(number * page).unwrap());
        prop_assert!(marked.eq(differ.into_iter().map(|number| number as u64)));
    }
}
