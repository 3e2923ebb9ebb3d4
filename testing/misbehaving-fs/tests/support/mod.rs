//! RAM that is mapped from a file.

#![allow(dead_code, reason = "each test binary uses a part")]
#![allow(unsafe_code)]

use std::fs::File;
use std::num::NonZeroUsize;
use std::path::Path;
use std::ptr::NonNull;

use misbehaving_fs::{Behavior, Lseek, MisbehavingFs, Reads};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use page_reader::{HostMemory, MappedMemory, RamLayout};
use test_machine::Need;

pub(crate) const PAGE: u64 = 4096;
pub(crate) const RAM: u64 = 4 << 20;

/// Mounts the file system for `test`, or returns `None` if the machine does not support it.
pub(crate) fn mount(test: &str, behavior: Behavior) -> Option<MisbehavingFs> {
    Need::Fuse
        .met(test)
        .then(|| MisbehavingFs::mount(behavior).expect("mounted"))
}

pub(crate) fn with_lseek(lseek: Lseek) -> Behavior {
    Behavior {
        lseek,
        ..Behavior::default()
    }
}

pub(crate) fn with_reads(reads: Reads) -> Behavior {
    Behavior {
        reads,
        ..Behavior::default()
    }
}

/// Creates a file of RAM that is one hole.
pub(crate) fn sparse(path: &Path) -> File {
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .expect("created");
    file.set_len(RAM).expect("grown");
    file
}

/// A whole file of RAM, mapped shared like by a VMM.
pub(crate) struct Mapping(NonNull<u8>);

impl Mapping {
    pub(crate) fn of(file: &File) -> Self {
        let len = NonZeroUsize::new(RAM as usize).expect("some RAM");
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses.
        let start = unsafe { mmap(None, len, access, MapFlags::MAP_SHARED, file, 0) };
        Self(start.expect("mapped").cast())
    }

    /// Fills the page at `offset`, like a guest.
    pub(crate) fn write(&self, offset: u64, value: u8) {
        for at in offset..offset + PAGE {
            assert!(at < RAM);
            // SAFETY: inside the mapping, which is writable for the lifetime of this value.
            unsafe { self.0.as_ptr().add(at as usize).write_volatile(value) };
        }
    }

    pub(crate) fn reader(&self) -> MappedMemory<'_> {
        // SAFETY: mapped for as long as this value is borrowed.
        let memory = unsafe { HostMemory::new(self.0.as_ptr(), RAM as usize) };
        let layout = RamLayout::new([(0, RAM)]).expect("a layout");
        MappedMemory::new(layout, [memory]).expect("it covers the layout")
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of`; no reader outlives this value.
        let _ = unsafe { munmap(self.0.cast(), RAM as usize) };
    }
}
