//! The restore targets that need no code of their own: pointers, vectors and guest RAM.

#![allow(unsafe_code)]

use std::io;

use guest_ram::{BitmapKind, GuestRam};
use page_reader::{PageReader, RamLayout};

use super::{RamTarget, TargetMemory};

macro_rules! target_by_pointer {
    ($($pointer:ty),*) => {$(
        /// Restores to what the pointer refers to.
        impl<T: RamTarget + ?Sized> RamTarget for $pointer {
            fn ram_size(&self) -> u64 {
                (**self).ram_size()
            }

            fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
                (**self).write_at(offset, bytes)
            }

            fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
                (**self).memory_mut(offset, len)
            }

            fn ram_layout(&self) -> Option<&RamLayout> {
                (**self).ram_layout()
            }
        }
    )*};
}

target_by_pointer!(&mut T, Box<T>);

/// The RAM has the length of the vector.
impl RamTarget for Vec<u8> {
    fn ram_size(&self) -> u64 {
        self.as_slice().ram_size()
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.as_mut_slice().write_at(offset, bytes)
    }

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        self.as_mut_slice().memory_mut(offset, len)
    }
}

/// Marks no page, and reads the images into the RAM without a copy.
///
/// This is right before the guest runs, when the restored snapshot is the parent of the next diff.
/// Other marks, such as those of the start of a dirty log, are discarded by
/// [`GuestRam::set_baseline`].
///
/// # Examples
/// ```
/// use std::sync::Arc;
/// use guest_ram::GuestRam;
/// use memory_image::Chain;
/// use page_reader::{PageReader, RamLayout};
/// # let dir = tempfile::tempdir()?;
/// # let full = dir.path().join("full.mem");
/// # std::fs::write(&full, vec![7; 1 << 20])?;
///
/// let ram: Arc<GuestRam> = Arc::new(GuestRam::new(RamLayout::single(0, 1 << 20)?)?);
/// Chain::open_raw(&full, 4096)?.restore(&mut &*ram)?;
/// let mut byte = [0];
/// ram.read_at(4096, &mut byte)?;
/// assert_eq!(byte, [7]);
/// assert!(ram.dirty_bitmap().is_clean()); // the first diff has what is written from here on
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
impl<K: BitmapKind> RamTarget for &GuestRam<K> {
    fn ram_size(&self) -> u64 {
        self.layout().ram_size()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(self.layout())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let written = self.write_unmarked_at(offset, bytes);
        written.map_err(|error| io::Error::new(io::ErrorKind::WriteZero, error))
    }

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        memory_of(self, offset, len)
    }
}

/// Marks no page, as the target `&GuestRam` does.
impl<K: BitmapKind> RamTarget for GuestRam<K> {
    fn ram_size(&self) -> u64 {
        self.layout().ram_size()
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        Some(self.layout())
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        RamTarget::write_at(&mut &*self, offset, bytes)
    }

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        memory_of(self, offset, len)
    }
}

/// Returns the memory of `ram` from `offset` on, at most `len` bytes.
fn memory_of<K: BitmapKind>(
    ram: &GuestRam<K>,
    offset: u64,
    len: usize,
) -> Option<TargetMemory<'_>> {
    let memory = ram.host_memory(offset, len)?;
    // SAFETY: the memory is that of a mapping, which is writable while the RAM exists, and the RAM
    // is borrowed. All Rust code accesses it by atomic or volatile operations only, by the contract
    // of its owner.
    Some(unsafe { TargetMemory::shared(memory.as_ptr().cast_mut(), memory.len()) })
}
