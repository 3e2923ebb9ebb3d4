//! A restore target that writes to mapped guest memory without a reference to it.

#![allow(unsafe_code)]

use std::io;
use std::marker::PhantomData;
use std::ptr;

use super::{RamTarget, TargetMemory};

/// The mapped RAM of a guest that does not run yet: its regions in the order of the memory file.
///
/// # Examples
/// ```
/// use memory_image::{HostRam, RamTarget};
///
/// let mut low = vec![0_u8; 8192];
/// let mut high = vec![0_u8; 4096];
/// // SAFETY: both vectors outlive `ram`, and are accessed only through it until then.
/// let mut ram = unsafe { HostRam::new([(low.as_mut_ptr(), 8192), (high.as_mut_ptr(), 4096)]) };
/// ram.write_at(8190, &[1, 2, 3, 4])?;
/// drop(ram);
/// assert_eq!((&low[8190..], &high[..2]), (&[1, 2][..], &[3, 4][..]));
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Debug)]
#[must_use = "a target has no effect until it is passed to a restore"]
pub struct HostRam<'a> {
    regions: Vec<(*mut u8, usize)>,
    memory: PhantomData<&'a mut ()>,
}

// SAFETY: the value is addresses and lengths. `new` requires that the regions are mapped and
// accessed by nothing else, whichever thread has the value.
unsafe impl Send for HostRam<'_> {}
// SAFETY: methods with `&self` return the size only.
unsafe impl Sync for HostRam<'_> {}

impl HostRam<'_> {
    /// Creates a target from the address and the length in bytes of each region.
    ///
    /// # Safety
    /// For the lifetime of the value every region must stay mapped and writable, no two regions may
    /// overlap, and nothing else may read or write them: no vCPU runs and no device is active.
    pub unsafe fn new(regions: impl IntoIterator<Item = (*mut u8, usize)>) -> Self {
        Self {
            regions: regions.into_iter().collect(),
            memory: PhantomData,
        }
    }
}

impl RamTarget for HostRam<'_> {
    fn ram_size(&self) -> u64 {
        self.regions.iter().map(|(_, len)| *len as u64).sum()
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let (mut offset, mut bytes) = (usize::try_from(offset).map_err(io::Error::other)?, bytes);
        for (start, len) in &self.regions {
            if bytes.is_empty() {
                break;
            }
            if offset >= *len {
                offset -= len;
                continue;
            }
            let (now, later) = bytes.split_at(bytes.len().min(len - offset));
            // SAFETY: `offset + now.len()` is at most `len`, so the written bytes are inside a
            // region. The constructor's caller promised that the region is mapped, writable and not
            // otherwise accessed. `now` is a shared slice, so it is no part of the region.
            unsafe { ptr::copy_nonoverlapping(now.as_ptr(), start.add(offset), now.len()) };
            (offset, bytes) = (0, later);
        }
        if bytes.is_empty() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        let mut offset = usize::try_from(offset).ok()?;
        for (start, region) in &self.regions {
            if offset < *region {
                // SAFETY: `offset` is inside the region.
                let start = unsafe { start.add(offset) };
                let len = len.min(region - offset);
                // SAFETY: the range is inside the region, which is mapped, writable and not
                // otherwise accessed, by the contract of `new`. The value borrows `self`
                // exclusively.
                return Some(unsafe { TargetMemory::new(start, len) });
            }
            offset -= region;
        }
        None
    }
}
