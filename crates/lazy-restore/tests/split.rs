//! Memory that consists of several kernel mappings, because a call on a part of it has split it.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::io;
use std::ops::Range;
use std::sync::Arc;

use dirty_bitmap::{Policy, TrackedBitmap, WriteProtection, WriteTracker};
use lazy_restore::{LazyRam, WorkingSet};
use nix::errno::Errno;
use nix::libc;
use rstest::rstest;
use support::lazy_images::on_demand;
use support::open_chain;
use support::regions::{Regions, advise};
use test_images::{Images, whole};
use test_machine::needs;

const PAGE: u64 = 4096;
const MIB: u64 = 1 << 20;
/// Pages in the middle of a run of the images, and of a step of the filler.
const FIRST: u64 = 5;
const LAST: u64 = 700;

/// A full image with holes, and a diff: 4 MiB.
fn images() -> Images {
    Images::new(4 * MIB, PAGE)
        .with([0..300, 302..600, 650..1024])
        .with([100..104, 590..655])
}

fn protect(start: *mut u8, pages: Range<u64>, protection: libc::c_int) -> io::Result<()> {
    let len = (pages.end - pages.start) * PAGE;
    let start = start.wrapping_add((pages.start * PAGE) as usize);
    // SAFETY: the test owns the memory, and no Rust reference covers it.
    let done = unsafe { libc::mprotect(start.cast(), len as usize, protection) };
    Ok(Errno::result(done).map(drop)?)
}

fn advise_part(start: *mut u8, advice: libc::c_int) {
    let part = start.wrapping_add((FIRST * PAGE) as usize);
    advise(part, (LAST - FIRST) * PAGE, advice).unwrap();
}

fn exclude_from_core_dumps(start: *mut u8) {
    advise_part(start, libc::MADV_DONTDUMP);
}

fn use_small_pages(start: *mut u8) {
    advise_part(start, libc::MADV_NOHUGEPAGE);
}

fn read_in_random_order(start: *mut u8) {
    advise_part(start, libc::MADV_RANDOM);
}

fn lock_what_is_touched(start: *mut u8) {
    let part = start.wrapping_add((FIRST * PAGE) as usize);
    let len = ((LAST - FIRST) * PAGE) as usize;
    // SAFETY: the call changes no byte.
    let locked = unsafe { libc::mlock2(part.cast(), len, libc::MLOCK_ONFAULT) };
    Errno::result(locked).unwrap();
}

fn make_a_page_read_only(start: *mut u8) {
    protect(start, FIRST..FIRST + 1, libc::PROT_READ).unwrap();
}

fn make_every_second_page_read_only(start: *mut u8) {
    for page in (0..200).step_by(2) {
        protect(start, page..page + 1, libc::PROT_READ).unwrap();
    }
}

/// Returns the working set of a guest that touched all of its memory.
fn all_touched(images: &Images) -> WorkingSet {
    let ram = on_demand().record(true).start(open_chain(images)).unwrap();
    whole(&ram, ram.ram_size() as usize);
    ram.recorded()
}

/// The way in which the memory is filled.
#[derive(Clone, Copy)]
enum By {
    Wait,
    Prefetch,
    WorkingSet,
    Faults,
}

#[rstest]
fn memory_of_several_mappings_is_filled(
    #[values(
        exclude_from_core_dumps,
        use_small_pages,
        read_in_random_order,
        lock_what_is_touched,
        make_a_page_read_only,
        make_every_second_page_read_only
    )]
    split: fn(*mut u8),
    #[values(false, true)] before: bool,
    #[values(By::Wait, By::Prefetch, By::WorkingSet, By::Faults)] by: By,
) {
    needs!(Userfaultfd);
    let images = images();
    let regions = Regions::new(&[4 * MIB]);
    if before {
        split(regions.address(0));
    }
    let options = match by {
        By::Wait => on_demand(),
        By::Prefetch => LazyRam::options(),
        By::WorkingSet => LazyRam::options().working_set(all_touched(&images)),
        By::Faults => on_demand().fault_around(MIB),
    };
    let ram = regions.adopt(options, open_chain(&images)).unwrap();
    if !before {
        split(regions.address(0));
    }
    if matches!(by, By::Faults) {
        for page in (0..1024).rev() {
            let bytes = &images.ram[(page * PAGE) as usize..][..PAGE as usize];
            assert_eq!(regions.page(page * PAGE).unwrap(), bytes, "{page}");
        }
    }
    ram.wait().unwrap();
    let progress = ram.progress();
    assert_eq!(progress.done, progress.total);
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}

/// Protects memory, starting at a host address.
struct ByMprotect(*mut u8);

impl WriteProtection for ByMprotect {
    type Error = io::Error;

    fn protect(&self, range: Range<u64>) -> io::Result<()> {
        protect(
            self.0,
            range.start / PAGE..range.end / PAGE,
            libc::PROT_READ,
        )
    }

    fn unprotect(&self, range: Range<u64>) -> io::Result<()> {
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        protect(self.0, range.start / PAGE..range.end / PAGE, read_write)
    }
}

#[test]
fn memory_whose_writes_are_tracked_by_mprotect_is_filled() {
    needs!(Userfaultfd);
    let images = images();
    let ram = on_demand().start(open_chain(&images)).unwrap();
    let bitmap = Arc::new(TrackedBitmap::tracked(0, 4 * MIB, PAGE).unwrap());
    let tracker = WriteTracker::new(bitmap, Policy::Pages).unwrap();
    let protection = ByMprotect(ram.as_ptr());
    tracker.checkpoint(&protection).unwrap().release().unwrap();
    for page in [FIRST, LAST, LAST + 1] {
        tracker.on_write_fault(page * PAGE, &protection).unwrap();
    }
    ram.wait().unwrap();
    assert!(whole(&ram, ram.ram_size() as usize) == images.ram);
}
