//! RAM that is read from a chain when the guest touches it.

mod error;
mod filler;
mod memory;
mod options;
mod page_bits;
mod turns;
mod userfaultfd;

use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use page_reader::{HostMemory, PageReader, SecretBuffer};

use crate::map::Region;
use crate::working_set::WorkingSet;
use filler::{Filler, Phase, locked, wait_error};
use options::AbortOnPanic;

pub use error::LazyError;
pub use options::LazyRamOptions;
pub use userfaultfd::UserfaultfdError;

/// Guest RAM that is filled from a chain on demand, so that a guest starts at once, for any size of
/// the RAM and any layout of the chain (Linux, userfaultfd).
///
/// A page is read when it is first touched: by a thread of this process, by the kernel on its
/// behalf, or by a KVM vCPU. The fault handler thread also reads the surrounding bytes that are
/// adjacent in the same image. The prefetch thread reads everything else in the background, at the
/// speed of the disk. Faults have priority, but after a bounded number of faults 64 KiB are
/// prefetched, so that filling completes at any rate of faults. After [`wait`](Self::wait) has
/// returned, the memory is ordinary memory, and both threads have ended.
///
/// The memory is private and anonymous. The guest's writes never change the images. Files may be
/// replaced at any time, and removed after filling has completed. Zeros take no memory.
///
/// Until filling has completed, forked children do not get the memory (`MADV_DONTFORK`): they would
/// find zeros in missing pages. Afterwards children get it again, except for parts that the VMM had
/// excluded itself. Images of a chain [with very many images](crate::Chain#many-images) that are
/// not kept open must stay in place until then.
///
/// # Read errors
/// A page that cannot be read never becomes zeros. [`error`](Self::error) and [`wait`](Self::wait)
/// report the error, and prefetching ends. Every access to the page gets `SIGBUS` (a system call
/// `EFAULT`, a vCPU `SIGBUS` in its thread). Linux before 6.6 cannot poison pages: there the page
/// is made inaccessible, an access gets `SIGSEGV`, and `KVM_RUN` fails.
///
/// # Discarded, unmapped and moved memory
/// A balloon device may discard pages at any time, before and after they are filled. After
/// `MADV_DONTNEED` they are zeros, as in any private memory, and are no longer read from the
/// images. After `MADV_FREE`, pages that were not filled yet are zeros. `madvise` waits for the
/// fault handler, which may be reading a page from the images. The kernel fills no page while a
/// thread is about to discard some: several threads that discard continuously, and touch nothing,
/// delay faults and [`wait`](Self::wait).
///
/// Memory must not be unmapped or moved until filling has completed. Otherwise the error is
/// [`UserfaultfdError::Unmapped`], and missing pages at the new address are inaccessible. So are
/// the pages at the old address if it stays mapped (`MREMAP_DONTUNMAP`), including pages that were
/// filled before the move. If something else puts a page into the memory, the error is
/// [`UserfaultfdError::Occupied`], and the page is made inaccessible.
///
/// # Limitations
/// The memory must not be accessed after the value is dropped. The kernel protects missing pages
/// only while the userfaultfd is open. A process that closes descriptors that it does not own
/// (`close_range`, as some daemons do at start) must do so before. A process that shares the
/// address space (`clone` with `CLONE_VM`) and outlives this one finds zeros in missing pages.
///
/// # Examples
/// ```
/// use memory_image::{Chain, LazyRam, WorkingSet};
/// use page_reader::PageReader;
/// # if !test_machine::Need::Userfaultfd.met("the example of LazyRam") { return Ok(()); }
/// # let dir = tempfile::tempdir()?;
/// # let (full, set) = (dir.path().join("full.mem"), dir.path().join("full.set"));
/// # std::fs::write(&full, vec![7; 1 << 20])?;
///
/// // Once: record the pages that the guest touches after it was restored.
/// let ram = LazyRam::options().record(true).start(Chain::open_raw(&full, 4096)?)?;
/// let mut byte = [0];
/// ram.read_at(70_000, &mut byte)?; // a guest would run
/// assert_eq!(byte, [7]);
/// ram.recorded().save(&set)?;
///
/// // Later starts read these pages first.
/// let options = LazyRam::options().working_set(WorkingSet::load(&set)?);
/// let ram = options.start(Chain::open_raw(&full, 4096)?)?;
/// println!("a guest of {} bytes at {:p}", ram.ram_size(), ram.as_ptr());
/// ram.wait()?; // until all pages are in memory
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LazyRam {
    filler: Arc<Filler>,
    /// The fault handler and the prefetcher.
    threads: Vec<JoinHandle<()>>,
    /// Unmapped last. `None` for memory that a VMM has mapped.
    _region: Option<Region>,
}

/// The progress of a [`LazyRam`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the images that are in memory. Pages that were discarded before they were filled
    /// are not included.
    pub loaded: u64,
    /// Total bytes of the images, in whole pages of the host.
    pub stored: u64,
    /// Number of handled faults, each of which made an access wait.
    pub faults: u64,
}

impl LazyRam {
    /// Returns the default options.
    pub fn options() -> LazyRamOptions {
        LazyRamOptions::default()
    }

    /// Returns the address of the first byte, aligned to the host's page. For
    /// [adopted](LazyRamOptions::adopt) memory it is the address of the first region. It is valid
    /// for reads and writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        let first = self.filler.memory.regions().next();
        first.map_or(std::ptr::null_mut(), |(start, _)| start)
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.filler.chain.ram_size()
    }

    /// Returns the progress of filling.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            loaded: self.filler.loaded.load(Ordering::Relaxed),
            stored: self.filler.stored_bytes(),
            faults: self.filler.faults.load(Ordering::Relaxed),
        }
    }

    /// Waits until all pages are in memory. Without a prefetcher
    /// ([`prefetch(false)`](LazyRamOptions::prefetch), or while recording), this call reads them.
    ///
    /// # Errors
    /// Returns the first error since the start, as [`error`](Self::error) does.
    pub fn wait(&self) -> Result<(), Arc<LazyError>> {
        let filler = &self.filler;
        let mut phase = locked(&filler.phase);
        if *phase == Phase::Idle {
            *phase = Phase::Running;
            drop(phase);
            let guard = AbortOnPanic(filler);
            filler.fill_everything();
            std::mem::forget(guard);
            phase = locked(&filler.phase);
        }
        while *phase != Phase::Ended {
            phase = filler
                .ended
                .wait(phase)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        filler.failure.get().cloned().map_or(Ok(()), Err)
    }

    /// Returns the first error since the start, after which some page was not read.
    #[must_use]
    pub fn error(&self) -> Option<&LazyError> {
        self.filler.failure.get().map(Arc::as_ref)
    }

    /// Returns the pages touched so far, in the order of their first touch. It is empty without
    /// [`record`](LazyRamOptions::record).
    #[must_use]
    pub fn recorded(&self) -> WorkingSet {
        match &self.filler.recorded {
            Some(recorded) => locked(recorded).clone(),
            None => WorkingSet::of(self.filler.chain.ram_size()),
        }
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        self.filler.stop_prefetch.store(true, Ordering::Relaxed);
        self.filler.stop_handler();
        for thread in self.threads.drain(..) {
            // The panic, if any, was reported as an error.
            _ = thread.join();
        }
        match self.filler.finished.load(Ordering::Acquire) {
            true => {}
            false if self.filler.own => self.filler.unregister_all(),
            // The VMM's memory stays mapped.
            false => self.filler.revoke(),
        }
    }
}

/// Reads the RAM as the guest has it now: the images and the guest's writes. Missing pages are read
/// from the images. An access to a page that cannot be read gets `SIGBUS`, or an error where the
/// kernel reads the memory.
impl PageReader for LazyRam {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        end.filter(|end| *end <= self.filler.chain.ram_size())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        let (mut offset, mut rest) = (offset, buf);
        while let Some(memory) = self.host_memory(offset, rest.len()) {
            let (now, later) = rest.split_at_mut(memory.len());
            memory.copy_to(now);
            (offset, rest) = (offset + memory.len() as u64, later);
        }
        Ok(())
    }

    fn host_memory(&self, offset: u64, len: usize) -> Option<HostMemory<'_>> {
        let end = offset.saturating_add(len as u64);
        let end = end.min(self.filler.chain.ram_size());
        self.filler.memory.host_memory(offset..end)
    }
}

/// Handles faults until stopped.
fn handle_faults(filler: &Filler) -> Result<(), LazyError> {
    let mut buffer = SecretBuffer::new();
    loop {
        let mut ready = [
            PollFd::new(filler.fault.as_fd(), PollFlags::POLLIN),
            PollFd::new(filler.stopping.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            polled => _ = polled.map_err(|errno| wait_error(errno.into()))?,
        }
        // Handle all faults: a fault that was read does not make the descriptor readable again.
        while let Some(address) = filler.next_fault()? {
            filler.handle_fault(address, &mut buffer)?;
        }
        if ready[1].any() == Some(true) {
            // Continue while a thread waits for its message to be read.
            if !filler.fault.is_changing() {
                return Ok(());
            }
            std::thread::yield_now();
        }
    }
}

#[cfg(test)]
mod tests {
    use test_machine::Need;

    use super::*;
    use crate::chain::Chain;

    #[test]
    fn stopped_prefetch_is_not_reported_as_complete() {
        if !Need::Userfaultfd.met("stopped_prefetch_is_not_reported_as_complete") {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 4 << 20]).unwrap();
        let chain = Chain::open_raw(file.path(), 4096).unwrap();
        let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
        ram.filler.stop_prefetch.store(true, Ordering::Relaxed);
        ram.wait().unwrap();
        assert_eq!(ram.progress().loaded, 0);
        assert!(!ram.filler.finished.load(Ordering::Acquire));
    }
}
