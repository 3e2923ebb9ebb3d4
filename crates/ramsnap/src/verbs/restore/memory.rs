//! The memory that overwriting RAM takes.

use std::hint::black_box;
use std::path::Path;

use crate::failure::Failure;

/// More than all that is allocated while RAM is overwritten or emptied: the buffers of the reads
/// and of the writes of zeros where holes cannot be made (1 MiB each), and small allocations.
const BYTES: usize = 4 << 20;

/// Memory that is set aside for the time in which existing RAM is overwritten.
///
/// An allocation that fails ends the process at once, and would leave a part of the RAM. With a
/// limit of memory (`RLIMIT_DATA`, `RLIMIT_AS`), this fails before the first byte changes. What
/// is given back when the overwriting begins is within the limit again.
#[derive(Debug)]
pub(super) struct MemoryReserve(Vec<u8>);

impl MemoryReserve {
    /// Allocates the memory for RAM at `path`, which has not changed yet.
    pub(super) fn take(path: &Path) -> Result<Self, Failure> {
        let mut memory = Vec::new();
        let reserved = memory.try_reserve_exact(BYTES);
        reserved.map_err(|_| Failure::NoMemory {
            path: path.to_owned(),
            bytes: BYTES,
        })?;
        // Otherwise the compiler may leave out an allocation that nothing uses.
        Ok(Self(black_box(memory)))
    }

    /// Frees the memory, for what is allocated from now on.
    pub(super) fn give_back(self) {
        drop(self.0);
    }
}
