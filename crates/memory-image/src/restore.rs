//! Restores a chain to memory.

#[cfg(feature = "vm-memory")]
mod guest_memory;
mod host_ram;
mod target_memory;
mod targets;

use std::io;
use std::ops::{ControlFlow, Range};

use nix::errno::Errno;
use page_reader::{RamLayout, SecretBuffer};
use sparse_file::{Progress, ProgressFn};

#[cfg(feature = "vm-memory")]
pub use guest_memory::GuestMemoryTarget;
pub use host_ram::HostRam;
pub use target_memory::TargetMemory;

use crate::chain::Chain;
use crate::chain::segment::{Segment, SegmentSource};
use crate::error::RestoreError;
use crate::image::{Image, READ_SIZE};

/// Memory that a guest's RAM can be restored to, addressed by the offset in the memory file.
///
/// | location of the RAM | target |
/// |---|---|
/// | a `GuestRam` of the crate `guest-ram` | `&GuestRam`, which marks no page |
/// | a `GuestRam` of the crate `kvm-backend` | the `&GuestRam` that it dereferences to |
/// | the types of the `vm-memory` crate | `GuestMemoryTarget` (feature `vm-memory`) |
/// | mapped in this process, the guest does not run | [`HostRam`] |
/// | ordinary memory | `[u8]`, `Vec<u8>` |
/// | anywhere else | your `impl RamTarget`: two required methods, two provided ones |
///
/// It is implemented for `&mut T` and `Box<T>` too. For an `Arc<GuestRam>` named `ram`, pass
/// `&mut &*ram` to [`Chain::restore`], or `&mut &**ram` if it is the `GuestRam` of `kvm-backend`.
#[diagnostic::on_unimplemented(
    message = "a guest's RAM cannot be restored to `{Self}`",
    label = "this type does not implement `RamTarget`",
    note = "for mapped memory, pass `&mut HostRam`; for an `Arc<GuestRam>`, `&mut &*ram`, or \
            `&mut &**ram` if it is that of `kvm-backend`; for ordinary memory, `&mut [u8]` or `&mut Vec<u8>`",
    note = "for guest memory of the crate `vm-memory`, pass `GuestMemoryTarget::new(&memory)?` \
            (feature `vm-memory` of `memory-image`)",
    note = "for any other target, implement `RamTarget`: `ram_size` and `write_at` are required"
)]
pub trait RamTarget {
    /// Returns the size of the memory in bytes.
    fn ram_size(&self) -> u64;

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// Fails if the bytes cannot be written there.
    fn write_at(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()>;

    /// Returns the memory that holds the bytes from `offset` on, at most `len` and at least one, if
    /// they are in this process. The images are then read into it directly, which saves a copy.
    /// The default is `None`: the bytes are passed to [`write_at`](Self::write_at).
    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        let _ = (offset, len);
        None
    }

    /// Returns the guest-physical addresses of the memory, if they are known. A chain with other
    /// addresses is then not restored to it. The default is `None`.
    fn ram_layout(&self) -> Option<&RamLayout> {
        None
    }
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

    fn memory_mut(&mut self, offset: u64, len: usize) -> Option<TargetMemory<'_>> {
        let rest = self.get_mut(usize::try_from(offset).ok()?..)?;
        let len = len.min(rest.len());
        (len > 0).then(|| TargetMemory::from(&mut rest[..len]))
    }
}

impl Chain {
    /// Writes all of the RAM to `target`, including zeros, regardless of its previous content.
    /// [`restore_runs`](Self::restore_runs) does the same with a progress function.
    ///
    /// Checksums are not compared: call [`verify`](Self::verify) first if the images were stored or
    /// copied since they were written.
    ///
    /// # Errors
    /// Returns a [`RestoreError`]. After an error the target may hold a part of the RAM. If an
    /// image was [written to](Self::check_unchanged) during the restore, the target may hold bytes
    /// of several states.
    pub fn restore<T: RamTarget + ?Sized>(&self, target: &mut T) -> Result<(), RestoreError> {
        let all = || std::iter::once(0..self.ram_size());
        self.restore_runs(target, all, &mut |_| ControlFlow::Continue(()))
    }

    /// Writes the stored pages to `target`, which must hold only zeros, such as newly mapped
    /// memory. Zeros that are in no image are not written, so pages that the guest never used take
    /// no memory. [`restore_runs`](Self::restore_runs) does the same with
    /// [`stored_runs`](Self::stored_runs) and a progress function.
    ///
    /// # Errors
    /// Returns the errors of [`restore`](Self::restore).
    pub fn restore_zeroed<T: RamTarget + ?Sized>(
        &self,
        target: &mut T,
    ) -> Result<(), RestoreError> {
        let stored = || self.stored_runs();
        self.restore_runs(target, stored, &mut |_| ControlFlow::Continue(()))
    }

    /// Writes runs of the RAM (ranges of bytes) to `target`, including zeros, regardless of its
    /// previous content. The rest of the target is unchanged.
    ///
    /// `runs` is called twice, to count the bytes and to write them. `progress` is called before
    /// the first byte and after each piece of at most 1 MiB. It may cancel.
    ///
    /// # Errors
    /// Returns the errors of [`restore`](Self::restore), and [`RestoreError::InvalidRun`] before
    /// anything is written.
    ///
    /// # Examples
    /// ```
    /// use memory_image::{CancelToken, Chain, RestoreError};
    /// # let dir = tempfile::tempdir()?;
    /// # let full = dir.path().join("full.mem");
    /// # std::fs::write(&full, vec![7; 1 << 20])?;
    ///
    /// let chain = Chain::open_raw(&full, 4096)?;
    /// let mut ram = vec![0; 1 << 20];
    /// let cancel = CancelToken::new(); // clone it for the thread that may cancel
    /// let mut progress = |progress: memory_image::Progress| {
    ///     println!("{} of {} bytes", progress.done, progress.total);
    ///     cancel.flow()
    /// };
    /// chain.restore_runs(ram.as_mut_slice(), || chain.stored_runs(), &mut progress)?;
    /// assert!(ram.iter().all(|byte| *byte == 7));
    ///
    /// cancel.cancel();
    /// let again = chain.restore_runs(ram.as_mut_slice(), || chain.stored_runs(), &mut progress);
    /// assert!(matches!(again, Err(RestoreError::Cancelled { restored: 0 })));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn restore_runs<T: RamTarget + ?Sized, R: Iterator<Item = Range<u64>>>(
        &self,
        target: &mut T,
        runs: impl Fn() -> R,
        progress: &mut ProgressFn<'_>,
    ) -> Result<(), RestoreError> {
        self.check_full()?;
        if target.ram_size() != self.ram_size() {
            return Err(RestoreError::TargetSize {
                image: self.ram_size(),
                target: target.ram_size(),
            });
        }
        if let (Some(image), Some(target)) = (self.ram_layout(), target.ram_layout())
            && image.addresses().ne(target.addresses())
        {
            return Err(RestoreError::TargetAddresses {
                image: image.clone(),
                target: target.clone(),
            });
        }
        let mut total = 0;
        for run in runs() {
            total += self.check_run(&run)?;
        }
        let mut restored = 0;
        let mut report = |bytes: u64| {
            restored += bytes;
            match progress(Progress::new(restored, total)).is_break() {
                true => Err(RestoreError::Cancelled { restored }),
                false => Ok(()),
            }
        };
        report(0)?;
        // Only a file is read into memory by its address.
        let only_files = self.images().all(Image::has_file);
        let mut buffer = SecretBuffer::new();
        for run in runs() {
            self.check_run(&run)?;
            let mut at = run.start;
            while at < run.end {
                let len = READ_SIZE.min(run.end - at) as usize;
                let memory = match only_files {
                    true => target.memory_mut(at, len),
                    false => None,
                };
                if let Some(mut memory) = memory.filter(|it| (1..=len).contains(&it.len())) {
                    self.read_to_memory(at, &mut memory)?;
                    let read = memory.len() as u64;
                    at += read;
                    report(read)?;
                    continue;
                }
                let bytes = buffer.sized(len);
                self.read(at, bytes)?;
                let written = target.write_at(at, bytes);
                written.map_err(|source| RestoreError::Target { offset: at, source })?;
                at += len as u64;
                report(len as u64)?;
            }
        }
        Ok(self.check_unchanged()?)
    }

    /// Returns the length of `run`, which must be in the RAM.
    fn check_run(&self, run: &Range<u64>) -> Result<u64, RestoreError> {
        match run.end.checked_sub(run.start) {
            Some(len) if run.end <= self.ram_size() => Ok(len),
            _ => Err(RestoreError::InvalidRun {
                start: run.start,
                end: run.end,
                ram_size: self.ram_size(),
            }),
        }
    }

    /// Reads the bytes from `offset` on into `memory`.
    fn read_to_memory(
        &self,
        offset: u64,
        memory: &mut TargetMemory<'_>,
    ) -> Result<(), RestoreError> {
        let end = offset + memory.len() as u64;
        for Segment { range, source } in self.segments(offset..end) {
            let part = (range.start - offset) as usize..(range.end - offset) as usize;
            let (layer, at) = match source {
                SegmentSource::Stored { layer, offset } => (layer, offset),
                SegmentSource::Hole | SegmentSource::Zero => {
                    memory.fill_zeros(part);
                    continue;
                }
            };
            let image = self.image(layer);
            let file = image.file()?;
            let read = memory.read_from(part, &file, at);
            read.map_err(|(at, source)| read_failed(image, range.start, at, source))?;
        }
        Ok(())
    }
}

/// Returns the error of a read from `image` at `at` to the memory at `offset` of the RAM.
fn read_failed(image: &Image, offset: u64, at: u64, source: io::Error) -> RestoreError {
    match source.raw_os_error() {
        // The memory is not writable. The file is not at fault.
        Some(errno) if errno == Errno::EFAULT as i32 => RestoreError::Target { offset, source },
        _ => image.read_error(at, source).into(),
    }
}

#[cfg(test)]
mod tests {
    use image_format::RAW_UNIT;

    use super::*;
    use crate::error::ReadImageError;

    #[test]
    fn errors_of_the_file_and_of_the_memory_are_distinguished() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(RAW_UNIT).unwrap();
        let image = Image::open_raw(file.path()).unwrap();
        let failed = |errno: Errno| read_failed(&image, 1, 2, errno.into());
        let error = failed(Errno::EFAULT);
        assert!(matches!(error, RestoreError::Target { offset: 1, .. }));
        let error = failed(Errno::EIO);
        assert!(matches!(
            error,
            RestoreError::Read(ReadImageError::Read { offset: 2, .. })
        ));
    }
}
