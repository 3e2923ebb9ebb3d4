//! `ProcessMemory` against a real other process, which holds its pattern, unmaps part of it, runs another program,
//! and dies.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod common;

use std::io::{self, ErrorKind};
use std::time::{Duration, Instant};

use common::{Mapping, PAGE, pattern};
use nix::sys::signal::{Signal, kill, raise};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{ForkResult, Pid, fork};
use page_reader::{LayeredError, PageReader, ProcessMemory, ProcessMemoryError};

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
