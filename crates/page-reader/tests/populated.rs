//! What was never written is found without touching it, and what was is never missed: with real memory and real files.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod common;

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::process::Command;
use std::sync::{Arc, Mutex};

use common::Mapping;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use page_reader::{FileReader, HostMemory, Layered, MappedMemory, PageReader, RamLayout};
use proptest::prelude::*;
use rstest::rstest;
use test_machine::Need;

const PAGE: u64 = 4096;
const PAGES: u64 = 2048;
const SIZE: u64 = PAGES * PAGE;

/// The pages of `source` that may be populated; panics unless the ranges are as documented, whatever part is asked for.
fn populated(source: &(impl PageReader + ?Sized), size: u64) -> Vec<bool> {
    let mut pages = vec![false; (size / PAGE) as usize];
    for range in checked(source, 0..size) {
        pages[(range.start / PAGE) as usize..range.end.div_ceil(PAGE) as usize].fill(true);
    }
    let whole = checked(source, 0..size);
    for asked in [
        1..size - 1,
        PAGE + 5..PAGE + 6,
        size / 2..size,
        7..7,
        size..size,
    ] {
        let clip = |one: &Range<u64>| one.start.max(asked.start)..one.end.min(asked.end);
        let expected: Vec<_> = whole
            .iter()
            .map(clip)
            .filter(|one| !one.is_empty())
            .collect();
        assert_eq!(
            joined(checked(source, asked.clone())),
            joined(expected),
            "{asked:?}"
        );
    }
    let past: u64 = checked(source, size..size + PAGE)
        .iter()
        .map(|one| one.end - one.start)
        .sum();
    assert_eq!(past, PAGE, "what is past the end is for a read to find out");
    pages
}

fn checked(source: &(impl PageReader + ?Sized), asked: Range<u64>) -> Vec<Range<u64>> {
    let found: Vec<_> = source.populated(asked.clone()).collect();
    for one in &found {
        assert!(
            asked.start <= one.start && one.start < one.end && one.end <= asked.end,
            "{one:?} of {asked:?}"
        );
    }
    assert!(found.is_sorted_by(|a, b| a.end <= b.start), "{found:?}");
    found
}

fn joined(ranges: Vec<Range<u64>>) -> Vec<Range<u64>> {
    let mut joined = Vec::<Range<u64>>::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range),
        }
    }
    joined
}

fn count(pages: &[bool]) -> usize {
    pages.iter().filter(|page| **page).count()
}

/// Memory in small pages, so that one that is touched is one that is there.
fn untouched(flags: Flags) -> Mapping {
    let mapping = match flags {
        Flags::Private => Mapping::private(SIZE as usize),
        Flags::Shared => Mapping::shared(SIZE as usize),
    };
    let _ = mapping.advise(0..SIZE as usize, MmapAdvise::MADV_NOHUGEPAGE);
    mapping
}

#[derive(Clone, Copy, Debug)]
enum Flags {
    Private,
    Shared,
}

fn guest(mapping: &Mapping) -> MappedMemory<'_> {
    let layout = RamLayout::single(0, SIZE).unwrap();
    MappedMemory::new(layout, [mapping.memory()]).unwrap()
}

fn touch(mapping: &Mapping, pages: impl IntoIterator<Item = u64>) -> Vec<bool> {
    let mut touched = vec![false; PAGES as usize];
    for page in pages {
        mapping.write_at((page * PAGE + 17) as usize, b"!");
        touched[page as usize] = true;
    }
    touched
}

const SOME: [u64; 6] = [0, 1, 7, 511, 512, PAGES - 1];

/// The file of a shared mapping is opened through `/proc/self/map_files`.
fn may_open_mappings(test: &str, flags: Flags) -> bool {
    matches!(flags, Flags::Private) || Need::Root.met(test)
}

#[rstest]
fn exactly_the_pages_of_anonymous_memory_that_were_written_are_populated(
    #[values(Flags::Private, Flags::Shared)] flags: Flags,
) {
    if !may_open_mappings("pages of shared anonymous memory", flags) {
        return;
    }
    let mapping = untouched(flags);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), 0);
    let touched = touch(&mapping, SOME);
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
}

#[test]
fn what_was_only_read_is_not_populated() {
    let mapping = untouched(Flags::Private);
    let touched = touch(&mapping, SOME);
    guest(&mapping)
        .read_at(0, &mut vec![0; SIZE as usize])
        .unwrap();
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
}

#[rstest]
fn what_was_given_back_is_not_populated(#[values(Flags::Private, Flags::Shared)] flags: Flags) {
    if !may_open_mappings("pages of shared anonymous memory", flags) {
        return;
    }
    let mapping = untouched(flags);
    let mut touched = touch(&mapping, 0..PAGES);
    let (advice, gone) = match flags {
        Flags::Private => (MmapAdvise::MADV_DONTNEED, 100..300),
        Flags::Shared => (MmapAdvise::MADV_REMOVE, 100..300),
    };
    mapping
        .advise(gone.start * PAGE as usize..gone.end * PAGE as usize, advice)
        .unwrap();
    touched[gone].fill(false);
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
}

/// As a balloon of shared memory does: the pages leave this process, and stay in the file.
#[test]
fn shared_pages_that_this_process_let_go_of_are_populated() {
    if !may_open_mappings("pages of shared anonymous memory", Flags::Shared) {
        return;
    }
    let mapping = untouched(Flags::Shared);
    let touched = touch(&mapping, SOME);
    mapping
        .advise(0..SIZE as usize, MmapAdvise::MADV_DONTNEED)
        .unwrap();
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
}

fn memfd(flags: MFdFlags) -> File {
    let memfd = File::from(memfd_create("ram", MFdFlags::MFD_CLOEXEC | flags).unwrap());
    memfd.set_len(SIZE).unwrap();
    memfd
}

#[test]
fn pages_of_a_memfd_that_this_process_never_mapped_or_touched_are_populated() {
    let memfd = memfd(MFdFlags::empty());
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
    let mut touched = touch(&mapping, SOME);
    memfd.write_all_at(b"!", 1000 * PAGE).unwrap(); // as another process would
    touched[1000] = true;
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
    assert_eq!(populated(&FileReader::new(&memfd), SIZE), touched);
}

/// The descriptor that the process still has leads to it where `/proc/self/map_files` is closed to it.
#[test]
fn an_unprivileged_process_finds_the_pages_of_a_memfd_that_it_has_open() {
    const INSIDE: &str = "PAGE_READER_TEST_UNPRIVILEGED";
    const NAME: &str = "an_unprivileged_process_finds_the_pages_of_a_memfd_that_it_has_open";
    if std::env::var_os(INSIDE).is_some() {
        let memfd = memfd(MFdFlags::empty());
        let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
        let touched = touch(&mapping, SOME);
        assert_eq!(populated(&guest(&mapping), SIZE), touched);
        drop(memfd);
        assert_eq!(count(&populated(&guest(&mapping), SIZE)), PAGES as usize);
        return;
    }
    if !Need::Root.met(NAME) {
        return;
    }
    use std::os::unix::process::CommandExt;
    let program = common::for_anyone();
    let output = Command::new(program.path())
        .args(["--exact", NAME])
        .env(INSIDE, "1")
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("1 passed"),
        "{output:?}"
    );
}

#[test]
fn all_of_a_privately_mapped_file_may_be_populated() {
    let memfd = memfd(MFdFlags::empty());
    memfd.write_all_at(b"!", 5 * PAGE).unwrap();
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, false);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), PAGES as usize);
}

/// None of them is there: neither asking nor reading takes one.
#[test]
fn huge_pages_that_a_memfd_lacks_are_not_populated() {
    let memfd = memfd(MFdFlags::MFD_HUGETLB);
    assert_eq!(count(&populated(&FileReader::new(&memfd), SIZE)), 0);
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), 0);
    assert_eq!(memfd.metadata().unwrap().blocks(), 0);
}

#[test]
fn a_huge_page_that_was_written_is_populated() {
    if !Need::HugePages.met("a_huge_page_that_was_written_is_populated") {
        return;
    }
    let memfd = memfd(MFdFlags::MFD_HUGETLB);
    let mapping = Mapping::of_file(memfd.as_fd(), SIZE as usize, true);
    let page = (SIZE / 2) as usize;
    mapping.write_at(page + (1 << 20), b"!");
    let mut expected = vec![false; PAGES as usize];
    expected[PAGES as usize / 2..][..512].fill(true);
    assert_eq!(populated(&FileReader::new(&memfd), SIZE), expected);
    assert_eq!(populated(&guest(&mapping), SIZE), expected);
}

/// A guest restored lazily: a missing page is not zeros, it is what the handler will put there. Nor does asking put anything there.
#[rstest]
fn all_of_what_userfaultfd_fills_on_first_touch_may_be_populated(
    #[values(Flags::Private, Flags::Shared)] flags: Flags,
) {
    let name = "all_of_what_userfaultfd_fills_on_first_touch_may_be_populated";
    if !Need::Userfaultfd.met(name) || !may_open_mappings(name, flags) {
        return;
    }
    let mapping = untouched(flags);
    let fault = common::uffd::register_missing(&mapping, SIZE as usize / 2);
    let pages = populated(&guest(&mapping), SIZE);
    assert_eq!(count(&pages[..PAGES as usize / 2]), PAGES as usize / 2);
    assert_eq!(count(&pages[PAGES as usize / 2..]), 0);
    drop(fault);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), 0);
}

/// As allocators of other threads do: the kernel then tells a mapping twice, in two sizes.
#[test]
fn mappings_that_grow_meanwhile_hide_nothing_of_what_is_known() {
    let name = "mappings_that_grow_meanwhile_hide_nothing_of_what_is_known";
    if !Need::Userfaultfd.met(name) {
        return;
    }
    let grow = || {
        for _ in 0..20 {
            let mappings = [(); 40].map(|()| Mapping::inaccessible(64 * PAGE as usize));
            for pages in 1..=64 {
                let growing = mappings.iter();
                growing.for_each(|mapping| mapping.allow(pages * PAGE as usize));
            }
        }
    };
    std::thread::scope(|scope| {
        let growing = scope.spawn(grow);
        let mapping = untouched(Flags::Private);
        // So that the list of mappings is read with their flags.
        let _fault = common::uffd::register_missing(&mapping, SIZE as usize / 2);
        while !growing.is_finished() {
            assert_eq!(
                count(&populated(&guest(&mapping), SIZE)),
                PAGES as usize / 2
            );
        }
    });
}

#[test]
fn swapped_out_pages_are_not_taken_for_empty() {
    if !Need::Root.met("swapped_out_pages_are_not_taken_for_empty") {
        return;
    }
    let test = "swapped_out_pages_are_not_taken_for_empty";
    let Some(_swap) = common::Swap::on(64 << 20, test) else {
        return;
    };
    common::stay_on_this_processor();
    for flags in [Flags::Private, Flags::Shared] {
        let mapping = untouched(flags);
        let touched = touch(&mapping, SOME);
        let entry = |page: u64| {
            let pagemap = File::open("/proc/self/pagemap").unwrap();
            let mut entry = [0; 8];
            let at = (mapping.address() / PAGE + page) * 8;
            pagemap.read_exact_at(&mut entry, at).unwrap();
            u64::from_ne_bytes(entry)
        };
        // Only advice: the kernel keeps a page that it is busy with.
        let start = std::time::Instant::now();
        while SOME.iter().all(|page| entry(*page) >> 63 == 1) {
            assert!(
                start.elapsed().as_secs() < 60,
                "{flags:?}: none left memory"
            );
            mapping
                .advise(0..SIZE as usize, MmapAdvise::MADV_PAGEOUT)
                .unwrap();
        }
        assert_eq!(populated(&guest(&mapping), SIZE), touched, "{flags:?}");
    }
}

#[test]
fn huge_pages_that_were_touched_are_populated_as_a_whole_at_most() {
    let mapping = Mapping::private(SIZE as usize);
    let _ = mapping.advise(0..SIZE as usize, MmapAdvise::MADV_HUGEPAGE);
    let touched = touch(&mapping, [3, 1500]);
    let pages = populated(&guest(&mapping), SIZE);
    assert!(
        touched
            .iter()
            .zip(&pages)
            .all(|(touched, populated)| populated >= touched)
    );
    assert!(count(&pages) <= 2 * 512);
}

#[test]
fn a_file_is_populated_where_it_has_data_and_its_position_stays() {
    use std::io::{Seek, SeekFrom};
    let mut file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[1; PAGE as usize], 512 * PAGE).unwrap();
    file.seek(SeekFrom::Start(3)).unwrap();
    let pages = populated(&FileReader::new(&file), SIZE);
    assert!(pages[512] && count(&pages) <= 16);
    let half = populated(&FileReader::range(&file, 512 * PAGE, SIZE / 2), SIZE / 2);
    assert!(half[0] && count(&half) <= 16);
    assert_eq!(file.stream_position().unwrap(), 3);
}

#[test]
fn what_a_file_lacks_at_its_end_is_for_a_read_to_find_out() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let found: Vec<_> = FileReader::new(&file).populated(0..SIZE + 100).collect();
    assert_eq!(found, [SIZE..SIZE + 100]);
    for (start, size) in [
        (u64::MAX, u64::MAX),
        (i64::MAX as u64, u64::MAX),
        (0, u64::MAX),
    ] {
        let source = FileReader::range(&file, start, size);
        let found: Vec<_> = source.populated(u64::MAX - 5..u64::MAX).collect();
        assert_eq!(joined(found), [u64::MAX - 5..u64::MAX]);
    }
}

#[test]
fn what_cannot_be_told_may_be_populated() {
    let null = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/null")
        .unwrap();
    assert_eq!(checked(&FileReader::new(&null), 5..50), [5..50]);
    let bytes = [0_u8; 100];
    let memory =
        page_reader::ProcessMemory::open(std::process::id(), [(bytes.as_ptr() as u64, 100)]);
    assert_eq!(checked(&memory.unwrap(), 5..50), [5..50]);
    // SAFETY: never read; the kernel is asked about addresses that nothing is mapped at.
    let unmapped = unsafe { HostMemory::new(std::ptr::without_provenance(PAGE as usize), 8192) };
    let layout = RamLayout::single(0, 8192).unwrap();
    let guest = MappedMemory::new(layout, [unmapped]).unwrap();
    assert_eq!(checked(&guest, 0..8192), [0..8192]);
}

#[test]
fn layers_are_populated_where_the_one_on_top_is() {
    let base = tempfile::tempfile().unwrap();
    base.set_len(SIZE).unwrap();
    base.write_all_at(&vec![1; 64 * PAGE as usize], 0).unwrap();
    let base = FileReader::new(base);
    let (empty, written) = (untouched(Flags::Private), untouched(Flags::Private));
    touch(&written, [2]);
    let (empty, written) = (guest(&empty), guest(&written));
    let mut layered = Layered::<&dyn PageReader>::over(&base, SIZE).unwrap();
    layered.overlay(32 * PAGE, 32 * PAGE, &empty).unwrap();
    layered.overlay(1000 * PAGE, 4 * PAGE, &written).unwrap();
    let mut expected = vec![false; PAGES as usize];
    expected[..32].fill(true);
    expected[1002] = true;
    assert_eq!(populated(&layered, SIZE), expected);
}

#[test]
fn pointers_to_a_reader_hide_nothing_of_what_it_knows() {
    // One that hands out no memory, of which the kernel could be asked.
    let memfd = memfd(MFdFlags::empty());
    memfd.write_all_at(b"!", 7 * PAGE).unwrap();
    let source = FileReader::new(&memfd);
    let pointers: [Box<dyn PageReader + '_>; 3] = [
        Box::new(&source),
        Box::new(Box::new(source.clone())),
        Box::new(Arc::new(source.clone())),
    ];
    for pointer in pointers {
        assert_eq!(count(&populated(&pointer, SIZE)), 1);
    }
}

#[cfg(feature = "vm-memory")]
#[test]
fn guest_memory_of_vm_memory_is_populated_where_it_was_written() {
    use page_reader::GuestMemoryReader;
    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    let ranges = [(GuestAddress(0), 1 << 20), (GuestAddress(1 << 32), 1 << 22)];
    let memory = GuestMemoryMmap::<()>::from_ranges(&ranges).unwrap();
    memory
        .write_slice(b"!", GuestAddress((1 << 32) + PAGE))
        .unwrap();
    let size = (1 << 20) + (1 << 22);
    let pages = populated(&GuestMemoryReader::new(&memory).unwrap(), size);
    assert!(pages[257] && count(&pages) <= 512);
}

#[test]
fn asking_of_memory_does_not_touch_it() {
    let mapping = Mapping::private(4 << 30);
    let layout = RamLayout::single(0, 4 << 30).unwrap();
    let guest = MappedMemory::new(layout, [mapping.memory()]).unwrap();
    assert_eq!(guest.populated(0..4 << 30).count(), 0);
    assert_eq!(mapping.resident(), 0);
}

/// One at a time: cases share what the kernel tells of the process.
static TURN: Mutex<()> = Mutex::new(());

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(24, 64)))]

    #[test]
    fn whatever_is_written_and_given_back_what_is_not_populated_reads_as_zeros(
        steps in prop::collection::vec((0..4_u8, 0..PAGES, 1..200_u64), 0..60),
        shared in any::<bool>(),
    ) {
        let _turn = TURN.lock();
        let mapping = if shared {
            let memfd = memfd(MFdFlags::empty());
            Mapping::of_file(memfd.as_fd(), SIZE as usize, true)
        } else {
            untouched(Flags::Private)
        };
        for (what, first, pages) in steps {
            let range = first..(first + pages).min(PAGES);
            let bytes = (range.start * PAGE) as usize..(range.end * PAGE) as usize;
            match what {
                0 => drop(touch(&mapping, range)),
                1 => drop(touch(&mapping, range.step_by(3))),
                2 => mapping.advise(bytes, MmapAdvise::MADV_DONTNEED).unwrap(),
                _ => guest(&mapping).read_at(first * PAGE, &mut vec![0; bytes.len()]).unwrap(),
            }
        }
        let pages = populated(&guest(&mapping), SIZE);
        for (page, populated) in pages.iter().enumerate() {
            let memory = mapping.memory().slice(page * PAGE as usize..(page + 1) * PAGE as usize);
            prop_assert!(*populated || memory.is_zero(), "page {}", page);
        }
    }
}
