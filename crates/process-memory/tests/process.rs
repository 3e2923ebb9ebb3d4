//! `ProcessMemory` of another process that unmaps memory, executes another program, or ends.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod support;

use std::io::{self, ErrorKind};
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use nix::sys::mman::{MmapAdvise, ProtFlags, mprotect};
use nix::sys::signal::{Signal, kill};
use page_reader::{LayeredError, PageReader};
use process_memory::{ProcessMaps, ProcessMemory, ProcessMemoryError};
use support::child::Child;
use test_memory::{Mapping, PAGE, pattern};

fn downcast(error: io::Error) -> ProcessMemoryError {
    error.downcast().unwrap()
}

/// Checks the contract of `PageReader` at and around the borders of regions.
#[test]
fn several_regions_are_read_like_one_source() {
    const SIZES: [usize; 3] = [2 * PAGE, PAGE, 3 * PAGE];
    let bytes = pattern(SIZES.iter().sum());
    let (mut rest, mut mappings) = (&bytes[..], Vec::new());
    for size in SIZES {
        let (region, later) = rest.split_at(size);
        mappings.push(Mapping::private_with(region));
        rest = later;
    }
    let ranges = mappings.iter().zip(SIZES);
    let ranges = ranges.map(|(mapping, size)| (mapping.address(), size as u64));
    let guest = ProcessMemory::open(std::process::id(), ranges).unwrap();

    let borders = (0..=bytes.len()).step_by(PAGE);
    let edges: Vec<usize> = borders
        .flat_map(|border| {
            [
                border.saturating_sub(3),
                border,
                (border + 5).min(bytes.len()),
            ]
        })
        .collect();
    for &start in &edges {
        for &end in edges.iter().filter(|&&end| end >= start) {
            // One byte more on both sides, to check that only the buffer is written.
            let mut buf = vec![0xee; end - start + 2];
            let inner = 1..end - start + 1;
            guest
                .read_at(start as u64, &mut buf[inner.clone()])
                .unwrap();
            assert!(buf[inner] == bytes[start..end], "{start}..{end}");
            assert_eq!((buf[0], *buf.last().unwrap()), (0xee, 0xee));
        }
        assert!(guest.host_memory(start as u64, PAGE).is_none());
    }
    let end = bytes.len() as u64;
    guest.read_at(end, &mut []).unwrap();
    for (offset, len) in [
        (end, 1),
        (end - 1, 2),
        (i64::MAX as u64, PAGE),
        (u64::MAX, 1),
    ] {
        let error = guest.read_at(offset, &mut vec![0; len]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::UnexpectedEof, "{len} at {offset}");
    }
}

#[test]
fn reads_return_the_memory_of_the_other_process() {
    let bytes = pattern(4 * PAGE);
    let memory = Mapping::private_with(&bytes);
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
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
fn a_partly_mapped_range_is_an_error() {
    let memory = Mapping::private_with(&pattern(4 * PAGE));
    let hole = memory.as_ptr().wrapping_add(2 * PAGE);
    // SAFETY: munmap is a system call, and the child never accesses those pages again.
    let child = unsafe { Child::stopped_after(|| _ = libc::munmap(hole.cast(), PAGE)) };
    let guest = ProcessMemory::open(child.pid(), [(memory.address(), 4 * PAGE as u64)]).unwrap();
    guest.read_at(0, &mut vec![0; 2 * PAGE]).unwrap();
    guest.read_at(3 * PAGE as u64, &mut vec![0; PAGE]).unwrap();
    for (offset, len) in [(0, 4 * PAGE), (PAGE, PAGE + 1), (2 * PAGE, 1)] {
        let error = guest.read_at(offset as u64, &mut vec![0; len]).unwrap_err();
        match downcast(error) {
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
fn reading_a_zombie_process_is_an_error() {
    let memory = Mapping::private_with(&pattern(PAGE));
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
    let guest = ProcessMemory::open(child.pid(), [(memory.address(), PAGE as u64)]).unwrap();
    guest.read_at(0, &mut [0]).unwrap();
    child.kill_without_reaping();
    let error = guest.read_at(0, &mut [0]).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::UnexpectedEof, "the range is valid");
    assert!(matches!(downcast(error), ProcessMemoryError::Gone { pid } if pid == child.pid()));
}

#[test]
fn reading_after_exec_is_an_error() {
    let memory = Mapping::private_with(&pattern(PAGE));
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
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
    assert!(matches!(downcast(error), ProcessMemoryError::Gone { .. }));
}

#[test]
fn invalid_ranges_are_refused() {
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
fn the_error_names_a_nonexistent_process() {
    // Above the largest process id of Linux (2^22).
    let error = ProcessMemory::open(1 << 30, [(4096, 4096)]).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("failed to open /proc/1073741824/mem"),
        "{error}"
    );
    match error {
        ProcessMemoryError::Open { source, .. } => assert_eq!(source.kind(), ErrorKind::NotFound),
        other => panic!("{other}"),
    }
}

#[test]
fn opening_a_zombie_process_fails() {
    // SAFETY: the child does nothing.
    let child = unsafe { Child::stopped_after(|| ()) };
    child.kill_without_reaping();
    match ProcessMemory::open(child.pid(), [(4096, 4096)]).unwrap_err() {
        ProcessMemoryError::Gone { .. } => {}
        // Since about Linux 6.16; before, opening succeeds.
        ProcessMemoryError::Open { source, .. } => {
            // EACCES without root: a zombie process has no memory whose owner could be compared.
            let refused = [Some(libc::ESRCH), Some(libc::EACCES)];
            assert!(refused.contains(&source.raw_os_error()), "{source}");
        }
        other => panic!("{other}"),
    }
}

/// A VMM that tracks accesses makes parts of its RAM inaccessible, which has been written. A guard
/// page never was.
#[test]
fn inaccessible_part_of_ram_is_a_part_and_a_guard_is_not() {
    const SIZE: usize = 3 * PAGE;
    // The last page is the guard.
    let mapping = Mapping::inaccessible(SIZE + PAGE);
    mapping.allow(SIZE);
    mapping.write(&pattern(SIZE));
    let start = mapping.address();
    let middle = NonNull::new(mapping.as_ptr().wrapping_add(PAGE).cast()).unwrap();
    let protect = |flags| {
        // SAFETY: the page is that of the mapping, to which no reference exists.
        unsafe { mprotect(middle, PAGE, flags) }.unwrap();
    };
    protect(ProtFlags::PROT_NONE);
    let maps = ProcessMaps::of_this_process().unwrap();
    for page in 0..3 {
        // Memory before the mapping may be of the same kind.
        let found = maps.around(start + (page * PAGE) as u64).unwrap();
        assert!(found.contains(&start), "{page}: {found:x?}");
        assert_eq!(found.end, start + SIZE as u64, "{page}");
    }
    // Without a page, it may be a guard.
    let discard = MmapAdvise::MADV_DONTNEED;
    mapping.advise(PAGE..2 * PAGE, discard).unwrap();
    let found = maps.around(start).unwrap();
    assert_eq!(found.end, start + PAGE as u64);
}
