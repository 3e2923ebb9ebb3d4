//! `ProcessMemory` against a real other process, which holds its pattern, unmaps part of it, runs another program,
//! and dies.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::time::{Duration, Instant};

use common::{Mapping, PAGE, pattern};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::mman::MmapAdvise;
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use page_reader::{LayeredError, PageReader, ProcessMaps, ProcessMemory, ProcessMemoryError};
use test_machine::Need;

/// A fork of this process that did something and then stopped; killed and reaped on drop.
struct Child(Pid);

impl Child {
    /// # Safety
    /// `act` is async-signal-safe: no allocation, no lock, no panic.
    unsafe fn that(act: impl FnOnce()) -> Self {
        // SAFETY: the child calls what the caller says is safe there, raise and _exit.
        match unsafe { fork() }.unwrap() {
            ForkResult::Parent { child } => {
                let child = Self(child);
                let stopped = waitpid(child.0, Some(WaitPidFlag::WUNTRACED)).unwrap();
                assert_eq!(stopped, WaitStatus::Stopped(child.0, Signal::SIGSTOP));
                child
            }
            ForkResult::Child => {
                // Should this process not live to kill it.
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                act();
                let _ = raise(Signal::SIGSTOP);
                run_another_program();
            }
        }
    }

    fn pid(&self) -> u32 {
        self.0.as_raw() as u32
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

/// What a child does once continued.
fn run_another_program() -> ! {
    let arguments = [c"sleep".as_ptr(), c"60".as_ptr(), std::ptr::null()];
    // SAFETY: both are async-signal-safe, and the arguments end with a null pointer.
    unsafe {
        libc::execv(c"/bin/sleep".as_ptr(), arguments.as_ptr());
        libc::_exit(127)
    }
}

fn typed(error: io::Error) -> ProcessMemoryError {
    error.downcast().unwrap()
}

#[test]
fn the_memory_read_is_the_other_process_own_and_not_this_ones() {
    let bytes = pattern(4 * PAGE);
    let memory = Mapping::private_with(&bytes);
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    memory.write(&vec![0xee; bytes.len()]);
    let ranges = [
        (memory.address() + 2 * PAGE as u64, 2 * PAGE as u64),
        (memory.address() + 1, PAGE as u64 - 1),
    ];
    let guest = ProcessMemory::open(child.pid(), ranges).unwrap();
    let mut buf = vec![0; 3 * PAGE - 1];
    guest.read_at(0, &mut buf).unwrap();
    assert!(buf[..2 * PAGE] == bytes[2 * PAGE..]);
    assert!(buf[2 * PAGE..] == bytes[1..PAGE]);
    assert!(guest.host_memory(0, PAGE).is_none());
    assert_eq!(guest.pid(), child.pid());
}

#[test]
fn a_range_that_is_mapped_in_part_is_an_error_and_no_short_read() {
    let memory = Mapping::private_with(&pattern(4 * PAGE));
    let hole = memory.as_ptr().wrapping_add(2 * PAGE);
    // SAFETY: munmap is a system call and no more; the child never touches those pages again.
    let child = unsafe { Child::that(|| _ = libc::munmap(hole.cast(), PAGE)) };
    let guest = ProcessMemory::open(child.pid(), [(memory.address(), 4 * PAGE as u64)]).unwrap();
    guest.read_at(0, &mut vec![0; 2 * PAGE]).unwrap();
    guest.read_at(3 * PAGE as u64, &mut vec![0; PAGE]).unwrap();
    for (offset, len) in [(0, 4 * PAGE), (PAGE, PAGE + 1), (2 * PAGE, 1)] {
        let error = guest.read_at(offset as u64, &mut vec![0; len]).unwrap_err();
        match typed(error) {
            ProcessMemoryError::Unreadable {
                offset: at, source, ..
            } => {
                assert_eq!(at, offset as u64);
                assert_eq!(source.raw_os_error(), Some(libc::EIO));
            }
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_process_that_dies_is_an_error_even_before_it_is_reaped() {
    let memory = Mapping::private_with(&pattern(PAGE));
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    let guest = ProcessMemory::open(child.pid(), [(memory.address(), PAGE as u64)]).unwrap();
    guest.read_at(0, &mut [0]).unwrap();
    kill(child.0, Signal::SIGKILL).unwrap();
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    nix::sys::wait::waitid(nix::sys::wait::Id::Pid(child.0), flags).unwrap();
    let error = guest.read_at(0, &mut [0]).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::UnexpectedEof, "the range is right");
    assert!(matches!(typed(error), ProcessMemoryError::Gone { pid } if pid == child.pid()));
}

#[test]
fn a_process_that_runs_another_program_is_an_error_and_not_that_programs_memory() {
    let memory = Mapping::private_with(&pattern(PAGE));
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    let guest = ProcessMemory::open(child.pid(), [(memory.address(), PAGE as u64)]).unwrap();
    guest.read_at(0, &mut [0]).unwrap();
    kill(child.0, Signal::SIGCONT).unwrap();
    let comm = format!("/proc/{}/comm", child.pid());
    let start = Instant::now();
    while std::fs::read_to_string(&comm).unwrap() != "sleep\n" {
        assert!(start.elapsed() < Duration::from_secs(60), "exec failed");
        std::thread::yield_now();
    }
    let error = guest.read_at(0, &mut [0]).unwrap_err();
    assert!(matches!(typed(error), ProcessMemoryError::Gone { .. }));
}

#[test]
fn ranges_that_are_no_source_are_refused() {
    let pid = std::process::id();
    let open = |ranges: &[(u64, u64)]| ProcessMemory::open(pid, ranges.to_vec()).unwrap_err();
    assert!(matches!(
        open(&[]),
        ProcessMemoryError::Ranges {
            source: LayeredError::NoPart,
            ..
        }
    ));
    assert!(matches!(
        open(&[(4096, 1), (8192, 0)]),
        ProcessMemoryError::Ranges {
            source: LayeredError::Empty { offset: 1 },
            ..
        }
    ));
    for (start, size) in [(u64::MAX, 1), (i64::MAX as u64, 1), (1, u64::MAX)] {
        let error = open(&[(start, size)]);
        assert!(
            matches!(error, ProcessMemoryError::PastAddressSpace { .. }),
            "{error}"
        );
    }
}

#[test]
fn a_process_that_is_not_there_is_named_in_the_error() {
    // Above the largest process id that Linux gives (2^22).
    let error = ProcessMemory::open(1 << 30, [(4096, 4096)]).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("opening /proc/1073741824/mem"),
        "{error}"
    );
    match error {
        ProcessMemoryError::Open { source, .. } => assert_eq!(source.kind(), ErrorKind::NotFound),
        other => panic!("{other}"),
    }
}

const PAGES: usize = 2048;

/// All of `mapping` in the child.
fn guest(child: &Child, mapping: &Mapping) -> ProcessMemory {
    let range = (mapping.address(), (PAGES * PAGE) as u64);
    ProcessMemory::open(child.pid(), [range]).unwrap()
}

fn untouched() -> Mapping {
    let mapping = Mapping::private(PAGES * PAGE);
    let _ = mapping.advise(0..PAGES * PAGE, MmapAdvise::MADV_NOHUGEPAGE);
    mapping
}

/// A child has what other tests have mapped in this process too: hence a name of its own.
fn memfd(name: &str) -> File {
    let memfd = File::from(memfd_create(name, MFdFlags::MFD_CLOEXEC).unwrap());
    memfd.set_len((PAGES * PAGE) as u64).unwrap();
    memfd
}

/// The pages that may be populated, and nothing but whole ones where all is asked for.
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
fn exactly_what_the_other_process_wrote_is_populated_and_asking_touches_nothing() {
    let mapping = untouched();
    mapping.write_at(5 * PAGE, b"!");
    // SAFETY: stores to memory.
    let child = unsafe { Child::that(|| mapping.write_at(1000 * PAGE, b"!")) };
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
fn the_ranges_of_a_guest_are_asked_one_after_another() {
    let mapping = untouched();
    mapping.write_at(5 * PAGE, b"!");
    mapping.write_at(1000 * PAGE, b"!");
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    let page = |index: usize| (index * PAGE) as u64;
    let start = mapping.address();
    let ranges = [(start + page(1000), page(1)), (start + page(4), page(2))];
    let guest = ProcessMemory::open(child.pid(), ranges).unwrap();
    let found: Vec<_> = guest.populated(0..page(4)).collect();
    // The last is past the end, for a read to find out.
    assert_eq!(found, [0..page(1), page(2)..page(3), page(3)..page(4)]);
}

/// Whether the process has the file open still, or only the mapping.
#[rstest::rstest]
fn pages_of_shared_memory_are_populated_where_its_file_has_them(#[values(true, false)] open: bool) {
    if !open && !Need::Root.met("pages of shared memory whose file is closed") {
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
        Child::that(|| {
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
fn all_of_a_file_that_the_other_process_maps_privately_may_be_populated() {
    let memfd = memfd("ram of its own");
    let mapping = Mapping::of_file(memfd.as_fd(), PAGES * PAGE, false);
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    assert_eq!(populated(&guest(&child, &mapping)), all());
}

/// A guest that is being restored.
#[test]
fn what_userfaultfd_fills_in_the_other_process_may_be_populated_and_is_not_read_as_zeros() {
    if !Need::Userfaultfd.met("what_userfaultfd_fills_in_the_other_process_may_be_populated") {
        return;
    }
    let mapping = untouched();
    let register = || std::mem::forget(common::uffd::register_missing(&mapping, PAGES * PAGE));
    // SAFETY: system calls; no path here is long enough for an allocation.
    let child = unsafe { Child::that(register) };
    let guest = guest(&child, &mapping);
    assert_eq!(populated(&guest), all());
    let error = guest.read_at(0, &mut [0; PAGE]).unwrap_err();
    assert!(matches!(
        typed(error),
        ProcessMemoryError::Unreadable { .. }
    ));
}

#[test]
fn pages_that_the_other_process_swapped_out_are_not_taken_for_empty() {
    let test = "pages_that_the_other_process_swapped_out_are_not_taken_for_empty";
    if !Need::Root.met(test) {
        return;
    }
    let Some(_swap) = common::Swap::on(64 << 20, test) else {
        return;
    };
    let mapping = untouched();
    let swap_out = || {
        common::stay_on_this_processor();
        mapping.write_at(5 * PAGE, b"!");
        mapping.write_at(1000 * PAGE, b"!");
        // Only advice: the kernel keeps a page that it is busy with.
        for _ in 0..100 {
            let _ = mapping.advise(0..PAGES * PAGE, MmapAdvise::MADV_PAGEOUT);
        }
    };
    // SAFETY: stores to memory and system calls.
    let child = unsafe { Child::that(swap_out) };
    let pagemap = File::open(format!("/proc/{}/pagemap", child.pid())).unwrap();
    let mut entry = [0; 8];
    let page = mapping.address() / PAGE as u64 + 1000;
    pagemap.read_exact_at(&mut entry, page * 8).unwrap();
    assert_eq!(u64::from_ne_bytes(entry) >> 62, 1, "swapped, not present");
    assert_eq!(populated(&guest(&child, &mapping)), [5, 1000]);
}

#[test]
fn all_may_be_populated_once_the_process_has_ended_or_runs_another_program() {
    let mapping = untouched();
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    let guest = guest(&child, &mapping);
    assert!(populated(&guest).is_empty());
    let mut asked_before = guest.populated(0..(PAGES * PAGE) as u64);
    kill(child.0, Signal::SIGCONT).unwrap();
    let start = Instant::now();
    while guest.read_at(0, &mut [0]).is_ok() {
        assert!(start.elapsed() < Duration::from_secs(60), "exec failed");
        std::thread::yield_now();
    }
    assert_eq!(asked_before.next(), Some(0..(PAGES * PAGE) as u64));
    assert_eq!(populated(&guest), all());
    drop(child);
    assert_eq!(populated(&guest), all());
}

#[test]
fn a_process_that_has_ended_is_not_opened() {
    // SAFETY: nothing is done.
    let child = unsafe { Child::that(|| ()) };
    kill(child.0, Signal::SIGKILL).unwrap();
    let flags = WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT;
    nix::sys::wait::waitid(nix::sys::wait::Id::Pid(child.0), flags).unwrap();
    match ProcessMemory::open(child.pid(), [(4096, 4096)]).unwrap_err() {
        ProcessMemoryError::Gone { .. } => {}
        // As of Linux 6.16 or so; before that it opens.
        ProcessMemoryError::Open { source, .. } => {
            // EACCES without root: what has ended has no memory whose owner could be compared.
            let refused = [Some(libc::ESRCH), Some(libc::EACCES)];
            assert!(refused.contains(&source.raw_os_error()), "{source}");
        }
        other => panic!("{other}"),
    }
}
