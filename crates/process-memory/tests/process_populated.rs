//! Detection of populated memory of another process.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::fs::{self, File};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use nix::sys::signal::{Signal, kill};
use page_reader::PageReader;
use process_memory::{ProcessMaps, ProcessMemory, ProcessMemoryError};
use support::child::Child;
use test_machine::{Need, needs};
use test_memory::{Mapping, PAGE};

const PAGES: usize = 2048;

/// Returns a reader for all of `mapping` in the child.
fn guest(child: &Child, mapping: &Mapping) -> ProcessMemory {
    let range = (mapping.address(), (PAGES * PAGE) as u64);
    ProcessMemory::open(child.pid(), [range]).unwrap()
}

fn untouched() -> Mapping {
    let mapping = Mapping::private(PAGES * PAGE);
    let _ = mapping.advise(0..PAGES * PAGE, MmapAdvise::MADV_NOHUGEPAGE);
    mapping
}

/// Creates a memfd with a unique name, because a child has the mappings of other tests of this
/// process too.
fn memfd(name: &str) -> File {
    let memfd = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
    memfd.set_len((PAGES * PAGE) as u64).unwrap();
    memfd
}

/// Returns the pages that may be populated, and checks that the ranges are whole pages.
fn populated(guest: &ProcessMemory) -> Vec<usize> {
    let pages = |range: Range<u64>| {
        assert!(range.start.is_multiple_of(PAGE as u64) && range.end.is_multiple_of(PAGE as u64));
        range.start as usize / PAGE..range.end as usize / PAGE
    };
    let all = guest.populated(0..(PAGES * PAGE) as u64);
    all.flat_map(pages).collect()
}

fn all() -> Vec<usize> {
    (0..PAGES).collect()
}

#[test]
fn a_part_of_a_touched_page_is_populated() {
    let bytes = [0_u8; 100];
    let range = (bytes.as_ptr() as u64, 100);
    let memory = ProcessMemory::open(std::process::id(), [range]).unwrap();
    assert_eq!(memory.populated(5..50).collect::<Vec<_>>(), [5..50]);
}

#[test]
fn exactly_the_pages_that_the_process_wrote_are_populated() {
    let mapping = untouched();
    mapping.write_at(5 * PAGE, b"!");
    // SAFETY: stores to memory.
    let child = unsafe { Child::stopped_after(|| mapping.write_at(1000 * PAGE, b"!")) };
    mapping.write_at(7 * PAGE, b"this one's own");
    let guest = guest(&child, &mapping);
    assert_eq!(populated(&guest), [5, 1000]);
    let some: Vec<_> = guest
        .populated(5 * PAGE as u64 + 1..1000 * PAGE as u64 + 9)
        .collect();
    let page = |index: usize| (index * PAGE) as u64;
    assert_eq!(some, [page(5) + 1..page(6), page(1000)..page(1000) + 9]);
    let smaps = fs::read_to_string(format!("/proc/{}/smaps", child.pid())).unwrap();
    let header = format!("{:x}-", mapping.address());
    let mut mapping = smaps.lines().skip_while(|line| !line.starts_with(&header));
    assert_eq!(
        mapping.find(|line| line.starts_with("Rss:")).unwrap(),
        "Rss:                   8 kB"
    );
}

#[test]
fn populated_covers_several_ranges_of_a_guest() {
    let mapping = untouched();
    mapping.write_at(5 * PAGE, b"!");
    mapping.write_at(1000 * PAGE, b"!");
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
    let page = |index: usize| (index * PAGE) as u64;
    let start = mapping.address();
    let ranges = [(start + page(1000), page(1)), (start + page(4), page(2))];
    let guest = ProcessMemory::open(child.pid(), ranges).unwrap();
    let found: Vec<_> = guest.populated(0..page(4)).collect();
    // The last range is past the end.
    assert_eq!(found, [0..page(1), page(2)..page(3), page(3)..page(4)]);
}

/// With the file open in the process, and with the mapping only.
#[rstest::rstest]
fn shared_pages_of_the_file_are_populated(#[values(true, false)] open: bool) {
    if !open && !Need::Root.met("shared_pages_of_the_file_are_populated") {
        return;
    }
    let name = if open {
        "ram of it"
    } else {
        "ram whose file is closed"
    };
    let memfd = memfd(name);
    let mapping = Mapping::of_file(memfd.as_fd(), PAGES * PAGE, true);
    memfd.write_all_at(b"!", 9 * PAGE as u64).unwrap();
    let close = || {
        if !open {
            let _ = nix::unistd::close(std::os::fd::AsRawFd::as_raw_fd(&memfd));
        }
    };
    // SAFETY: a system call and a store to memory.
    let child = unsafe {
        Child::stopped_after(|| {
            close();
            mapping.write_at(1000 * PAGE, b"!");
        })
    };
    let blocks = memfd.metadata().unwrap().blocks();
    assert_eq!(populated(&guest(&child, &mapping)), [9, 1000]);
    assert_eq!(memfd.metadata().unwrap().blocks(), blocks);

    let maps = ProcessMaps::of(child.pid()).unwrap();
    let region = maps.named(format!("/memfd:{name}")).unwrap();
    assert_eq!(region.addresses.start, mapping.address());
    assert_eq!(region.size(), (PAGES * PAGE) as u64);
    assert!(region.permissions.shared && region.inode == memfd.metadata().unwrap().ino());
    assert_eq!(maps.at(mapping.address() + 1), Some(region));
}

#[test]
fn a_privately_mapped_file_may_be_populated_everywhere() {
    let memfd = memfd("ram of its own");
    let mapping = Mapping::of_file(memfd.as_fd(), PAGES * PAGE, false);
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
    assert_eq!(populated(&guest(&child, &mapping)), all());
}

/// A guest that is being restored.
#[test]
fn memory_filled_by_userfaultfd_is_not_read_as_zeros() {
    needs!(Userfaultfd);
    let mapping = untouched();
    let register = || std::mem::forget(test_memory::register_missing(&mapping, PAGES * PAGE));
    // SAFETY: system calls; the paths are too short for an allocation.
    let child = unsafe { Child::stopped_after(register) };
    let guest = guest(&child, &mapping);
    assert_eq!(populated(&guest), all());
    let error = guest.read_at(0, &mut [0; PAGE]).unwrap_err();
    let error: ProcessMemoryError = error.downcast().unwrap();
    assert!(matches!(error, ProcessMemoryError::Unreadable { .. }));
    for words in ["userfaultfd", "wait until the restore has finished"] {
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn swapped_out_pages_of_the_process_are_populated() {
    let test = "swapped_out_pages_of_the_process_are_populated";
    needs!(Root);
    let Some(_swap) = test_memory::Swap::on(64 << 20, test) else {
        return;
    };
    let mapping = untouched();
    let swap_out = || {
        test_memory::stay_on_this_processor();
        mapping.write_at(5 * PAGE, b"!");
        mapping.write_at(1000 * PAGE, b"!");
        // Repeated, because the kernel keeps pages that are in use.
        for _ in 0..100 {
            let _ = mapping.advise(0..PAGES * PAGE, MmapAdvise::MADV_PAGEOUT);
        }
    };
    // SAFETY: stores to memory and system calls.
    let child = unsafe { Child::stopped_after(swap_out) };
    let pagemap = File::open(format!("/proc/{}/pagemap", child.pid())).unwrap();
    let mut entry = [0; 8];
    let page = mapping.address() / PAGE as u64 + 1000;
    pagemap.read_exact_at(&mut entry, page * 8).unwrap();
    assert_eq!(u64::from_ne_bytes(entry) >> 62, 1, "swapped, not present");
    assert_eq!(populated(&guest(&child, &mapping)), [5, 1000]);
}

#[test]
fn everything_may_be_populated_after_exit_or_exec() {
    let mapping = untouched();
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
    let guest = guest(&child, &mapping);
    assert!(populated(&guest).is_empty());
    let mut started_before = guest.populated(0..(PAGES * PAGE) as u64);
    kill(child.0, Signal::SIGCONT).unwrap();
    let start = Instant::now();
    while guest.read_at(0, &mut [0]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "exec failed");
        std::thread::yield_now();
    }
    assert_eq!(started_before.next(), Some(0..(PAGES * PAGE) as u64));
    assert_eq!(populated(&guest), all());
    drop(child);
    assert_eq!(populated(&guest), all());
}
