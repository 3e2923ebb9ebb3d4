#![allow(unsafe_code)]

use std::thread;

use memory_image::Chain;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rstest::rstest;
use test_machine::needs;

use super::*;
use crate::memory::Memory;
use crate::page_buffer::PageBuffer;
use crate::region::{Region, host_page};

/// Pages that are stored in an image, with neither a handler nor a prefetcher.
struct Unfilled {
    pages: Pages,
    region: Region,
    _file: tempfile::NamedTempFile,
}

fn unfilled(len: u64) -> Unfilled {
    let page = host_page();
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![7; len as usize]).unwrap();
    let chain = Box::new(Chain::open_raw(file.path(), page).unwrap());
    let region = Region::zeros(len).unwrap();
    // SAFETY: the region is mapped until after the pages are dropped. No reference covers it, and
    // only the pages fill it.
    let memory = unsafe { Memory::new([(region.as_ptr(), len as usize)]) };
    let fault = Userfaultfd::open(page, None).unwrap();
    let can_poison = memory.register(&fault).unwrap();
    let settled = PageBits::none(len, page).unwrap();
    let pages = Pages::new(Parts {
        source: chain,
        target: Target::Own(memory),
        fault,
        can_poison,
        settled,
        counters: Arc::default(),
        status: Status::new(false).unwrap(),
    });
    Unfilled {
        pages: pages.unwrap(),
        region,
        _file: file,
    }
}

fn discard_first_page(region: &Region) {
    let (start, len) = (region.as_ptr().cast(), host_page() as usize);
    // SAFETY: nothing else accesses the page, which is mapped.
    let discarded = unsafe { libc::madvise(start, len, libc::MADV_DONTNEED) };
    assert_eq!(discarded, 0);
}

#[test]
fn messages_other_than_faults_are_counted() {
    const DISCARDS: u32 = 5;
    needs!(Userfaultfd);
    let unfilled = unfilled(host_page());
    let (pages, region) = (&unfilled.pages, &unfilled.region);
    let mut ledger = pages.ledger.lock();
    let mut counted = 0;
    thread::scope(|scope| {
        let discards = scope.spawn(|| (0..DISCARDS).for_each(|_| discard_first_page(region)));
        while !discards.is_finished() {
            counted += pages.record_messages(&mut ledger).unwrap();
            thread::yield_now();
        }
    });
    assert_eq!(counted, DISCARDS);
}

#[test]
fn waiting_prefetcher_gets_its_turn_before_the_next_fault() {
    /// More than are handled before a turn.
    const FAULTS: usize = 100;
    needs!(Userfaultfd);
    let unfilled = unfilled(host_page());
    let (pages, page) = (&unfilled.pages, host_page());
    let address = unfilled.region.as_ptr().addr() as u64;
    let mut ledger = pages.ledger.lock();
    (0..FAULTS).for_each(|_| ledger.turns.begin(true));
    ledger.waiting.push_back(address);
    drop(ledger);
    let (next, is_filled) = thread::scope(|scope| {
        scope.spawn(|| {
            let mut buffer = PageBuffer::new();
            pages.load(0..page, &mut buffer, Role::Prefetcher).unwrap();
        });
        while !pages.ledger.prefetcher_waits() {
            thread::yield_now();
        }
        let next = pages.next_fault(0).unwrap();
        let is_filled = pages.is_settled(0);
        // Without a turn, the prefetcher waits until it is stopped.
        pages.status.stop_prefetch();
        drop(pages.ledger.lock());
        pages.ledger.notify();
        (next, is_filled)
    });
    assert_eq!(next, Some(address));
    assert!(is_filled);
}

#[test]
fn stopped_prefetcher_gets_no_turn() {
    needs!(Userfaultfd);
    let unfilled = unfilled(host_page());
    let pages = &unfilled.pages;
    let mut ledger = pages.ledger.lock();
    (0..100).for_each(|_| ledger.turns.begin(true));
    ledger
        .waiting
        .push_back(unfilled.region.as_ptr().addr() as u64);
    drop(ledger);
    pages.status.stop_prefetch();
    assert!(pages.next_fault(0).unwrap().is_some());
    assert!(!pages.ledger.lock().turns.is_prefetching());
}

/// In its turn, the handler waits for the prefetcher. Otherwise the handler must read the messages:
/// it would not be woken for a fault that the prefetcher has read.
#[rstest]
fn prefetcher_reads_messages_only_in_its_turn(#[values(false, true)] in_turn: bool) {
    needs!(Userfaultfd);
    let unfilled = unfilled(host_page());
    let (pages, region) = (&unfilled.pages, &unfilled.region);
    if in_turn {
        let turns = &mut pages.ledger.lock().turns;
        (0..100).for_each(|_| turns.begin(true));
        assert!(turns.begin_prefetch(true));
    }
    let calls = AtomicU64::new(0);
    let mut read = 0;
    thread::scope(|scope| {
        let discard = scope.spawn(|| discard_first_page(region));
        let mut messages = [PollFd::new(pages.messages(), PollFlags::POLLIN)];
        poll(&mut messages, PollTimeout::NONE).unwrap();
        let settled = pages.settle(0..host_page(), Role::Prefetcher, |_, _| {
            if calls.fetch_add(1, Ordering::Relaxed) > 0 {
                pages.status.stop_prefetch();
            }
            let stop = Some(Errno::EAGAIN);
            Filled { bytes: 0, stop }
        });
        settled.unwrap();
        read = pages.changes();
        while !discard.is_finished() {
            pages.record_messages(&mut pages.ledger.lock()).unwrap();
            thread::yield_now();
        }
    });
    assert_eq!(read, u64::from(in_turn));
}

#[test]
fn turn_of_the_prefetcher_ends_after_a_step() {
    needs!(Userfaultfd);
    let unfilled = unfilled(3 * STEP);
    let pages = &unfilled.pages;
    let mut ledger = pages.ledger.lock();
    (0..100).for_each(|_| ledger.turns.begin(true));
    assert!(ledger.turns.begin_prefetch(true));
    drop(ledger);
    let steps = AtomicU64::new(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            let settled = pages.settle(0..3 * STEP, Role::Prefetcher, |_, part| {
                steps.fetch_add(1, Ordering::Relaxed);
                let bytes = part.end - part.start;
                Filled { bytes, stop: None }
            });
            settled.unwrap();
        });
        while pages.ledger.lock().turns.is_prefetching() {
            thread::yield_now();
        }
        pages.status.stop_prefetch();
        drop(pages.ledger.lock());
        pages.ledger.notify();
    });
    assert_eq!(steps.into_inner(), 1);
}

#[test]
fn memory_of_several_mappings_is_filled_with_zeros() {
    needs!(Userfaultfd);
    let page = host_page();
    let unfilled = unfilled(4 * page);
    let (pages, start) = (&unfilled.pages, unfilled.region.as_ptr());
    let second = start.wrapping_add(page as usize).cast();
    // SAFETY: the page is mapped. The advice changes no byte, and splits the mapping.
    let advised = unsafe { libc::madvise(second, page as usize, libc::MADV_RANDOM) };
    assert_eq!(advised, 0);
    pages.zero(0..4 * page, Role::Handler).unwrap();
    for number in 0..4 {
        let stop = pages.occupy(number * page).stop;
        assert_eq!(stop, Some(Errno::EEXIST), "page {number} is filled");
    }
}

#[test]
fn unmapped_part_is_an_error_that_names_it() {
    needs!(Userfaultfd);
    let page = host_page();
    let unfilled = unfilled(4 * page);
    let (pages, start) = (&unfilled.pages, unfilled.region.as_ptr().addr());
    thread::scope(|scope| {
        let unmap = scope.spawn(move || {
            let part = std::ptr::with_exposed_provenance_mut(start + page as usize);
            // SAFETY: nothing accesses the two pages, and nothing is mapped in their place.
            assert_eq!(unsafe { libc::munmap(part, 2 * page as usize) }, 0);
        });
        while !unmap.is_finished() {
            pages.record_messages(&mut pages.ledger.lock()).unwrap();
            thread::yield_now();
        }
    });
    let error = pages.status.failure().unwrap();
    assert!(
        matches!(
            **error,
            LazyError::Userfaultfd(UserfaultfdError::Unmapped { offset, len })
                if (offset, len) == (page, 2 * page)
        ),
        "{error:?}"
    );
}

#[test]
fn both_addresses_of_moved_memory_are_recorded() {
    needs!(Userfaultfd);
    let page = host_page();
    let len = 2 * page as usize;
    // Dropped after the pages: nothing reads the message that it is unmapped.
    let elsewhere = Region::zeros(2 * page).unwrap();
    let unfilled = unfilled(4 * page);
    let pages = &unfilled.pages;
    let from = unfilled.region.as_ptr().addr() + page as usize;
    let to = elsewhere.as_ptr().expose_provenance();
    thread::scope(|scope| {
        let moving = scope.spawn(move || {
            let pointer = std::ptr::with_exposed_provenance_mut::<libc::c_void>;
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            // SAFETY: nothing accesses the pages at either address.
            let moved = unsafe { libc::mremap(pointer(from), len, len, flags, pointer(to)) };
            assert_eq!(moved.addr(), to);
        });
        while !moving.is_finished() {
            pages.record_messages(&mut pages.ledger.lock()).unwrap();
            thread::yield_now();
        }
    });
    let range = |start: usize| start as u64..(start + len) as u64;
    assert_eq!(pages.ledger.lock().moved, [range(to), range(from)]);
}
