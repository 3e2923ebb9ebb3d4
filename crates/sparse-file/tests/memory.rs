//! Memory that is changed or unreadable while it is being written to a file.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;

use sparse_file::{Engine, HostMemory, RunSource, WriteError, WriteOptions, write_runs};
use support::{contents, go_on};

const PAGE: usize = 4096;
const LEN: usize = 256 * PAGE;

/// An anonymous mapping, accessed only by its address.
struct Mapping(*mut u8);

// SAFETY: any thread may have the address; every access below is atomic or by the kernel.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new() -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start = unsafe { libc::mmap(ptr::null_mut(), LEN, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self(start.cast())
    }

    fn store(&self, at: usize, value: u8) {
        assert!(at < LEN);
        // SAFETY: inside the mapping, writable, and only ever accessed atomically.
        unsafe { AtomicU8::from_ptr(self.0.add(at)) }.store(value, Ordering::Relaxed);
    }

    fn forbid(&self, page: usize) {
        assert!(page < LEN / PAGE);
        // SAFETY: a page of the mapping, which no reference covers.
        let result =
            unsafe { libc::mprotect(self.0.add(page * PAGE).cast(), PAGE, libc::PROT_NONE) };
        assert_eq!(result, 0);
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this value owns the mapping, and nothing borrowed from it remains.
        unsafe { libc::munmap(self.0.cast(), LEN) };
    }
}

impl RunSource for Mapping {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("all of it is memory")
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let offset = offset as usize;
        assert!(offset + len <= LEN);
        // SAFETY: inside the mapping, which lives as long as `self`.
        Some(unsafe { HostMemory::new(self.0.add(offset), len) })
    }
}

#[test]
fn concurrently_changed_memory_is_written_as_it_was_once() {
    let ram = Mapping::new();
    (0..LEN).for_each(|at| ram.store(at, 1));
    let file = tempfile::tempfile().expect("file");
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut value = 1;
            while !stop.load(Ordering::Relaxed) {
                value = 3 - value;
                (0..LEN).step_by(64).for_each(|at| ram.store(at, value));
            }
        });
        let all = 0..LEN as u64;
        for engine in Engine::ALL.iter().copied().cycle().take(40) {
            let options = WriteOptions::new().engine(engine);
            write_runs(&file, [all.clone()], &ram, &options, &mut go_on).expect("written");
        }
        stop.store(true, Ordering::Relaxed);
    });
    for (at, byte) in contents(&file).into_iter().enumerate() {
        assert!(byte == 1 || (byte == 2 && at % 64 == 0), "{byte} at {at}");
    }
}

#[test]
fn unreadable_memory_is_a_source_error_at_its_page() {
    let ram = Mapping::new();
    (0..LEN).for_each(|at| ram.store(at, 1));
    ram.forbid(100);
    for engine in Engine::ALL.iter().copied() {
        let file = tempfile::tempfile().expect("file");
        let all = 0..LEN as u64;
        let options = WriteOptions::new().engine(engine);
        let result = write_runs(&file, [all], &ram, &options, &mut go_on);
        let Err(WriteError::Source { offset, source }) = result else {
            panic!("{engine:?}: {result:?}");
        };
        assert_eq!(offset, 100 * PAGE as u64, "{engine:?}");
        assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
        // The short write of the kernel up to there was kept.
        assert!(contents(&file) == vec![1; 100 * PAGE]);
    }
}
