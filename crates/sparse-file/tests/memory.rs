//! Memory that others write, or that is not there, while it is being written to a file.
#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::io;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::thread;

use sparse_file::{Engine, Memory, Source, WriteError, WriteOptions, write_runs};
use support::{contents, go_on};

const ENGINES: [Engine; 4] = [
    Engine::Auto,
    Engine::Positioned,
    Engine::Threads,
    Engine::IoUring,
];

const PAGE: usize = 4096;
const LEN: usize = 256 * PAGE;

/// An anonymous mapping, known by its address only.
struct Mapping(*mut u8);

// SAFETY: an address may be known to any thread; every access below is atomic or the kernel's.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new() -> Self {
        let access = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start = unsafe { libc::mmap(ptr::null_mut(), LEN, access, flags, -1, 0) };
        assert_ne!(start, libc::MAP_FAILED);
        Self(start.cast())
    }

    fn store(&self, at: usize, value: u8) {
        assert!(at < LEN);
        // SAFETY: within the mapping, writable, and only ever accessed atomically.
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
        // SAFETY: the mapping is this value's own, and nothing borrowed from it is left.
        unsafe { libc::munmap(self.0.cast(), LEN) };
    }
}

impl Source for Mapping {
    fn read_at(&self, _: u64, _: &mut [u8]) -> io::Result<()> {
        unreachable!("all of it is memory")
    }

    fn memory_at(&self, offset: u64, len: usize) -> Option<Memory<'_>> {
        let offset = offset as usize;
        assert!(offset + len <= LEN);
        // SAFETY: within the mapping, which lives as long as `self`.
        Some(unsafe { Memory::new(self.0.add(offset), len) })
    }
}

#[test]
fn memory_that_a_vcpu_writes_meanwhile_is_written_as_it_is_at_some_moment() {
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
        for engine in ENGINES.into_iter().cycle().take(40) {
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
fn memory_that_cannot_be_read_is_the_sources_error_at_its_very_page() {
    let ram = Mapping::new();
    (0..LEN).for_each(|at| ram.store(at, 1));
    ram.forbid(100);
    for engine in ENGINES {
        let file = tempfile::tempfile().expect("file");
        let all = 0..LEN as u64;
        let options = WriteOptions::new().engine(engine);
        let result = write_runs(&file, [all], &ram, &options, &mut go_on);
        let Err(WriteError::Source { offset, source }) = result else {
            panic!("{engine:?}: {result:?}");
        };
        assert_eq!(offset, 100 * PAGE as u64, "{engine:?}");
        assert_eq!(source.raw_os_error(), Some(libc::EFAULT));
        // The kernel wrote short up to there, and that was kept.
        assert!(contents(&file) == vec![1; 100 * PAGE]);
    }
}
