//! Lazily filled memory that is shared, inherited by children, discarded, unmapped or moved.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::ptr::NonNull;
use std::sync::atomic::{AtomicBool, Ordering};

use lazy_restore::{LazyError, LazyRam, UserfaultfdError, WorkingSet};
use nix::libc;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use page_reader::PageReader;
use rstest::rstest;
use support::lazy_images::{MIB, PAGE, bytes, images, on_demand};
use support::open_chain;
use support::regions::{Regions, advise, assert_unreadable, page_at};
use test_images::{Images, whole};
use test_machine::{needs, rounds};

const ZEROS: [u8; PAGE as usize] = [0; PAGE as usize];

#[derive(Clone, Copy)]
enum Owner {
    Library,
    Vmm,
}

/// Like a balloon device, which discards pages that the guest does not use.
#[rstest]
fn discarded_page_is_zeros(
    #[values(Owner::Library, Owner::Vmm)] owner: Owner,
    #[values(libc::MADV_DONTNEED, libc::MADV_FREE)] advice: libc::c_int,
    #[values(false, true)] ahead: bool,
) {
    needs!(Userfaultfd);
    let mut images = images();
    let original = images.ram.clone();
    let options = LazyRam::options().prefetch(ahead);
    let regions = Regions::new(&[2 * MIB, 2 * MIB]);
    let ram = match owner {
        Owner::Library => options.start(open_chain(&images)).unwrap(),
        Owner::Vmm => regions.adopt(options, open_chain(&images)).unwrap(),
    };
    let address = |page: u64| {
        let memory = ram.host_memory(page * PAGE, 1).unwrap();
        memory.as_ptr().cast_mut()
    };
    // A filled page, and a neighbor that the same fault fills; an untouched page; a page discarded
    // twice.
    assert_eq!(page_at(address(20)).unwrap(), bytes(&images, 20));
    for page in [20, 21, 300, 300, 700, 1023] {
        let filled = page < 22;
        if filled && advice == libc::MADV_FREE {
            // The kernel may keep the bytes of a filled page for any time.
            continue;
        }
        advise(address(page), PAGE, advice).unwrap();
        if advice == libc::MADV_DONTNEED {
            assert_eq!(page_at(address(page)).unwrap(), ZEROS, "{page}");
        }
        let lost = &mut images.ram[(page * PAGE) as usize..][..PAGE as usize];
        lost.fill(0);
    }
    // The guest writes to a discarded page.
    // SAFETY: inside the memory, which nothing else accesses at the time.
    unsafe { address(700).write(7) };
    images.ram[(700 * PAGE) as usize] = 7;
    ram.wait().unwrap();
    let mut found = whole(&ram, ram.ram_size() as usize);
    if advice == libc::MADV_FREE && ahead {
        // They may have been filled before, and the kernel may keep them.
        for page in [300, 1023] {
            let start = (page * PAGE) as usize;
            let page = &mut found[start..start + PAGE as usize];
            assert!(page == ZEROS || page == &original[start..start + PAGE as usize]);
            page.fill(0);
        }
        let page = &mut found[(700 * PAGE) as usize..][1..PAGE as usize];
        assert!(
            page == &ZEROS[1..] || page == &original[(700 * PAGE) as usize..][1..PAGE as usize]
        );
        page.fill(0);
    }
    assert!(found == images.ram);
    // After completion the memory is ordinary memory.
    advise(address(40), PAGE, libc::MADV_DONTNEED).unwrap();
    assert_eq!(page_at(address(40)).unwrap(), ZEROS);
}

#[test]
fn discarding_during_prefetch_leaves_zeros() {
    needs!(Userfaultfd);
    for round in 0..rounds(5, 50) {
        let mut images = images();
        let ram = LazyRam::options().start(open_chain(&images)).unwrap();
        for page in (0..1024).rev().step_by(7 + round) {
            let address = ram.as_ptr().wrapping_add((page * PAGE) as usize);
            advise(address, PAGE, libc::MADV_DONTNEED).unwrap();
            images.ram[(page * PAGE) as usize..][..PAGE as usize].fill(0);
            assert_eq!(page_at(address).unwrap(), ZEROS, "{page}");
        }
        ram.wait().unwrap();
        assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    }
}

/// Like a balloon device with many queues: filling completes although faults never cease. The
/// threads run until it has completed.
#[rstest]
#[case::read_ahead(true)]
#[case::read_by_the_waiting_thread(false)]
fn filling_completes_while_threads_discard_and_touch(#[case] ahead: bool) {
    const THREADS: u64 = 12;
    needs!(Userfaultfd);
    let pages = 32 * MIB / PAGE;
    let mut images = Images::new(32 * MIB, PAGE).with([0..pages]);
    let ram = LazyRam::options().prefetch(ahead);
    let ram = ram.start(open_chain(&images)).unwrap();
    let page = |thread: u64| (thread * 4 * PAGE) as usize;
    let ended = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let (ram, ended) = (&ram, &ended);
            scope.spawn(move || {
                let address = ram.as_ptr().wrapping_add(page(thread));
                while !ended.load(Ordering::Relaxed) {
                    advise(address, PAGE, libc::MADV_DONTNEED).unwrap();
                    // SAFETY: inside the memory, and only read.
                    assert_eq!(unsafe { address.read_volatile() }, 0);
                }
            });
        }
        let waited = ram.wait();
        ended.store(true, Ordering::Relaxed);
        waited.unwrap();
    });
    for thread in 0..THREADS {
        let start = page(thread);
        // A thread may have started after filling had completed.
        advise(ram.as_ptr().wrapping_add(start), PAGE, libc::MADV_DONTNEED).unwrap();
        images.ram[start..start + PAGE as usize].fill(0);
    }
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

/// The kernel blocks `madvise` until its message is read: the reader must not end before.
#[rstest]
#[case::all_in(true)]
#[case::dropped(false)]
fn blocked_discard_continues_when_filling_ends(#[case] all_in: bool) {
    needs!(Userfaultfd);
    let chain = std::sync::Arc::new(open_chain(&images()));
    for _ in 0..rounds(50, 1000) {
        let regions = Regions::new(&[4 * MIB]);
        // SAFETY: mapped until the end of the round.
        let ram = unsafe { on_demand().adopt(chain.clone(), regions.0.iter().copied()) }.unwrap();
        let ended = AtomicBool::new(false);
        let address = regions.address(0).addr();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !ended.load(Ordering::Relaxed) {
                    let address = std::ptr::with_exposed_provenance_mut(address);
                    advise(address, 4 * MIB, libc::MADV_DONTNEED).unwrap();
                }
            });
            if all_in {
                ram.wait().unwrap();
            }
            drop(ram);
            ended.store(true, Ordering::Relaxed);
        });
    }
}

fn assert_unmapped(error: &LazyError, offset: u64, len: u64) {
    let LazyError::Userfaultfd(UserfaultfdError::Unmapped {
        offset: at,
        len: bytes,
    }) = error
    else {
        panic!("{error:?}")
    };
    assert_eq!((*at, *bytes), (offset, len));
}

#[rstest]
#[case::all_in(true)]
#[case::dropped(false)]
fn mapping_that_replaces_unmapped_memory_is_untouched(#[case] all_in: bool) {
    needs!(Userfaultfd);
    let images = images();
    let regions = Regions::new(&[4 * MIB]);
    let ram = regions.adopt(on_demand(), open_chain(&images)).unwrap();
    let hole = NonNull::new(regions.address(8 * PAGE)).unwrap();
    // SAFETY: nothing accesses these pages. The test owns the second mapping.
    unsafe {
        munmap(hole.cast(), 4 * PAGE as usize).unwrap();
        let length = std::num::NonZeroUsize::new(4 * PAGE as usize);
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_FIXED_NOREPLACE;
        let again = mmap_anonymous(hole.addr().into(), length.unwrap(), access, flags).unwrap();
        assert_eq!(again.addr(), hole.addr());
        hole.write(5);
    }
    if all_in {
        assert_unmapped(&ram.wait().unwrap_err(), 8 * PAGE, 4 * PAGE);
        assert_eq!(regions.page(7 * PAGE).unwrap(), bytes(&images, 7));
        assert_eq!(regions.page(12 * PAGE).unwrap(), bytes(&images, 12));
    }
    // `munmap` returns once its message was read, and the error is recorded right after that.
    while ram.error().is_none() {
        std::thread::yield_now();
    }
    assert_unmapped(ram.error().unwrap(), 8 * PAGE, 4 * PAGE);
    drop(ram);
    assert_eq!(regions.page(8 * PAGE).unwrap()[0], 5);
    assert_eq!(regions.page(9 * PAGE).unwrap(), ZEROS);
    if !all_in {
        assert_unreadable(regions.page(7 * PAGE));
        assert_unreadable(regions.page(12 * PAGE));
    }
}

/// Without the remap event, moved memory loses its userfaultfd.
#[test]
fn moved_memory_never_shows_zeros() {
    needs!(Userfaultfd);
    let images = images();
    let regions = Regions::new(&[2 * MIB, 2 * MIB]);
    let elsewhere = Regions::new(&[4 * PAGE]);
    let options = on_demand().fault_around(1);
    let ram = regions.adopt(options, open_chain(&images)).unwrap();
    assert_eq!(regions.page(9 * PAGE).unwrap(), bytes(&images, 9));
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
    let (from, to) = (regions.address(8 * PAGE), elsewhere.address(0));
    let len = 4 * PAGE as usize;
    // SAFETY: nothing accesses either range during the call.
    let moved = unsafe { libc::mremap(from.cast(), len, len, flags, to) };
    assert_eq!(moved, to.cast());
    assert_unreadable(elsewhere.page(0));
    assert_unreadable(elsewhere.page(2 * PAGE));
    assert_eq!(elsewhere.page(PAGE).unwrap(), bytes(&images, 9));
    assert_unmapped(&ram.wait().unwrap_err(), 8 * PAGE, 4 * PAGE);
    assert_unreadable(elsewhere.page(3 * PAGE));
    assert_eq!(regions.page(7 * PAGE).unwrap(), bytes(&images, 7));
    drop(ram);
    // A discarded page is zeros here as well.
    advise(elsewhere.address(0), PAGE, libc::MADV_DONTNEED).unwrap();
    assert_eq!(elsewhere.page(0).unwrap(), ZEROS);
}

/// The old addresses stay mapped and registered, without the filled pages.
#[rstest]
#[case::touched_before_all_is_in(true)]
#[case::touched_after_all_is_in(false)]
fn memory_moved_without_unmapping_never_shows_zeros(#[case] before: bool) {
    needs!(Userfaultfd);
    let images = images();
    let regions = Regions::new(&[4 * MIB]);
    let elsewhere = Regions::new(&[4 * PAGE]);
    let options = on_demand().fault_around(1);
    let ram = regions.adopt(options, open_chain(&images)).unwrap();
    assert_eq!(regions.page(9 * PAGE).unwrap(), bytes(&images, 9));
    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | libc::MREMAP_DONTUNMAP;
    let (from, to) = (regions.address(8 * PAGE), elsewhere.address(0));
    let len = 4 * PAGE as usize;
    // SAFETY: nothing accesses either range during the call.
    let moved = unsafe { libc::mremap(from.cast(), len, len, flags, to) };
    assert_eq!(moved, to.cast());
    let assert_denied = || {
        for page in 8..12 {
            assert_unreadable(regions.page(page * PAGE));
        }
        for page in [0, 2, 3] {
            assert_unreadable(elsewhere.page(page * PAGE));
        }
        assert_eq!(elsewhere.page(PAGE).unwrap(), bytes(&images, 9));
    };
    if before {
        assert_denied();
    }
    assert_unmapped(&ram.wait().unwrap_err(), 8 * PAGE, 4 * PAGE);
    assert_denied();
    assert_eq!(regions.page(7 * PAGE).unwrap(), bytes(&images, 7));
    assert_eq!(regions.page(12 * PAGE).unwrap(), bytes(&images, 12));
    drop(ram);
    assert_denied();
}

#[test]
fn memory_added_by_mapping_growth_is_zeros() {
    needs!(Userfaultfd);
    let images = images();
    let mut regions = Regions::new(&[5 * MIB]);
    let end = NonNull::new(regions.address(4 * MIB)).unwrap();
    regions.0[0].1 = 4 * MIB as usize;
    let ram = regions.adopt(on_demand(), open_chain(&images)).unwrap();
    // Not before: the stack of a thread of the filling could take the place.
    // SAFETY: nothing accesses these pages.
    unsafe { munmap(end.cast(), MIB as usize) }.unwrap();
    let (old, new) = (4 * MIB as usize, 5 * MIB as usize);
    // SAFETY: as above; it does not move.
    let grown = unsafe { libc::mremap(regions.address(0).cast(), old, new, 0) };
    assert_eq!(grown, regions.address(0).cast());
    assert_eq!(page_at(end.as_ptr()).unwrap(), ZEROS);
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
    drop(ram);
    regions.0[0].1 = new;
}

/// RAM of 9 pages of 512 bytes: 4608 bytes.
#[test]
fn working_set_that_ends_inside_a_page_is_loaded() {
    needs!(Userfaultfd);
    let images = Images::new(9 * 512, 512).with([0..9]);
    let ram = LazyRam::options()
        .record(true)
        .start(open_chain(&images))
        .unwrap();
    for offset in [4600, 0] {
        ram.read_at(offset, &mut [0]).unwrap();
    }
    let file = images.dir().join("set");
    ram.recorded().save(&file).unwrap();
    let set = WorkingSet::load(&file).unwrap();
    assert!(set.runs().eq([4096..4608, 0..4096]), "{set:?}");
    let ram = LazyRam::options()
        .working_set(set)
        .start(open_chain(&images))
        .unwrap();
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

/// A page that cannot be read, is discarded and touched again has only one first touch.
#[test]
fn page_is_recorded_once_after_errors_and_discards() {
    needs!(Userfaultfd);
    let images = Images::new(2 * PAGE, PAGE).with([0..2]);
    let ram = LazyRam::options()
        .record(true)
        .start(open_chain(&images))
        .unwrap();
    images.cut(0, 0);
    for _ in 0..3 {
        assert_unreadable(page_at(ram.as_ptr()));
    }
    advise(ram.as_ptr(), PAGE, libc::MADV_DONTNEED).unwrap();
    assert_eq!(page_at(ram.as_ptr()).unwrap(), ZEROS);
    let file = images.dir().join("set");
    ram.recorded().save(&file).unwrap();
    assert!(WorkingSet::load(&file).unwrap().runs().eq([0..PAGE]));
}
