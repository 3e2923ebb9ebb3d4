//! Huge pages of hugetlbfs.

#![cfg(target_os = "linux")]

mod support;

use nix::errno::Errno;
use support::{Memory, in_thread, load, next_fault, register};
use test_machine::needs;
use uffd::{FaultFlags, FillFlags, Modes, Operations, Stop, Userfaultfd};

/// The size of huge pages by default.
fn huge_page_size() -> u64 {
    let info = std::fs::read_to_string("/proc/meminfo").unwrap();
    let line = info
        .lines()
        .find_map(|line| line.strip_prefix("Hugepagesize:"));
    let kib = line.unwrap().trim().strip_suffix(" kB").unwrap();
    kib.parse::<u64>().unwrap() << 10
}

#[test]
fn huge_pages_are_filled_as_a_whole() {
    const TEST: &str = "huge_pages_are_filled_as_a_whole";
    needs!(Userfaultfd, HugePages);
    let page = huge_page_size();
    let Ok(memory) = Memory::huge(page, 2) else {
        test_machine::not_run(TEST, "this machine has no free huge pages");
        return;
    };
    let fault = Userfaultfd::options().open().unwrap();
    let operations = register(&fault, memory.range(), Modes::MISSING);
    assert!(operations.contains(Operations::COPY));
    assert!(!operations.contains(Operations::ZEROPAGE));
    let address = memory.address(1);
    let reader = in_thread(move || load(address + 5000));
    assert_eq!(next_fault(&fault), (address, FaultFlags::empty()));
    let part = fault.copy_bytes(address, &[1; 4096], FillFlags::empty());
    assert_eq!(part.complete(), Err(Stop::Other(Errno::EINVAL as i32)));
    let bytes = vec![9; page as usize];
    let filled = fault.copy_bytes(address, &bytes, FillFlags::empty());
    assert_eq!(filled.complete(), Ok(page));
    assert_eq!(reader.join().unwrap(), 9);
    let zeros = fault.zeropage(memory.page(0), FillFlags::empty());
    assert_eq!(zeros.complete(), Err(Stop::Other(Errno::EINVAL as i32)));
}
