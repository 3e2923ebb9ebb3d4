//! Every way to fill a missing page, and every reason for which a request stops.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use nix::errno::Errno;
use nix::sys::mman::{ProtFlags, mprotect};
use support::{
    Memory, discard, in_thread, load, load_by_kernel, next_event, next_fault, page_of, page_size,
    pointer, register, store, waiting,
};
use test_machine::needs;
use uffd::{
    Event, FaultFlags, Features, FillFlags, Filled, Modes, MoveFlags, Operations, Stop, Userfaultfd,
};

const WAKE: FillFlags = FillFlags::empty();

fn open(features: Features) -> Userfaultfd {
    Userfaultfd::options().features(features).open().unwrap()
}

fn all(bytes: u64) -> Filled {
    Filled { bytes, stop: None }
}

fn stopped(bytes: u64, stop: Stop) -> Filled {
    let stop = Some(stop);
    Filled { bytes, stop }
}

#[test]
fn copied_bytes_end_the_wait_of_a_reader() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::empty()), Memory::private(2));
    let operations = register(&fault, memory.range(), Modes::MISSING);
    assert!(operations.contains(Operations::COPY | Operations::ZEROPAGE | Operations::WAKE));
    let address = memory.address(1);
    let reader = in_thread(move || load(address + 5));
    assert_eq!(next_fault(&fault), (address, FaultFlags::empty()));
    let filled = fault.copy_bytes(address, &page_of(7), WAKE);
    assert_eq!(filled, all(page_size()));
    assert_eq!(reader.join().unwrap(), 7);
}

#[test]
fn copies_by_address_read_the_source() {
    needs!(Userfaultfd);
    let (fault, memory, source) = (
        open(Features::empty()),
        Memory::private(1),
        Memory::private(1),
    );
    register(&fault, memory.range(), Modes::MISSING);
    store(source.address(0) + 9, 3);
    // SAFETY: nothing else writes the source.
    let filled = unsafe { fault.copy(memory.address(0), source.address(0), page_size(), WAKE) };
    assert_eq!(filled, all(page_size()));
    assert_eq!(load(memory.address(0) + 9), 3);
}

#[test]
fn zeros_end_the_wait_of_a_writer() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::empty()), Memory::private(1));
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    let writer = in_thread(move || store(address, 9));
    assert_eq!(next_fault(&fault), (address, FaultFlags::WRITE));
    assert_eq!(fault.zeropage(memory.page(0), WAKE), all(page_size()));
    writer.join().unwrap();
    assert_eq!((load(address), load(address + 1)), (9, 0));
}

#[test]
fn without_waking_a_reader_waits_for_wake() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::empty()), Memory::private(1));
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    next_fault(&fault);
    let filled = fault.copy_bytes(address, &page_of(4), FillFlags::NO_WAKE);
    assert_eq!(filled, all(page_size()));
    assert_eq!(waiting(&fault), 1);
    fault.wake(memory.page(0)).unwrap();
    assert_eq!(reader.join().unwrap(), 4);
}

#[test]
fn unregistered_memory_is_zeros_and_its_readers_wake() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::empty()), Memory::private(1));
    register(&fault, memory.range(), Modes::MISSING);
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    next_fault(&fault);
    fault.unregister(memory.range()).unwrap();
    assert_eq!(reader.join().unwrap(), 0);
    let filled = fault.zeropage(memory.range(), WAKE);
    assert_eq!(filled, stopped(0, Stop::NotRegistered));
}

#[test]
fn poisoned_pages_fail_when_they_are_read() {
    const TEST: &str = "poisoned_pages_fail_when_they_are_read";
    needs!(Userfaultfd);
    if !supports(Features::POISON, TEST) {
        return;
    }
    let (fault, memory) = (open(Features::POISON), Memory::private(2));
    let operations = register(&fault, memory.range(), Modes::MISSING);
    assert!(operations.contains(Operations::POISON));
    let address = memory.address(0);
    let reader = in_thread(move || load_by_kernel(address));
    next_fault(&fault);
    assert_eq!(fault.poison(memory.page(0), WAKE), all(page_size()));
    assert_eq!(reader.join().unwrap(), Err(Errno::EFAULT));
    assert_eq!(
        fault.poison(memory.page(0), WAKE),
        stopped(0, Stop::Present)
    );
    assert_eq!(fault.zeropage(memory.page(1), WAKE), all(page_size()));
    assert_eq!(load_by_kernel(memory.address(1)), Ok(0));
}

#[test]
fn moved_pages_are_missing_at_their_source() {
    const TEST: &str = "moved_pages_are_missing_at_their_source";
    needs!(Userfaultfd);
    if !supports(Features::MOVE, TEST) {
        return;
    }
    let (fault, memory, source) = (open(Features::MOVE), Memory::private(3), Memory::private(3));
    let operations = register(&fault, memory.range(), Modes::MISSING);
    assert!(operations.contains(Operations::MOVE));
    store(source.address(0), 1);
    store(source.address(2), 3);
    let (to, from, page) = (memory.address(0), source.address(0), page_size());
    let flags = MoveFlags::empty();
    // SAFETY: only this test uses the source.
    let filled = unsafe { fault.move_(to, from, 3 * page, flags) };
    assert_eq!(filled, stopped(page, Stop::Partial));
    assert_eq!((load(to), load(from)), (1, 0));
    // SAFETY: as above.
    let filled = unsafe { fault.move_(to + page, from + page, 2 * page, flags) };
    assert_eq!(filled, stopped(0, Stop::NotRegistered));
    // SAFETY: as above.
    let filled = unsafe { fault.move_(to + page, from + page, 2 * page, MoveFlags::ALLOW_HOLES) };
    assert_eq!(filled, all(2 * page));
    assert_eq!(load(memory.address(2)), 3);
    assert_eq!(fault.zeropage(memory.page(1), WAKE), all(page));
}

#[test]
fn moves_without_waking_leave_the_reader_waiting() {
    const TEST: &str = "moves_without_waking_leave_the_reader_waiting";
    needs!(Userfaultfd);
    if !supports(Features::MOVE, TEST) {
        return;
    }
    let (fault, memory, source) = (open(Features::MOVE), Memory::private(1), Memory::private(1));
    register(&fault, memory.range(), Modes::MISSING);
    store(source.address(0), 6);
    let (to, from) = (memory.address(0), source.address(0));
    let reader = in_thread(move || load(to));
    next_fault(&fault);
    // SAFETY: only this test uses the source.
    let filled = unsafe { fault.move_(to, from, page_size(), MoveFlags::NO_WAKE) };
    assert_eq!(filled, all(page_size()));
    assert_eq!(waiting(&fault), 1);
    fault.wake(memory.range()).unwrap();
    assert_eq!(reader.join().unwrap(), 6);
}

#[test]
fn a_present_page_ends_a_request_after_a_part() {
    needs!(Userfaultfd);
    let (fault, memory, page) = (open(Features::empty()), Memory::private(4), page_size());
    register(&fault, memory.range(), Modes::MISSING);
    assert_eq!(
        fault.copy_bytes(memory.address(2), &page_of(2), WAKE),
        all(page)
    );
    let bytes = vec![1; 4 * page as usize];
    let fill = |from: u64| {
        let bytes = &bytes[(from * page) as usize..];
        fault.copy_bytes(memory.address(from), bytes, WAKE)
    };
    assert_eq!(fill(0), stopped(2 * page, Stop::Partial));
    assert_eq!(fill(2), stopped(0, Stop::Present));
    assert_eq!(fill(3), all(page));
    let content = (0..4).map(|index| load(memory.address(index)));
    assert!(content.eq([1, 1, 2, 1]));
    discard(memory.pages(0..2));
    let zeros = |pages| fault.zeropage(memory.pages(pages), WAKE);
    assert_eq!(zeros(0..4), stopped(2 * page, Stop::Partial));
    assert_eq!(zeros(2..4), stopped(0, Stop::Present));
}

#[test]
fn a_request_across_two_mappings_is_refused() {
    needs!(Userfaultfd);
    let (fault, memory, page) = (open(Features::empty()), Memory::private(2), page_size());
    register(&fault, memory.range(), Modes::MISSING);
    // SAFETY: the test's own mapping, which stays readable.
    unsafe {
        mprotect(
            pointer(memory.address(1)),
            page as usize,
            ProtFlags::PROT_READ,
        )
    }
    .unwrap();
    let filled = fault.zeropage(memory.range(), WAKE);
    assert_eq!(filled, stopped(0, Stop::NotRegistered));
    assert_eq!(fault.zeropage(memory.page(0), WAKE), all(page));
    assert_eq!(fault.zeropage(memory.page(1), WAKE), all(page));
}

#[test]
fn unreadable_sources_and_partial_pages_are_errors() {
    needs!(Userfaultfd);
    let (fault, memory, source) = (
        open(Features::empty()),
        Memory::private(1),
        Memory::private(1),
    );
    register(&fault, memory.range(), Modes::MISSING);
    let (to, from, page) = (memory.address(0), source.address(0), page_size());
    // SAFETY: the test's own mapping, which nothing accesses.
    unsafe { mprotect(pointer(from), page as usize, ProtFlags::PROT_NONE) }.unwrap();
    // SAFETY: nothing writes the source.
    let filled = unsafe { fault.copy(to, from, page, WAKE) };
    assert_eq!(filled, stopped(0, Stop::Other(Errno::EFAULT as i32)));
    let invalid = stopped(0, Stop::Other(Errno::EINVAL as i32));
    assert_eq!(fault.copy_bytes(to, &[1; 100], WAKE), invalid);
    assert_eq!(fault.copy_bytes(to + 1, &page_of(1), WAKE), invalid);
    assert_eq!(fault.zeropage(to + page..to, WAKE), invalid);
    assert_eq!(
        fault.zeropage(to..to + page, FillFlags::WRITE_PROTECTED),
        invalid
    );
    fault.wake(to..to + 1).unwrap_err();
    fault.unregister(to..to + 1).unwrap_err();
    assert_eq!(fault.zeropage(memory.range(), WAKE), all(page));
}

#[test]
fn no_page_is_filled_while_a_removal_is_unread() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::EVENT_REMOVE), Memory::private(2));
    register(&fault, memory.range(), Modes::MISSING);
    assert!(!fault.is_changing());
    let range = memory.page(0);
    let discarding = in_thread(move || discard(range));
    while !fault.is_changing() {
        std::thread::yield_now();
    }
    let changing = stopped(0, Stop::Changing);
    assert_eq!(
        fault.copy_bytes(memory.address(1), &page_of(1), WAKE),
        changing
    );
    assert_eq!(fault.zeropage(memory.page(1), WAKE), changing);
    assert_eq!(fault.write_protect(memory.page(1)), Err(Stop::Changing));
    let event = next_event(&fault);
    assert!(matches!(event, Event::Remove { range } if range == memory.page(0)));
    discarding.join().unwrap();
    assert!(!fault.is_changing());
    let filled = fault.copy_bytes(memory.address(1), &page_of(1), WAKE);
    assert_eq!(filled, all(page_size()));
}

/// Resolves faults on pages that the file has and the mapping does not have.
#[test]
fn pages_of_the_file_are_mapped_by_continuing() {
    const TEST: &str = "pages_of_the_file_are_mapped_by_continuing";
    needs!(Userfaultfd);
    if !supports(Features::MINOR_SHMEM, TEST) {
        return;
    }
    let (fault, page) = (open(Features::MINOR_SHMEM), page_size());
    let (memory, file) = Memory::shared(2);
    let operations = register(&fault, memory.range(), Modes::MINOR);
    assert!(operations.contains(Operations::CONTINUE));
    let other = Memory::of(&file, 2);
    store(other.address(0), 5);
    let address = memory.address(0);
    let reader = in_thread(move || load(address));
    assert_eq!(next_fault(&fault), (address, FaultFlags::MINOR));
    assert_eq!(
        fault.continue_(memory.page(0), FillFlags::NO_WAKE),
        all(page)
    );
    assert_eq!(waiting(&fault), 1);
    fault.wake(memory.page(0)).unwrap();
    assert_eq!(reader.join().unwrap(), 5);
    assert_eq!(
        fault.continue_(memory.page(0), WAKE),
        stopped(0, Stop::Present)
    );
    let absent = stopped(0, Stop::Other(Errno::EFAULT as i32));
    assert_eq!(fault.continue_(memory.page(1), WAKE), absent);
}

fn supports(features: Features, test: &str) -> bool {
    let supported = Userfaultfd::options().supported().unwrap();
    let supports = supported.contains(features);
    if !supports {
        test_machine::not_run(test, &format!("this kernel lacks {features:?}"));
    }
    supports
}
