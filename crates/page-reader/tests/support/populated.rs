//! Helpers for tests of `PageReader::populated`.

use std::fs::File;
use std::ops::Range;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use page_reader::{MappedMemory, PageReader, RamLayout};
use test_machine::Need;

use test_memory::Mapping;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const PAGES: u64 = 2048;
pub(crate) const SIZE: u64 = PAGES * PAGE;

/// Returns for each page of `source` whether it may be populated. Panics unless the ranges are as
/// documented for any part of `source`.
pub(crate) fn populated(source: &(impl PageReader + ?Sized), size: u64) -> Vec<bool> {
    let mut pages = vec![false; (size / PAGE) as usize];
    for range in checked(source, 0..size) {
        pages[(range.start / PAGE) as usize..range.end.div_ceil(PAGE) as usize].fill(true);
    }
    let whole = checked(source, 0..size);
    for queried in [
        1..size - 1,
        PAGE + 5..PAGE + 6,
        size / 2..size,
        7..7,
        size..size,
    ] {
        let clip = |one: &Range<u64>| one.start.max(queried.start)..one.end.min(queried.end);
        let expected: Vec<_> = whole
            .iter()
            .map(clip)
            .filter(|one| !one.is_empty())
            .collect();
        assert_eq!(
            joined(checked(source, queried.clone())),
            joined(expected),
            "{queried:?}"
        );
    }
    let past: u64 = checked(source, size..size + PAGE)
        .iter()
        .map(|one| one.end - one.start)
        .sum();
    assert_eq!(past, PAGE, "a range past the end is reported");
    pages
}

pub(crate) fn checked(source: &(impl PageReader + ?Sized), queried: Range<u64>) -> Vec<Range<u64>> {
    let found: Vec<_> = source.populated(queried.clone()).collect();
    for one in &found {
        assert!(
            queried.start <= one.start && one.start < one.end && one.end <= queried.end,
            "{one:?} of {queried:?}"
        );
    }
    assert!(found.is_sorted_by(|a, b| a.end <= b.start), "{found:?}");
    found
}

pub(crate) fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined = Vec::<Range<u64>>::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

pub(crate) fn count(pages: &[bool]) -> usize {
    pages.iter().filter(|page| **page).count()
}

/// Returns memory in small pages, so that a touched page is a present page.
pub(crate) fn untouched(flags: Flags) -> Mapping {
    let mapping = match flags {
        Flags::Private => Mapping::private(SIZE as usize),
        Flags::Shared => Mapping::shared(SIZE as usize),
    };
    let _ = mapping.advise(0..SIZE as usize, MmapAdvise::MADV_NOHUGEPAGE);
    mapping
}

#[derive(Clone, Copy, Debug)]
pub(crate) enum Flags {
    Private,
    Shared,
}

pub(crate) fn guest(mapping: &Mapping) -> MappedMemory<'_> {
    let layout = RamLayout::single(0, SIZE).unwrap();
    MappedMemory::new(layout, [mapping.memory()]).unwrap()
}

pub(crate) fn touch(mapping: &Mapping, pages: impl IntoIterator<Item = u64>) -> Vec<bool> {
    let mut touched = vec![false; PAGES as usize];
    for page in pages {
        mapping.write_at((page * PAGE + 17) as usize, b"!");
        touched[page as usize] = true;
    }
    touched
}

pub(crate) const SOME: [u64; 6] = [0, 1, 7, 511, 512, PAGES - 1];

/// Returns whether the file of a mapping can be opened: that of a shared one requires
/// `/proc/self/map_files`.
pub(crate) fn may_open_mappings(test: &str, flags: Flags) -> bool {
    matches!(flags, Flags::Private) || Need::Root.met(test)
}

pub(crate) fn memfd(flags: MFdFlags) -> File {
    let memfd = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC | flags).unwrap());
    memfd.set_len(SIZE).unwrap();
    memfd
}
