//! Registration of memory with a userfaultfd.

use std::ops::Range;

use uffd::{Features, Modes, Userfaultfd};

use crate::mapping::Mapping;

/// Memory that is registered for page faults until this value is dropped.
#[derive(Debug)]
pub struct Registered {
    fault: Userfaultfd,
    range: Range<u64>,
}

/// Unregisters the memory. Closing is not sufficient: a child that another test forks may inherit
/// the descriptor.
impl Drop for Registered {
    fn drop(&mut self) {
        self.fault.unregister(self.range.clone()).unwrap();
    }
}

/// Registers the first `len` bytes for missing pages. Their faults are not handled.
pub fn register_missing(mapping: &Mapping, len: usize) -> Registered {
    register(mapping, len, Modes::MISSING, Features::empty())
}

/// Registers the first `len` bytes of shared memory for pages that the file has and the mapping
/// does not have.
pub fn register_minor(mapping: &Mapping, len: usize) -> Registered {
    register(mapping, len, Modes::MINOR, Features::MINOR_SHMEM)
}

fn register(mapping: &Mapping, len: usize, modes: Modes, features: Features) -> Registered {
    let fault = Userfaultfd::options().features(features).open().unwrap();
    let range = mapping.address()..mapping.address() + len as u64;
    // SAFETY: mapped, and not accessed while it is registered.
    unsafe { fault.register(range.clone(), modes) }.unwrap();
    Registered { fault, range }
}
