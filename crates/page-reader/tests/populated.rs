//! Detection of populated memory of this process.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::Mutex;

use nix::sys::memfd::MFdFlags;
use nix::sys::mman::MmapAdvise;
use page_reader::{FileReader, HostMemory, MappedMemory, PageReader, RamLayout};
use proptest::prelude::*;
use rstest::rstest;
use support::populated::{
    Flags, PAGE, PAGES, SIZE, SOME, checked, count, guest, may_open_mappings, memfd, populated,
    touch, untouched,
};
use test_machine::{Need, needs};
use test_memory::Mapping;

#[rstest]
fn exactly_the_written_anonymous_pages_are_populated(
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
fn pages_that_were_only_read_are_not_populated() {
    let mapping = untouched(Flags::Private);
    let touched = touch(&mapping, SOME);
    guest(&mapping)
        .read_at(0, &mut vec![0; SIZE as usize])
        .unwrap();
    assert_eq!(populated(&guest(&mapping), SIZE), touched);
}

#[rstest]
fn pages_given_back_are_not_populated(#[values(Flags::Private, Flags::Shared)] flags: Flags) {
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

/// Like a balloon of shared memory: the pages leave this process and stay in the file.
#[test]
fn shared_pages_dropped_by_this_process_are_populated() {
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

/// A guest that is being restored: the handler provides missing pages, which are not zeros. Queries
/// do not fill pages.
#[rstest]
fn memory_filled_by_userfaultfd_may_be_populated_everywhere(
    #[values(Flags::Private, Flags::Shared)] flags: Flags,
) {
    let name = "memory_filled_by_userfaultfd_may_be_populated_everywhere";
    if !Need::Userfaultfd.met(name) || !may_open_mappings(name, flags) {
        return;
    }
    let mapping = untouched(flags);
    let fault = test_memory::register_missing(&mapping, SIZE as usize / 2);
    let pages = populated(&guest(&mapping), SIZE);
    assert_eq!(count(&pages[..PAGES as usize / 2]), PAGES as usize / 2);
    assert_eq!(count(&pages[PAGES as usize / 2..]), 0);
    drop(fault);
    assert_eq!(count(&populated(&guest(&mapping), SIZE)), 0);
}

/// Mappings grow like those of allocators in other threads. The kernel then lists a mapping twice,
/// with two sizes.
#[test]
fn growing_mappings_do_not_reduce_the_knowledge() {
    needs!(Userfaultfd);
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
        // Makes queries read the list of mappings with flags.
        let _fault = test_memory::register_missing(&mapping, SIZE as usize / 2);
        while !growing.is_finished() {
            assert_eq!(
                count(&populated(&guest(&mapping), SIZE)),
                PAGES as usize / 2
            );
        }
    });
}

#[test]
fn swapped_out_pages_are_populated() {
    needs!(Root);
    let Some(_swap) = test_memory::Swap::on(64 << 20, "swapped_out_pages_are_populated") else {
        return;
    };
    test_memory::stay_on_this_processor();
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
        // Repeated, because the kernel keeps pages that are in use.
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
fn touched_transparent_huge_pages_are_populated() {
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
fn unknown_sources_may_be_populated_everywhere() {
    let null = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/null")
        .unwrap();
    assert_eq!(checked(&FileReader::new(&null), 5..50), [5..50]);
    // SAFETY: never read; the kernel is queried about unmapped addresses.
    let unmapped = unsafe { HostMemory::new(std::ptr::without_provenance(PAGE as usize), 8192) };
    let layout = RamLayout::single(0, 8192).unwrap();
    let guest = MappedMemory::new(layout, [unmapped]).unwrap();
    assert_eq!(checked(&guest, 0..8192), [0..8192]);
}

#[cfg(feature = "vm-memory")]
#[test]
fn written_pages_of_vm_memory_are_populated() {
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
fn queries_do_not_touch_memory() {
    let mapping = Mapping::private(4 << 30);
    let layout = RamLayout::single(0, 4 << 30).unwrap();
    let guest = MappedMemory::new(layout, [mapping.memory()]).unwrap();
    assert_eq!(guest.populated(0..4 << 30).count(), 0);
    assert_eq!(mapping.resident(), 0);
}

/// Serializes the cases, which share the kernel's state of the process.
static TURN: Mutex<()> = Mutex::new(());

proptest! {
    #![proptest_config(ProptestConfig::with_cases(test_machine::rounds(24, 64)))]

    #[test]
    fn unpopulated_pages_read_as_zeros(
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
