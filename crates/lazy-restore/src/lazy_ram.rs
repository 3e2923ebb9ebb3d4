//! RAM that is read from a chain, or another source, when the guest touches it.

use std::io;
use std::ops::ControlFlow;
use std::sync::Arc;

use host_memory::HostMemory;
use memory_image::{Progress, ProgressFn};
use page_reader::{PageReader, RamLayout};

use crate::error::{LazyError, WaitError};
use crate::filling::Filling;
use crate::options::LazyRamOptions;
use crate::pages::Pages;
use crate::region::Region;
use crate::target::Target;
use crate::working_set::WorkingSet;

/// Guest RAM that is filled from a chain, or another [source](crate::RamSource), on demand, so that
/// a guest starts at once, for any size of the RAM and any layout of the chain (Linux,
/// userfaultfd).
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
/// excluded itself. A VMM that calls `MADV_DOFORK` on the memory before that gives children zeros
/// in missing pages. Images of a chain [with very many images](memory_image::Chain#many-images)
/// that are not kept open must stay in place until then.
///
/// # Read errors
/// A page that cannot be read never becomes zeros. [`error`](Self::error) and [`wait`](Self::wait)
/// report the error, and prefetching ends. Every access to the page gets `SIGBUS` (a system call
/// `EFAULT`, a vCPU `SIGBUS` in its thread). Linux before 6.6 cannot poison pages: there the page
/// is made inaccessible, an access gets `SIGSEGV`, and `KVM_RUN` fails.
///
/// A save of such memory by the crate `memory-writer` fails, and its error names the error of the
/// source: the kernel reports `EFAULT`, and the writer asks the reader
/// ([`check_source`](PageReader::check_source)) for the cause. [`read_at`](PageReader::read_at)
/// returns an error of the source that was recorded before. Its own access to a page that cannot be
/// read gets `SIGBUS`, as any other.
///
/// # Slow sources
/// A [source](crate::RamSource) that is no chain may take long to read, such as a server. An access
/// waits for the read of its page, and faults are handled one after the other. Dropping the value
/// waits for the reads that are in progress, so a source should limit the time of a read, and then
/// fail. A failed read is repeated once, for the touched page alone. A source that can try again
/// does so itself.
///
/// # Images that are written to
/// The images must not be written to until filling has completed. Starting fails if one was resized
/// or [written to](memory_image::Chain::check_unchanged) since the chain was opened, and
/// [`wait`](Self::wait) reports this at the end. A page that the guest touches in between may hold
/// other bytes: an error of `wait` means that the guest must not be used further. Without a
/// prefetcher and without `wait`, nothing reports it.
///
/// # Discarded, unmapped and moved memory
/// A balloon device may discard pages at any time, before and after they are filled. After
/// `MADV_DONTNEED` they are zeros, as in any private memory, and are no longer read from the
/// images. After `MADV_FREE`, pages that were not filled yet are zeros. `madvise` waits for the
/// fault handler, which may be reading a page from the images. The kernel fills no page while a
/// thread is about to discard some: several threads that discard continuously, and touch nothing,
/// delay faults and [`wait`](Self::wait).
///
/// Pages of a guard region (`MADV_GUARD_INSTALL`) that were not filled yet are not filled while it
/// exists. Once it is removed, a touched page has the bytes of the images, not zeros: use guard
/// regions on filled pages only, or discard the pages afterwards.
///
/// Memory must not be unmapped or moved until filling has completed. Otherwise the error is
/// [`UserfaultfdError::Unmapped`], and missing pages at the new address are inaccessible. So are
/// the pages at the old address if it stays mapped (`MREMAP_DONTUNMAP`), including pages that were
/// filled before the move. If something else puts a page into the memory, the error is
/// [`UserfaultfdError::Occupied`], and the page is made inaccessible.
///
/// Dropping the value unregisters the memory. Adopted memory may be unmapped afterwards without a
/// wait for a message to be read, also if another process has a duplicate of the userfaultfd.
///
/// # Signals
/// The threads that fill the memory block signals, so that a signal handler of this process may
/// access the memory, also while a thread is in [`wait`](Self::wait). A handler must not access it
/// on a thread that is in another call of this crate or of `memory-image`: that call may hold a
/// lock that the fault handler needs.
///
/// # Limitations
/// The memory must not be accessed after the value is dropped. The kernel protects missing pages
/// only while the userfaultfd is open. A process that closes descriptors that it does not own
/// (`close_range`, as some daemons do at start) must do so before. A process that shares the
/// address space (`clone` with `CLONE_VM`) and outlives this one finds zeros in missing pages.
///
/// # Examples
/// ```
/// use lazy_restore::{LazyRam, WorkingSet};
/// use memory_image::Chain;
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
///
/// [`UserfaultfdError::Unmapped`]: crate::UserfaultfdError::Unmapped
/// [`UserfaultfdError::Occupied`]: crate::UserfaultfdError::Occupied
#[derive(Debug)]
#[must_use = "the restore ends when this is dropped"]
pub struct LazyRam {
    pub(crate) pages: Arc<Pages>,
    filling: Filling,
    /// Unmapped last. `None` for memory that a VMM has mapped.
    region: Option<Region>,
}

impl LazyRam {
    /// Returns the default options.
    pub fn options() -> LazyRamOptions {
        LazyRamOptions::default()
    }

    pub(crate) fn new(filling: Filling, region: Option<Region>) -> Self {
        Self {
            pages: Arc::clone(filling.pages()),
            filling,
            region,
        }
    }

    /// Starts the fault handler, and the prefetcher if `prefetching`.
    pub(crate) fn start(&self, prefetching: bool) -> Result<(), LazyError> {
        self.filling.start(1, prefetching)
    }

    /// Returns the address of the first byte, aligned to the host's page. For
    /// [adopted](LazyRamOptions::adopt) memory it is the address of the first region. It is valid
    /// for reads and writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        match self.pages.target() {
            Target::Own(memory) => memory.start(),
            Target::Peer(_) => std::ptr::null_mut(),
        }
    }

    /// Returns the size of the RAM in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        self.pages.source().ram_size()
    }

    /// Returns the progress of filling: the bytes of the images that are in memory, and the total,
    /// in whole pages of the host. Pages that were discarded before they were filled are never
    /// done.
    #[must_use]
    pub fn progress(&self) -> Progress {
        self.filling.progress()
    }

    /// Returns the number of handled faults, each of which made an access wait.
    #[must_use]
    pub fn faults(&self) -> u64 {
        self.filling.faults()
    }

    /// Waits until all pages are in memory. Without a prefetcher
    /// ([`prefetch(false)`](LazyRamOptions::prefetch), or while recording), this call reads them,
    /// on a thread of its own.
    ///
    /// # Errors
    /// Returns the first error since the start, as [`error`](Self::error) does. It is
    /// [`ReadImageError::Changed`](memory_image::ReadImageError::Changed) if an image was written
    /// to before all pages were in memory.
    pub fn wait(&self) -> Result<(), Arc<LazyError>> {
        match self.wait_with(&mut |_| ControlFlow::Continue(())) {
            Err(WaitError::Fill(error)) => Err(error),
            Ok(()) | Err(WaitError::Cancelled) => Ok(()),
        }
    }

    /// Waits like [`wait`](Self::wait), with a progress function. It is called first, and then
    /// after each piece that this call reads, or ten times a second while another thread reads. It
    /// may cancel the wait. A prefetch thread then continues. Without one, the next wait does.
    ///
    /// `progress` may be called on another thread. If it panics, filling may end with an error.
    ///
    /// # Errors
    /// Returns the first error since the start, or [`WaitError::Cancelled`].
    pub fn wait_with(&self, progress: &mut ProgressFn<'_>) -> Result<(), WaitError> {
        self.filling.wait_with(progress)
    }

    /// Returns the first error since the start, after which some page was not read.
    #[must_use]
    pub fn error(&self) -> Option<&LazyError> {
        self.pages.status().failure().map(Arc::as_ref)
    }

    /// Returns the pages touched so far, in the order of their first touch. It is empty without
    /// [`record`](LazyRamOptions::record).
    pub fn recorded(&self) -> WorkingSet {
        let recorded = self.filling.recorded();
        recorded.unwrap_or_else(|| WorkingSet::of(self.ram_size()))
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        self.filling.stop();
        match (self.pages.status().is_finished(), &self.region) {
            (true, _) => {}
            (false, Some(_)) => self.pages.unregister_all(),
            // The VMM's memory stays mapped.
            (false, None) => self.pages.revoke(),
        }
    }
}

/// Reads the RAM as the guest has it now: the images and the guest's writes. Missing pages are read
/// from the images. After a page could not be read, [`read_at`](PageReader::read_at) fails with the
/// error of the source. Another access to such a page gets `SIGBUS`, or an error where the kernel
/// reads the memory.
impl PageReader for LazyRam {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        end.filter(|end| *end <= self.ram_size())
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        self.check_failure()?;
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
        let end = end.min(self.ram_size());
        match self.pages.target() {
            Target::Own(memory) => memory.host_memory(offset..end),
            Target::Peer(_) => None,
        }
    }

    fn ram_layout(&self) -> Option<&RamLayout> {
        self.pages.source().ram_layout()
    }

    fn known_size(&self) -> Option<u64> {
        Some(self.ram_size())
    }

    fn check_source(&self) -> io::Result<()> {
        self.check_failure()?;
        match self.pages.status().is_finished() {
            true => Ok(()),
            false => self.pages.source().check_source(),
        }
    }
}

impl LazyRam {
    /// Returns the error of the source, if it has failed.
    fn check_failure(&self) -> io::Result<()> {
        match self.pages.status().failure() {
            Some(error) => Err(io::Error::other(Arc::clone(error))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
