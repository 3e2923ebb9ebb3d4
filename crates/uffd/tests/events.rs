//! Page faults and changes of mappings as events.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use nix::sys::mman::{MRemapFlags, mremap, munmap};
use nix::unistd::gettid;
use support::{
    Memory, discard, in_thread, load, next_event, next_fault, page_of, page_size, pointer,
    register, store, wait_for_pending,
};
use test_machine::needs;
use uffd::{Event, FaultFlags, Features, FillFlags, Modes, Stop, Userfaultfd};

fn open(features: Features) -> Userfaultfd {
    Userfaultfd::options().features(features).open().unwrap()
}

#[test]
fn no_event_is_none_at_once() {
    needs!(Userfaultfd);
    let fault = open(Features::empty());
    assert!(fault.read_event().unwrap().is_none());
    let mut events = Vec::new();
    assert_eq!(fault.read_events(&mut events).unwrap(), 0);
    assert!(events.is_empty());
}

#[test]
fn a_batch_has_all_faults_up_to_its_limit() {
    const BATCH: usize = 32;
    const FAULTS: usize = BATCH + 3;

    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::empty()), Memory::private(FAULTS as u64));
    register(&fault, memory.range(), Modes::MISSING);
    let readers: Vec<_> = (0..FAULTS as u64)
        .map(|index| memory.address(index))
        .map(|address| in_thread(move || load(address)))
        .collect();
    wait_for_pending(&fault, FAULTS);
    let mut events = Vec::new();
    assert_eq!(fault.read_events(&mut events).unwrap(), BATCH);
    assert_eq!(fault.read_events(&mut events).unwrap(), FAULTS - BATCH);
    assert_eq!(fault.read_events(&mut events).unwrap(), 0);
    let mut addresses: Vec<_> = events
        .iter()
        .map(|event| match event {
            Event::PageFault { address, .. } => *address,
            other => panic!("{other:?}"),
        })
        .collect();
    addresses.sort_unstable();
    assert!(
        addresses
            .into_iter()
            .eq((0..FAULTS as u64).map(|index| memory.address(index)))
    );
    for index in 0..FAULTS as u64 {
        let bytes = page_of(index as u8);
        let filled = fault.copy_bytes(memory.address(index), &bytes, FillFlags::empty());
        assert_eq!(filled.complete(), Ok(page_size()));
    }
    for (index, reader) in readers.into_iter().enumerate() {
        assert_eq!(reader.join().unwrap(), index as u8);
    }
}

#[test]
fn faults_name_address_and_thread_if_requested() {
    needs!(Userfaultfd);
    for features in [
        Features::empty(),
        Features::THREAD_ID,
        Features::EXACT_ADDRESS,
        Features::THREAD_ID | Features::EXACT_ADDRESS,
    ] {
        let (fault, memory) = (open(features), Memory::private(1));
        assert_eq!(fault.features(), Some(features));
        register(&fault, memory.range(), Modes::MISSING);
        let start = memory.address(0);
        let writer = in_thread(move || {
            store(start + 123, 1);
            gettid().as_raw().cast_unsigned()
        });
        let Event::PageFault {
            address,
            flags,
            thread,
        } = next_event(&fault)
        else {
            panic!("another event");
        };
        assert_eq!(flags, FaultFlags::WRITE);
        let exact = features.contains(Features::EXACT_ADDRESS);
        assert_eq!(address, if exact { start + 123 } else { start });
        fault
            .zeropage(memory.range(), FillFlags::empty())
            .complete()
            .unwrap();
        let id = writer.join().unwrap();
        assert_eq!(thread, features.contains(Features::THREAD_ID).then_some(id));
    }
}

/// A thread that moves memory continues when the event is read.
#[test]
fn moved_memory_stays_registered_at_its_new_address() {
    needs!(Userfaultfd);
    let (memory, place) = (Memory::private(2), Memory::private(2));
    // Dropped first: unmapping registered memory waits until the event is read.
    let fault = open(Features::EVENT_REMAP | Features::EVENT_UNMAP);
    register(&fault, memory.range(), Modes::MISSING);
    let (old, new, len) = (memory.range(), place.range(), 2 * page_size() as usize);
    let (from, to) = (old.start, new.start);
    let moving = in_thread(move || {
        let flags = MRemapFlags::MREMAP_MAYMOVE | MRemapFlags::MREMAP_FIXED;
        // SAFETY: replaces the test's own mapping by another, to both of which no reference exists.
        unsafe { mremap(pointer(from), len, len, flags, Some(pointer(to))) }.map(drop)
    });
    let event = next_event(&fault);
    assert!(matches!(&event, Event::Remap { from, to } if *from == old && *to == new.start));
    // `mremap` also unmaps the old addresses, and reports this before it returns.
    let mut unmapped = Vec::new();
    while !moving.is_finished() {
        fault.read_events(&mut unmapped).unwrap();
        std::thread::yield_now();
    }
    moving.join().unwrap().unwrap();
    for event in &unmapped {
        assert!(
            matches!(event, Event::Unmap { range } if *range == old),
            "{event:?}"
        );
    }
    memory.forget();
    let reader = in_thread(move || load(to));
    assert_eq!(next_fault(&fault), (to, FaultFlags::empty()));
    let filled = fault.copy_bytes(to, &page_of(8), FillFlags::empty());
    assert_eq!(filled.complete(), Ok(page_size()));
    assert_eq!(reader.join().unwrap(), 8);
}

#[test]
fn discarded_pages_are_reported_and_missing_again() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::EVENT_REMOVE), Memory::private(3));
    register(&fault, memory.range(), Modes::MISSING);
    let zeros = fault.zeropage(memory.range(), FillFlags::empty());
    assert_eq!(zeros.complete(), Ok(3 * page_size()));
    let range = memory.pages(1..3);
    let discarded = range.clone();
    let discarding = in_thread(move || discard(discarded));
    let event = next_event(&fault);
    assert!(
        matches!(&event, Event::Remove { range: removed } if *removed == range),
        "{event:?}"
    );
    discarding.join().unwrap();
    let zeros = |pages| fault.zeropage(memory.pages(pages), FillFlags::empty());
    assert_eq!(zeros(0..1).complete(), Err(Stop::Present));
    assert_eq!(zeros(1..3).complete(), Ok(2 * page_size()));
}

#[test]
fn unmapped_memory_is_reported() {
    needs!(Userfaultfd);
    let memory = Memory::private(2);
    let fault = open(Features::EVENT_UNMAP);
    register(&fault, memory.range(), Modes::MISSING);
    let range = memory.range();
    memory.forget();
    let (start, len) = (range.start, (range.end - range.start) as usize);
    // SAFETY: the test's own mapping, to which no reference exists.
    let unmapping = in_thread(move || unsafe { munmap(pointer(start), len) });
    let event = next_event(&fault);
    assert!(
        matches!(&event, Event::Unmap { range: unmapped } if *unmapped == range),
        "{event:?}"
    );
    unmapping.join().unwrap().unwrap();
    let zeros = fault.zeropage(range, FillFlags::empty());
    assert_eq!(zeros.complete(), Err(Stop::NotRegistered));
}

/// With this feature, the kernel sends a signal to the thread, or fails its system call.
#[test]
fn with_the_signal_feature_no_event_is_reported() {
    needs!(Userfaultfd);
    let (fault, memory) = (open(Features::SIGBUS), Memory::private(1));
    register(&fault, memory.range(), Modes::MISSING);
    let read = support::load_by_kernel(memory.address(0));
    assert_eq!(read, Err(nix::errno::Errno::EFAULT));
    assert!(fault.read_event().unwrap().is_none());
}
