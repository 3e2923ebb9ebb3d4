//! Chains that are mapped as guest memory.

mod support;

#[cfg(target_os = "linux")]
use std::fs::File;
use std::ops::ControlFlow;
#[cfg(target_os = "linux")]
use std::ops::Range;
#[cfg(target_os = "linux")]
use std::path::Path;

use dirty_bitmap::DirtyBitmap;
use memory_image::{Chain, MapError, MappedChain, Progress, ReadImageError};
use memory_writer::{Durability, Layout, MemoryWriter};
use page_reader::PageReader;
use proptest::prelude::*;
use rstest::rstest;
use support::open_chain;
use test_images::{Images, whole};

const PAGE: u64 = 16384;

/// Returns a full image and three diffs of scattered pages and of a longer run.
fn scattered() -> Images {
    Images::new(64 * PAGE, PAGE)
        .with([0..64])
        .with((0..20).map(|i| 3 * i..3 * i + 1))
        .with([30..50])
        .with((0..10).map(|i| 6 * i..6 * i + 2))
}

#[test]
fn mapped_chain_reads_as_the_ram_at_its_last_snapshot() {
    let images = scattered();
    let ram = MappedChain::open(&open_chain(&images)).unwrap();
    assert_eq!(ram.ram_size() as usize, images.ram.len());
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    assert_eq!((ram.mapped(), ram.copied()), (64 * PAGE, 0));
    assert_eq!(ram.host_memory(64 * PAGE - 10, 100).unwrap().len(), 10);
    assert!(ram.host_memory(64 * PAGE, 1).is_none());
    assert!(ram.read_at(64 * PAGE - 1, &mut [0; 2]).is_err());
}

/// The base's mapping continues under pages of the diffs, and the first diff's under pages of the
/// second.
#[rstest]
#[case::nothing(1, 64)]
#[case::the_base(3, 20 + 2)]
#[case::the_base_and_the_longest_diff(5, 3 + 2)]
#[case::everything(1000, 0)]
fn longest_runs_are_mapped_and_others_are_copied(#[case] max_mappings: usize, #[case] copied: u64) {
    let images = Images::new(64 * PAGE, PAGE)
        .with([0..64])
        .with([30..50])
        .with([3..5, 35..36, 40..42]);
    let ram = MappedChain::options()
        .max_mappings(max_mappings)
        .map(&open_chain(&images))
        .unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    assert_eq!(ram.copied(), copied * PAGE);
    assert_eq!(ram.mapped(), (64 - copied) * PAGE);
}

#[test]
fn mapping_reports_copied_bytes_and_can_be_cancelled() {
    let images = Images::new(256 * PAGE, PAGE).with([0..256]);
    let (chain, options) = (open_chain(&images), MappedChain::options().max_mappings(1));
    let mut seen = Vec::new();
    let ram = options.map_with(&chain, &mut |progress| {
        seen.push(progress);
        ControlFlow::Continue(())
    });
    assert_eq!(ram.unwrap().copied(), 4 << 20);
    let mebibytes = [0, 1, 2, 3, 4].map(|done| Progress::new(done << 20, 4 << 20));
    assert_eq!(seen, mebibytes);
    for last in [0, 1 << 20] {
        let error = options.map_with(&chain, &mut |progress| match progress.done == last {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        });
        assert!(matches!(error, Err(MapError::Cancelled)), "{error:?}");
    }
}

/// A full snapshot leaves a hole where it found zeros.
#[test]
fn base_full_of_holes_takes_one_mapping() {
    let images = Images::new(64 * PAGE, PAGE)
        .with((1..20).map(|i| 3 * i..3 * i + 2))
        .with([17..18]);
    let ram = MappedChain::options()
        .max_mappings(3)
        .map(&open_chain(&images))
        .unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    assert_eq!((ram.mapped(), ram.copied()), (38 * PAGE, PAGE));
}

/// Pages with the same distance in the file and in the RAM may have another page's bytes between
/// them in the file.
#[test]
fn zeros_of_a_packed_base_are_zeros_when_it_is_mapped() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("base");
    let mut ram = vec![0; 64 * PAGE as usize];
    let mut writer = MemoryWriter::options()
        .layout(Layout::Packed)
        .durability(Durability::None)
        .skip_zeros(true)
        .open(&path, ram.len() as u64, PAGE)
        .unwrap();
    writer.write_full(&ram).unwrap();
    // Even pages of the lower half are at their own offsets, and pages of the upper half are
    // between them.
    for page in (0..32).map(|page| if page % 2 == 0 { page } else { page + 32 }) {
        ram[(page * PAGE) as usize..][..PAGE as usize].fill(page as u8 + 1);
        let dirty = DirtyBitmap::new(0, ram.len() as u64, PAGE).unwrap();
        dirty.mark(page * PAGE).unwrap();
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
fn guest_writes_stay_private_and_images_may_be_replaced() {
    let mut images = scattered();
    let ram = MappedChain::options()
        .max_mappings(9)
        .map(&open_chain(&images))
        .unwrap();
    let before = std::fs::read(images.path(0)).unwrap();
    for offset in (0..ram.ram_size() as usize).step_by(PAGE as usize) {
        // SAFETY: inside the mapping, which nothing else accesses at the time.
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
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

#[rstest]
#[case::to_be_mapped(1000)]
#[case::to_be_copied(1)]
fn error_names_the_image_truncated_after_open(#[case] max_mappings: usize) {
    let images = scattered();
    let chain = open_chain(&images);
    images.cut(2, 47 * PAGE);
    let error = MappedChain::options()
        .max_mappings(max_mappings)
        .map(&chain)
        .unwrap_err();
    let path = match &error {
        MapError::Map { path, .. } if max_mappings > 1 => path,
        MapError::Read(ReadImageError::Read { path, .. }) if max_mappings == 1 => path,
        other => panic!("{other:?}"),
    };
    assert_eq!(path, images.path(2));
}

/// Uses up all mappings of the process, each next to one of another kind.
#[cfg(target_os = "linux")]
#[test]
fn exhausted_mappings_error_names_the_remedies() {
    use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, mprotect};
    if !test_machine::is_alone("exhausted_mappings_error_names_the_remedies") {
        return;
    }
    const HOST_PAGE: usize = 4096;
    let images = Images::new(200 * PAGE, PAGE)
        .with([0..200])
        .with((0..100).map(|i| 2 * i..2 * i + 1));
    let chain = open_chain(&images);
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
    // Leave some for the allocator and the test, fewer than the chain takes.
    (split - 60..=split).for_each(|page| protect(page, ProtFlags::PROT_NONE).unwrap());
    let error = MappedChain::open(&chain).unwrap_err();
    assert!(
        matches!(error, MapError::TooManyMappings { .. }),
        "{error:?}"
    );
    let text = error.to_string();
    assert!(
        text.contains("max_mappings") && text.contains("merge"),
        "{text}"
    );
    let few = MappedChain::options().max_mappings(5).map(&chain).unwrap();
    assert!(whole(&few, few.ram_size() as usize) == images.ram);
}

/// Returns the ranges that the file system reports as data.
#[cfg(target_os = "linux")]
fn data(path: &Path) -> Vec<Range<u64>> {
    let file = File::open(path).unwrap();
    let extents = sparse_file::reported_extents(&file).unwrap();
    extents
        .map(Result::unwrap)
        .filter(|extent| extent.kind == sparse_file::ExtentKind::Data)
        .map(|extent| extent.range)
        .collect()
}

/// Writes to every `step`th byte.
#[cfg(target_os = "linux")]
fn touch(ram: &MappedChain, step: usize) {
    for offset in (0..ram.ram_size() as usize).step_by(step) {
        // SAFETY: inside the mapping, which nothing else accesses at the time.
        #[allow(unsafe_code)]
        unsafe {
            ram.as_ptr().add(offset).write(99);
        }
    }
}

/// On tmpfs, touching a hole through a mapping fills it, and the hole is later taken for a page of
/// the diff.
#[cfg(target_os = "linux")]
#[rstest]
fn mapping_a_chain_on_tmpfs_fills_no_hole_of_a_raw_diff(
    #[values(1, 2, 3, 4, 5, 6, 7, 9, 16_384)] max_mappings: usize,
    #[values(false, true)] write: bool,
) {
    let images = Images::within(Path::new("/dev/shm"), 64 * PAGE, PAGE)
        .with([0..64])
        .with([0..4, 5..9, 20..30, 31..32, 33..40])
        .with([4..5, 30..31])
        .with([5..6, 32..33, 38..42]);
    let chain = || {
        let mut chain = Chain::open_raw(images.path(0), PAGE).unwrap();
        (1..4).for_each(|diff| chain.push_raw(images.path(diff)).unwrap());
        chain
    };
    let before = [1, 2, 3].map(|layer| data(images.path(layer)));
    let ram = MappedChain::options()
        .max_mappings(max_mappings)
        .map(&chain())
        .unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    if write {
        touch(&ram, PAGE as usize);
    }
    drop(ram);
    assert_eq!([1, 2, 3].map(|layer| data(images.path(layer))), before);
    assert!(whole(&chain(), images.ram.len()) == images.ram);
}

/// A caller may list pages of a diff that are holes in its file: zeros.
#[cfg(target_os = "linux")]
#[rstest]
fn diff_pages_that_are_holes_of_the_file_stay_holes(
    #[values(1, 3, 5, 7, 16_384)] max_mappings: usize,
) {
    let mut images = Images::within(Path::new("/dev/shm"), 64 * PAGE, PAGE)
        .with([0..64])
        .with([3..20, 30..31]);
    let mut chain = Chain::open_raw(images.path(0), PAGE).unwrap();
    let all = std::iter::once(0..40 * PAGE);
    chain.push_pages(images.path(1), all).unwrap();
    for zeros in [0..3, 20..30, 31..40] {
        images.ram[(zeros.start * PAGE) as usize..(zeros.end * PAGE) as usize].fill(0);
    }
    let before = data(images.path(1));
    let ram = MappedChain::options()
        .max_mappings(max_mappings)
        .map(&chain)
        .unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    touch(&ram, 4096);
    drop(ram);
    assert_eq!(data(images.path(1)), before);
}

/// Returns the number of mappings of this process in a range of addresses.
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

    /// Includes pages smaller than the host's, where mappings cannot begin and end where runs do.
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
        let chain = open_chain(&images);
        let ram = MappedChain::options().max_mappings(max_mappings).map(&chain).unwrap();
        prop_assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
        let stored: u64 = chain.stored_runs().map(|run| run.end - run.start).sum();
        prop_assert_eq!(ram.mapped() + ram.copied(), stored);
        #[cfg(target_os = "linux")]
        {
            let start = ram.as_ptr().addr();
            let taken = mappings(start..start + ram.ram_size() as usize);
            prop_assert!(taken <= max_mappings.max(1), "{} of {}", taken, max_mappings);
        }
    }
}

#[cfg(target_os = "linux")]
proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(48, 500)))]

    /// Diffs that fill each other's holes, so that one mapping could continue under another diff's
    /// pages.
    #[test]
    fn no_number_of_mappings_fills_holes_of_diffs_on_tmpfs(
        pieces in prop::collection::vec((0..4_usize, 1..5_u64), 1..60),
        max_mappings in 1..24_usize,
    ) {
        const PAGE: u64 = 4096;
        let mut layers = vec![Vec::new(); 4];
        let mut end = 0;
        for (layer, len) in pieces {
            layers[layer].push(end..end + len);
            end += len;
        }
        let images = Images::within(Path::new("/dev/shm"), end * PAGE, PAGE).with([0..end]);
        let images = layers.into_iter().skip(1).fold(images, Images::with);
        let extents = || [1, 2, 3].map(|layer| data(images.path(layer)));
        let before = extents();
        let ram = MappedChain::options().max_mappings(max_mappings).map(&open_chain(&images)).unwrap();
        prop_assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
        touch(&ram, PAGE as usize);
        drop(ram);
        prop_assert_eq!(extents(), before);
        prop_assert!(whole(&open_chain(&images), images.ram.len()) == images.ram);
    }
}
