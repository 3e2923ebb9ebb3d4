//! Targets of a restore. Images are read without a copy into those that hand out their memory.

#![allow(unsafe_code)]

mod support;

use std::io;
use std::num::NonZeroUsize;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;

use memory_image::{Chain, HostRam, Progress, RamTarget, RestoreError, TargetMemory};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use support::raw_guest::{Guest, PAGE, SIZE};

#[test]
fn restore_overwrites_previous_bytes_with_zeros() {
    let guest = Guest::with_history();
    let mut ram = vec![0xee; SIZE as usize];
    let target = ram.as_mut_slice();
    assert_eq!(target.memory_mut(SIZE - 4, 8).unwrap().len(), 4);
    assert!(target.memory_mut(SIZE, 8).is_none());
    guest.chain().restore(target).unwrap();
    assert!(ram == guest.ram);
}

#[test]
fn restore_to_zeroed_memory_writes_only_stored_pages() {
    struct Counting(Vec<u8>, u64);
    impl RamTarget for Counting {
        fn ram_size(&self) -> u64 {
            SIZE
        }
        fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
            self.1 += bytes.len() as u64;
            self.0.as_mut_slice().write_at(offset, bytes)
        }
    }
    let mut guest = Guest::new();
    let base = guest.path("base");
    let file = std::fs::File::create(&base).unwrap();
    file.set_len(SIZE).unwrap();
    file.write_all_at(&[1; PAGE as usize], 2 * PAGE).unwrap();
    guest.snapshots.push(base);
    guest.write(2 * PAGE, PAGE, 1);
    guest.write(9 * PAGE, 1, 5);
    guest.save();
    let mut target = Counting(vec![0; SIZE as usize], 0);
    guest.chain().restore_zeroed(&mut target).unwrap();
    assert!(target.0 == guest.ram);
    assert_eq!(target.1, 2 * PAGE);
}

#[test]
fn guest_of_two_regions_is_restored_in_place() {
    let mut guest = Guest::with_history();
    let split = 5 * 4096 + 1;
    let mut ram = vec![0xee_u8; SIZE as usize];
    let (low, high) = ram.split_at_mut(split);
    // SAFETY: both halves live until the end of the block, and nothing else accesses them in it.
    let mut target = unsafe {
        HostRam::new([
            (low.as_mut_ptr(), low.len()),
            (high.as_mut_ptr(), high.len()),
        ])
    };
    assert_eq!(target.ram_size(), SIZE);
    let split = split as u64;
    for (offset, len) in [(0, 8), (split - 3, 3), (split, 8), (SIZE - 1, 1)] {
        assert_eq!(target.memory_mut(offset, 8).unwrap().len(), len);
    }
    assert!(target.memory_mut(SIZE, 8).is_none());
    guest.chain().restore(&mut target).unwrap();
    // Only in the second region.
    target.write_at(9 * PAGE, &[7; 3]).unwrap();
    guest.write(9 * PAGE, 3, 7);
    // In both.
    target.write_at(split - 2, &[8; 4]).unwrap();
    guest.write(split - 2, 4, 8);
    assert!(target.write_at(SIZE - 1, &[0, 0]).is_err());
    assert!(ram[..SIZE as usize - 1] == guest.ram[..SIZE as usize - 1]);
}

#[test]
fn restore_to_memory_of_another_size_is_refused() {
    let mut ram = vec![7; SIZE as usize / 2];
    let error = Guest::with_history()
        .chain()
        .restore(ram.as_mut_slice())
        .unwrap_err();
    assert!(
        matches!(error, RestoreError::TargetSize { image: SIZE, target } if target == SIZE / 2),
        "{error:?}"
    );
    assert!(ram.iter().all(|byte| *byte == 7));
}

#[test]
fn runs_outside_of_the_ram_are_refused() {
    let chain = Guest::with_history().chain();
    let proceed = &mut |_| ControlFlow::Continue(());
    let reversed = Range {
        start: 2 * PAGE,
        end: PAGE,
    };
    for run in [
        SIZE - PAGE..SIZE + 1,
        SIZE + 1..SIZE + 1,
        reversed,
        0..u64::MAX,
    ] {
        let mut ram = vec![7; SIZE as usize];
        // A valid run before it is not written either.
        let runs = || [0..PAGE, run.clone()].into_iter();
        let error = chain
            .restore_runs(ram.as_mut_slice(), runs, proceed)
            .unwrap_err();
        let expected = (run.start, run.end, SIZE);
        assert!(
            matches!(error, RestoreError::InvalidRun { start, end, ram_size }
                if (start, end, ram_size) == expected),
            "{error:?}"
        );
        assert!(ram.iter().all(|byte| *byte == 7));
    }
    let mut ram = vec![7; SIZE as usize];
    let empty = || [0..0, SIZE..SIZE].into_iter();
    chain
        .restore_runs(ram.as_mut_slice(), empty, proceed)
        .unwrap();
    assert!(ram.iter().all(|byte| *byte == 7));
}

/// A target that hands out the memory of every second page, and counts the written bytes.
struct EverySecondPage {
    ram: Vec<u8>,
    written: u64,
}

impl RamTarget for EverySecondPage {
    fn ram_size(&self) -> u64 {
        self.ram.len() as u64
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.written += bytes.len() as u64;
        self.ram.as_mut_slice().write_at(offset, bytes)
    }

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        let page = &mut self.ram[offset as usize..][..len.min(PAGE as usize)];
        (offset / PAGE).is_multiple_of(2).then(|| page.into())
    }
}

#[test]
fn memory_is_read_into_and_the_rest_is_written() {
    let guest = Guest::with_history();
    let proceed = &mut |_| ControlFlow::Continue(());
    let mut target = EverySecondPage {
        ram: vec![0xee; SIZE as usize],
        written: 0,
    };
    let pages = || (0..SIZE).step_by(PAGE as usize).map(|at| at..at + PAGE);
    let chain = guest.chain();
    chain.restore_runs(&mut target, pages, proceed).unwrap();
    assert!(target.ram == guest.ram);
    assert_eq!(target.written, SIZE / 2);
}

/// A target that hands out more memory than was requested, or none.
struct WrongLength(Vec<u8>, usize);

impl RamTarget for WrongLength {
    fn ram_size(&self) -> u64 {
        self.0.len() as u64
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.0.as_mut_slice().write_at(offset, bytes)
    }

    fn memory_mut(&mut self, _: u64, _: usize) -> Option<TargetMemory<'_>> {
        let len = self.1;
        Some((&mut self.0[..len]).into())
    }
}

#[test]
fn memory_of_a_wrong_length_is_not_used() {
    let guest = Guest::with_history();
    let proceed = &mut |_| ControlFlow::Continue(());
    let run = 0..SIZE / 2;
    for len in [0, SIZE as usize] {
        let mut target = WrongLength(vec![0; SIZE as usize], len);
        let runs = || std::iter::once(run.clone());
        let chain = guest.chain();
        chain.restore_runs(&mut target, runs, proceed).unwrap();
        assert!(target.0[..SIZE as usize / 2] == guest.ram[..SIZE as usize / 2]);
        assert!(target.0[SIZE as usize / 2..].iter().all(|byte| *byte == 0));
    }
}

/// Bytes that are read into memory count like those that are written.
#[test]
fn restoring_reports_progress_and_can_be_cancelled() {
    let guest = Guest::with_history();
    let chain = guest.chain();
    let mut target = EverySecondPage {
        ram: vec![0xee; SIZE as usize],
        written: 0,
    };
    let runs = || [0..2 * PAGE, 4 * PAGE..5 * PAGE].into_iter();
    let mut seen = Vec::new();
    chain
        .restore_runs(&mut target, runs, &mut |progress| {
            seen.push(progress);
            ControlFlow::Continue(())
        })
        .unwrap();
    let pages = [0, 1, 2, 3].map(|pages| Progress::new(pages * PAGE, 3 * PAGE));
    assert_eq!(seen, pages);

    target.ram.fill(0xee);
    let error = chain
        .restore_runs(&mut target, runs, &mut |progress| match progress.done {
            PAGE => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
        .unwrap_err();
    assert!(
        matches!(error, RestoreError::Cancelled { restored: PAGE }),
        "{error:?}"
    );
    assert!(target.ram[..PAGE as usize] == guest.ram[..PAGE as usize]);
    assert!(target.ram[PAGE as usize..].iter().all(|byte| *byte == 0xee));
}

/// The RAM is a file that another process has truncated.
#[test]
fn memory_that_cannot_be_written_is_an_error_of_the_target() {
    let dir = tempfile::tempdir().unwrap();
    let full = dir.path().join("full");
    std::fs::write(&full, [7; SIZE as usize]).unwrap();
    let chain = Chain::open_raw(&full, PAGE).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(SIZE).unwrap();
    let len = NonZeroUsize::new(SIZE as usize).unwrap();
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: a new mapping, at an address that the kernel picks.
    let start = unsafe { mmap(None, len, protection, MapFlags::MAP_SHARED, &file, 0) }.unwrap();
    file.set_len(SIZE / 2).unwrap();
    // SAFETY: the memory is mapped until after the last use of the target, and nothing else
    // accesses it. The kernel reports that a part of it cannot be written.
    let mut target = unsafe { HostRam::new([(start.as_ptr().cast(), SIZE as usize)]) };
    let error = chain.restore(&mut target).unwrap_err();
    let RestoreError::Target { offset, source } = &error else {
        panic!("{error:?}");
    };
    assert!(*offset < SIZE, "{offset}");
    assert_eq!(source.raw_os_error(), Some(nix::libc::EFAULT));
    // SAFETY: mapped above, and not used any more.
    unsafe { munmap(start, SIZE as usize) }.unwrap();
}
