//! Write-protected pages.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use nix::errno::Errno;
use support::{Memory, in_thread, load, next_fault, page_of, page_size, register, store, waiting};
use uffd::{FaultFlags, Features, FillFlags, Modes, Operations, Stop, Userfaultfd};

const FEATURES: Features = Features::PAGEFAULT_FLAG_WP.union(Features::WP_UNPOPULATED);
const WRITE: FaultFlags = FaultFlags::WRITE.union(FaultFlags::WRITE_PROTECT);

/// Opens a userfaultfd, or reports that `test` is not run.
fn open(features: Features, test: &str) -> Option<Userfaultfd> {
    if !test_machine::Need::Userfaultfd.met(test) {
        return None;
    }
    let supported = Userfaultfd::options().supported().unwrap();
    if !supported.contains(features) {
        test_machine::not_run(test, &format!("this kernel lacks {features:?}"));
        return None;
    }
    Some(Userfaultfd::options().features(features).open().unwrap())
}

#[test]
fn a_write_waits_until_its_page_is_unprotected() {
    let Some(fault) = open(FEATURES, "a_write_waits_until_its_page_is_unprotected") else {
        return;
    };
    let memory = Memory::private(2);
    let operations = register(&fault, memory.range(), Modes::WRITE_PROTECT);
    assert!(operations.contains(Operations::WRITE_PROTECT));
    store(memory.address(0), 1);
    // The second page was never touched.
    fault.write_protect(memory.range()).unwrap();
    for index in 0..2 {
        let address = memory.address(index);
        assert_eq!(load(address), 1 - index as u8);
        let writer = in_thread(move || store(address, 7));
        assert_eq!(next_fault(&fault), (address, WRITE));
        assert_eq!(load(address), 1 - index as u8);
        fault.write_unprotect(memory.page(index), true).unwrap();
        writer.join().unwrap();
        assert_eq!(load(address), 7);
    }
    store(memory.address(0), 8);
    assert!(fault.read_event().unwrap().is_none());
}

#[test]
fn unprotecting_without_waking_leaves_the_writer_waiting() {
    let Some(fault) = open(
        FEATURES,
        "unprotecting_without_waking_leaves_the_writer_waiting",
    ) else {
        return;
    };
    let memory = Memory::private(1);
    register(&fault, memory.range(), Modes::WRITE_PROTECT);
    fault.write_protect(memory.range()).unwrap();
    let address = memory.address(0);
    let writer = in_thread(move || store(address, 7));
    next_fault(&fault);
    fault.write_unprotect(memory.range(), false).unwrap();
    assert_eq!(waiting(&fault), 1);
    assert_eq!(load(address), 0);
    fault.wake(memory.range()).unwrap();
    writer.join().unwrap();
    assert_eq!(load(address), 7);
}

#[test]
fn pages_can_be_filled_protected() {
    let Some(fault) = open(FEATURES, "pages_can_be_filled_protected") else {
        return;
    };
    let memory = Memory::private(1);
    register(
        &fault,
        memory.range(),
        Modes::MISSING | Modes::WRITE_PROTECT,
    );
    let address = memory.address(0);
    let filled = fault.copy_bytes(address, &page_of(3), FillFlags::WRITE_PROTECTED);
    assert_eq!(filled.complete(), Ok(page_size()));
    assert_eq!(load(address), 3);
    let writer = in_thread(move || store(address, 4));
    assert_eq!(next_fault(&fault), (address, WRITE));
    fault.write_unprotect(memory.range(), true).unwrap();
    writer.join().unwrap();
    assert_eq!(load(address), 4);
}

#[test]
fn shared_memory_is_protected_with_its_feature() {
    let features = FEATURES | Features::WP_HUGETLBFS_SHMEM;
    let Some(fault) = open(features, "shared_memory_is_protected_with_its_feature") else {
        return;
    };
    let (memory, _file) = Memory::shared(1);
    register(&fault, memory.range(), Modes::WRITE_PROTECT);
    fault.write_protect(memory.range()).unwrap();
    let address = memory.address(0);
    let writer = in_thread(move || store(address, 5));
    assert_eq!(next_fault(&fault), (address, WRITE));
    fault.write_unprotect(memory.range(), true).unwrap();
    writer.join().unwrap();
    assert_eq!(load(address), 5);
}

#[test]
fn pages_of_the_file_can_be_mapped_protected() {
    let features = FEATURES | Features::WP_HUGETLBFS_SHMEM | Features::MINOR_SHMEM;
    let Some(fault) = open(features, "pages_of_the_file_can_be_mapped_protected") else {
        return;
    };
    let (memory, file) = Memory::shared(1);
    register(&fault, memory.range(), Modes::MINOR | Modes::WRITE_PROTECT);
    let other = Memory::of(&file, 1);
    store(other.address(0), 3);
    let mapped = fault.continue_(memory.range(), FillFlags::WRITE_PROTECTED);
    assert_eq!(mapped.complete(), Ok(page_size()));
    let address = memory.address(0);
    assert_eq!(load(address), 3);
    let writer = in_thread(move || store(address, 4));
    assert_eq!(next_fault(&fault), (address, WRITE));
    assert_eq!(load(other.address(0)), 3);
    fault.write_unprotect(memory.range(), true).unwrap();
    writer.join().unwrap();
    assert_eq!(load(other.address(0)), 4);
}

/// The kernel permits the write itself.
#[test]
fn asynchronous_protection_reports_no_event() {
    let features = FEATURES | Features::WP_ASYNC;
    let Some(fault) = open(features, "asynchronous_protection_reports_no_event") else {
        return;
    };
    let memory = Memory::private(1);
    register(&fault, memory.range(), Modes::WRITE_PROTECT);
    fault.write_protect(memory.range()).unwrap();
    store(memory.address(0), 6);
    assert_eq!(load(memory.address(0)), 6);
    assert!(fault.read_event().unwrap().is_none());
}

#[test]
fn memory_that_is_not_registered_is_not_protected() {
    let Some(fault) = open(FEATURES, "memory_that_is_not_registered_is_not_protected") else {
        return;
    };
    let memory = Memory::private(1);
    assert_eq!(
        fault.write_protect(memory.range()),
        Err(Stop::NotRegistered)
    );
    let invalid = Err(Stop::Other(Errno::EINVAL as i32));
    assert_eq!(
        fault.write_unprotect(memory.address(0)..memory.address(0) + 1, true),
        invalid
    );
    store(memory.address(0), 1);
}
