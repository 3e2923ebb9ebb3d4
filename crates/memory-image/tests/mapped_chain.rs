//! Chains as guest memory, mapped.

mod common;

#[cfg(target_os = "linux")]
use std::ops::Range;

use common::{Images, whole};
use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, ImageError, MappedChain};
use memory_writer::{Durability, Layout, MemoryWriter, Seal};
use page_reader::PageReader;
use proptest::prelude::*;
use rstest::rstest;

const PAGE: u64 = 16384;

/// A full image, and three diffs of scattered pages and of a longer run.
fn scattered() -> Images {
    Images::new(64 * PAGE, PAGE)
        .with([0..64])
        .with((0..20).map(|i| 3 * i..3 * i + 1))
        .with([30..50])
        .with((0..10).map(|i| 6 * i..6 * i + 2))
}

#[test]
fn a_mapped_chain_is_the_ram_at_its_last_snapshot() {
    let images = scattered();
    let ram = MappedChain::open(&images.chain()).unwrap();
    assert_eq!(ram.len(), images.ram.len());
    assert!(whole(&ram, ram.len()) == images.ram);
    assert_eq!((ram.mapped(), ram.copied()), (64 * PAGE, 0));
    assert_eq!(ram.host_memory(64 * PAGE - 10, 100).unwrap().len(), 10);
    assert!(ram.host_memory(64 * PAGE, 1).is_none());
    assert!(ram.read_at(64 * PAGE - 1, &mut [0; 2]).is_err());
}

/// The base's mapping goes on under the pages that diffs have over it, and the first diff's under the second's.
#[rstest]
#[case::nothing(1, 64)]
#[case::the_base(3, 20 + 2)]
#[case::the_base_and_the_longest_diff(5, 3 + 2)]
#[case::everything(1000, 0)]
fn the_longest_runs_are_mapped_and_the_rest_is_copied(
    #[case] max_mappings: usize,
    #[case] copied: u64,
) {
    let images = Images::new(64 * PAGE, PAGE)
        .with([0..64])
        .with([30..50])
        .with([3..5, 35..36, 40..42]);
    let ram = MappedChain::options()
        .max_mappings(max_mappings)
        .map(&images.chain())
        .unwrap();
    assert!(whole(&ram, ram.len()) == images.ram);
    assert_eq!(ram.copied(), copied * PAGE);
    assert_eq!(ram.mapped(), (64 - copied) * PAGE);
}

/// As a full snapshot leaves where it found zeros.
#[test]
fn a_base_full_of_holes_takes_one_mapping() {
    let images = Images::new(64 * PAGE, PAGE)
        .with((1..20).map(|i| 3 * i..3 * i + 2))
        .with([17..18]);
    let ram = MappedChain::options()
        .max_mappings(3)
        .map(&images.chain())
        .unwrap();
    assert!(whole(&ram, ram.len()) == images.ram);
    assert_eq!((ram.mapped(), ram.copied()), (38 * PAGE, PAGE));
}

/// Pages that are as far apart in the file as in the RAM may have another page's bytes between them in the file.
#[test]
fn zeros_of_a_packed_base_are_zeros_when_it_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    let mut ram = vec![0; 64 * PAGE as usize];
    let mut writer = MemoryWriter::options()
        .layout(Layout::Packed(Seal::new()))
        .durability(Durability::None)
        .skip_zeros(true)
        .open(&path, ram.len() as u64, PAGE)
        .unwrap();
    writer.write_full(&ram).unwrap();
    // Even pages of the lower half stand at their own offsets, pages of the upper half between them.
    for page in (0..32).map(|page| if page % 2 == 0 { page } else { page + 32 }) {
        ram[(page * PAGE) as usize..][..PAGE as usize].fill(page as u8 + 1);
        let dirty = DirtyBitmap::new(0, ram.len() as u64, PAGE).unwrap();
        dirty.set_dirty(page * PAGE).unwrap();
        writer.write_diff(&ram, &dirty).unwrap();
    }
    writer.commit().unwrap();
    let chain = Chain::open(&path, PAGE).unwrap();
    assert!(whole(&chain, ram.len()) == ram);
    let mapped = MappedChain::open(&chain).unwrap();
    let found = whole(&mapped, ram.len());
    let pages = found.chunks(PAGE as usize).zip(ram.chunks(PAGE as usize));
    let wrong: Vec<_> = pages
        .enumerate()
        .filter_map(|(page, (found, right))| (found != right).then_some(page))
        .collect();
    assert!(wrong.is_empty(), "pages {wrong:?}");
}

#[test]
fn what_the_guest_writes_is_its_own_and_a_replaced_image_does_no_harm() {
    let mut images = scattered();
    let ram = MappedChain::options()
        .max_mappings(9)
        .map(&images.chain())
        .unwrap();
    let before = std::fs::read(images.path(0)).unwrap();
    for offset in (0..ram.len()).step_by(PAGE as usize) {
        // SAFETY: inside the mapping, which nothing else accesses meanwhile.
        #[allow(unsafe_code)]
        unsafe {
            ram.as_ptr().add(offset).write(99);
        }
        images.ram[offset] = 99;
    }
    assert!(std::fs::read(images.path(0)).unwrap() == before);
    let new = images.dir().join("new");
    std::fs::write(&new, b"new").unwrap();
    std::fs::rename(new, images.path(0)).unwrap();
    assert!(whole(&ram, ram.len()) == images.ram);
}

#[rstest]
#[case::to_be_mapped(1000)]
#[case::to_be_copied(1)]
fn an_image_cut_short_since_it_was_opened_is_named_in_the_error(#[case] max_mappings: usize) {
    let images = scattered();
    let chain = images.chain();
    images.cut(2, 47 * PAGE);
    let error = MappedChain::options()
        .max_mappings(max_mappings)
        .map(&chain)
        .unwrap_err();
    let path = match &error {
        ImageError::Map { path, .. } if max_mappings > 1 => path,
        ImageError::Read { path, .. } if max_mappings == 1 => path,
        other => panic!("{other:?}"),
    };
    assert_eq!(path, images.path(2));
}

/// With as many mappings as a process may have, each beside one of another kind.
#[cfg(target_os = "linux")]
#[test]
fn a_process_without_mappings_is_told_to_use_fewer_or_to_merge() {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
    if !common::is_alone("a_process_without_mappings_is_told_to_use_fewer_or_to_merge") {
        return;
    }
    const HOST_PAGE: usize = 4096;
    let images = Images::new(200 * PAGE, PAGE)
        .with([0..200])
        .with((0..100).map(|i| 2 * i..2 * i + 1));
    let chain = images.chain();
    let limit = std::fs::read_to_string("/proc/sys/vm/max_map_count").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    let len = std::num::NonZeroUsize::new(2 * limit * HOST_PAGE).unwrap();
    let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
    // SAFETY: new memory, which nothing uses.
    #[allow(unsafe_code)]
    let start = unsafe { mmap_anonymous(None, len, ProtFlags::PROT_NONE, flags) }.unwrap();
    let protect = |page: usize, protection| {
        let address = start.map_addr(|at| at.checked_add(page * HOST_PAGE).unwrap());
        // SAFETY: a page of that memory.
        #[allow(unsafe_code)]
        unsafe {
            mprotect(address, HOST_PAGE, protection)
        }
    };
    let pages = (1..limit).map(|page| 2 * page);
    let split = pages
        .take_while(|page| protect(*page, ProtFlags::PROT_READ).is_ok())
        .last()
        .unwrap();
    // Some for the allocator and the test, fewer than the chain takes.
    (split - 60..=split).for_each(|page| protect(page, ProtFlags::PROT_NONE).unwrap());
    let error = MappedChain::open(&chain).unwrap_err();
    assert!(
        matches!(error, ImageError::TooManyMappings { .. }),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("max_mappings") && text.contains("merge"),
        "{text}"
    );
    let few = MappedChain::options().max_mappings(5).map(&chain).unwrap();
    assert!(whole(&few, few.len()) == images.ram);
}

/// The mappings of this process in a range of addresses.
#[cfg(target_os = "linux")]
fn mappings(range: Range<usize>) -> usize {
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    let starts = maps
        .lines()
        .map(|line| usize::from_str_radix(line.split('-').next().unwrap(), 16).unwrap());
    starts.filter(|start| range.contains(start)).count()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(12, 48)))]

    /// Also of pages smaller than the host's, where mappings can't begin and end where runs do.
    #[test]
    fn any_chain_is_mapped_with_as_many_mappings_as_allowed(
        page in prop::sample::select(vec![512, 4096, 16384_u64]),
        layers in prop::collection::vec(prop::collection::vec((0..150_u64, 1..60_u64), 0..12), 1..5),
        max_mappings in prop::sample::select(vec![0, 1, 2, 3, 6, 11, 16384_usize]),
    ) {
        const PAGES: u64 = 150;
        let mut images = Images::new(PAGES * page, page);
        for runs in layers {
            images = images.with(runs.into_iter().map(|(start, len)| start..PAGES.min(start + len)));
        }
        let chain = images.chain();
        let ram = MappedChain::options().max_mappings(max_mappings).map(&chain).unwrap();
        prop_assert!(whole(&ram, ram.len()) == images.ram);
        let stored: u64 = chain.stored_runs().map(|run| run.end - run.start).sum();
        prop_assert_eq!(ram.mapped() + ram.copied(), stored);
        #[cfg(target_os = "linux")]
        {
            let start = ram.as_ptr().addr();
            let taken = mappings(start..start + ram.len());
            prop_assert!(taken <= max_mappings.max(1), "{} of {}", taken, max_mappings);
        }
    }
}
