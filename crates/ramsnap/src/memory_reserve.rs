//! The memory that writing takes, allocated before the first byte is written.
//!
//! An allocation that fails ends the process at once, and would leave a part of the RAM, or a
//! staged file. With a limit of memory (`RLIMIT_DATA`, `RLIMIT_AS`), these functions fail before
//! that. What is given back when the writing begins is within the limit again.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::path::Path;
use std::thread;

use nix::sys::resource::{RLIM_INFINITY, Resource, getrlimit};

use crate::failure::Failure;

/// More than all that is allocated while RAM is overwritten or emptied: the buffers of the reads
/// and of the writes of zeros where holes cannot be made (1 MiB each), and small allocations.
const IN_PLACE: u64 = 4 << 20;
/// More than all that one thread allocates while an image is checked or written, without what
/// depends on the image: the buffers of requests in flight (16 MiB) and those of one reader.
const WRITER: u64 = 24 << 20;
/// More than what one more thread takes that checks or compares images: its stack (2 MiB) and two
/// buffers.
const THREAD: u64 = 5 << 20;
/// The most threads that check or compare images.
const THREADS: usize = 8;
/// More than what is allocated for a run of pages: the lists of the image that is read, of the
/// writer and of the footer, which grow by doubling.
const RUN: u64 = 256;

/// Memory that is set aside for the time in which existing RAM is overwritten.
#[derive(Debug)]
pub struct MemoryReserve(Vec<u8>);

impl MemoryReserve {
    /// Allocates the memory for RAM at `path`, which has not changed yet.
    pub fn in_place(path: &Path) -> Result<Self, Failure> {
        Self::take(IN_PLACE).ok_or_else(|| Failure::NoMemory {
            path: path.to_owned(),
            bytes: IN_PLACE,
        })
    }

    fn take(bytes: u64) -> Option<Self> {
        let mut memory = Vec::new();
        memory.try_reserve_exact(bytes.try_into().ok()?).ok()?;
        // Otherwise the compiler may leave out an allocation that nothing uses.
        Some(Self(black_box(memory)))
    }

    /// Frees the memory, for what is allocated from now on.
    pub fn give_back(self) {
        drop(self.0);
    }
}

/// Refuses to write a file at `path` if the memory that any file takes cannot be allocated. Called
/// before anything is read.
pub fn check_new(path: &Path) -> Result<(), Failure> {
    check(path, 0)
}

/// Refuses to read images if the memory that this takes cannot be allocated, for a verb that writes
/// no file. Called before anything is read.
pub fn check_reading() -> Result<(), Failure> {
    reserve(0).map_err(|bytes| Failure::NoMemoryToRead { bytes })
}

/// Refuses to restore to RAM at `path` if the memory for the checks of the images cannot be
/// allocated. Called before anything is read.
pub fn check_in_place(path: &Path) -> Result<(), Failure> {
    reserve(0).map_err(|bytes| Failure::NoMemory {
        path: path.to_owned(),
        bytes,
    })
}

/// Refuses to write an image at `path` if the memory for it cannot be allocated. Called before the
/// file is staged.
///
/// The number of runs of pages is not known yet. It is at most half that of the pages.
pub fn check_image(path: &Path, ram_size: u64, page_size: u64) -> Result<(), Failure> {
    let is_limited = [Resource::RLIMIT_AS, Resource::RLIMIT_DATA]
        .into_iter()
        .any(|limit| getrlimit(limit).is_ok_and(|(most, _)| most != RLIM_INFINITY));
    // The most may be more than a machine has.
    check(
        path,
        if is_limited {
            ram_size / page_size.max(1) / 2
        } else {
            0
        },
    )
}

fn check(path: &Path, runs: u64) -> Result<(), Failure> {
    reserve(runs).map_err(|bytes| Failure::NoMemoryForOutput {
        path: path.to_owned(),
        bytes,
    })
}

/// Allocates the memory for images of so many runs, and frees it. Returns the number of bytes if
/// that fails.
fn reserve(runs: u64) -> Result<(), u64> {
    let threads = thread::available_parallelism().map_or(1, NonZeroUsize::get);
    let threads = threads.min(THREADS) as u64;
    let bytes = WRITER + threads * THREAD + runs.saturating_mul(RUN);
    match MemoryReserve::take(bytes) {
        Some(reserve) => {
            reserve.give_back();
            Ok(())
        }
        None => Err(bytes),
    }
}
