//! Restores a chain to memory.

mod host_ram;
#[cfg(target_os = "linux")]
pub(crate) mod lazy;

use std::io;
use std::ops::Range;

use page_reader::SecretBuffer;

pub use host_ram::HostRam;

use crate::chain::Chain;
use crate::error::RestoreError;

/// Bytes copied at a time.
pub(crate) const CHUNK: u64 = 1 << 20;

/// Memory that a guest's RAM can be restored to, addressed by the offset in the memory file.
pub trait RamTarget {
    /// Returns the size of the memory in bytes.
    fn ram_size(&self) -> u64;

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// Fails if the bytes cannot be written there.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;
}

impl RamTarget for [u8] {
    fn ram_size(&self) -> u64 {
        self.len() as u64
    }

    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let target = self
            .get_mut(start..)
            .and_then(|rest| rest.get_mut(..bytes.len()));
        target
            .ok_or(io::ErrorKind::WriteZero)?
            .copy_from_slice(bytes);
        Ok(())
    }
}

impl Chain {
    /// Writes all of the RAM to `target`, including zeros, regardless of its previous content.
    ///
    /// # Errors
    /// [`RestoreError`]. After an error the target may hold a part of the RAM.
    pub fn restore<T: RamTarget + ?Sized>(&self, target: &mut T) -> Result<(), RestoreError> {
        self.restore_runs(target, std::iter::once(0..self.ram_size()))
    }

    /// Writes the stored pages to `target`, which must hold only zeros, such as newly mapped
    /// memory. Zeros that are in no image are not written, so pages that the guest never used take
    /// no memory.
    ///
    /// # Errors
    /// [`RestoreError`]. After an error the target may hold a part of the RAM.
    pub fn restore_zeroed<T: RamTarget + ?Sized>(
        &self,
        target: &mut T,
    ) -> Result<(), RestoreError> {
        self.restore_runs(target, self.stored_runs())
    }

    /// Writes `runs` of the RAM (ranges of bytes) to `target`, including zeros, regardless of its
    /// previous content. The rest of the target is unchanged.
    ///
    /// # Errors
    /// [`RestoreError`]. After an error the target may hold a part of the RAM.
    pub fn restore_runs<T: RamTarget + ?Sized>(
        &self,
        target: &mut T,
        runs: impl Iterator<Item = Range<u64>>,
    ) -> Result<(), RestoreError> {
        self.check_full()?;
        if target.ram_size() != self.ram_size() {
            return Err(RestoreError::TargetSize {
                image: self.ram_size(),
                target: target.ram_size(),
            });
        }
        let mut buffer = SecretBuffer::new();
        let buffer = buffer.sized(CHUNK.min(self.ram_size()) as usize);
        for run in runs {
            for offset in run.clone().step_by(CHUNK as usize) {
                let bytes = &mut buffer[..CHUNK.min(run.end - offset) as usize];
                self.read(offset, bytes)?;
                target
                    .write_at(offset, bytes)
                    .map_err(|source| RestoreError::Target { offset, source })?;
            }
        }
        Ok(())
    }
}
