//! RAM that is read from a chain as the guest touches it.

mod filler;
mod memory;
mod options;
mod present;
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

use crate::error::ImageError;
use crate::map::Region;
use crate::working_set::WorkingSet;
use filler::{Filler, Phase, locked, wait_error};
use options::Ended;

pub use options::LazyRamOptions;
pub use userfaultfd::UserfaultfdError;

/// Guest RAM that a guest can start on at once, whatever its size and however scattered the chain (Linux, userfaultfd).
///
/// A page is read when it is first touched: by a thread of this process, by the kernel on its behalf, or by a vCPU of KVM. One
/// thread answers these faults, with as much around the page as stands in the same image next to it; another reads everything else
/// meanwhile, at the speed of the disk. Faults go first, but every few of them 64 KiB are read ahead, so
/// that all comes in however often the guest faults. Once [all is in](Self::wait), the memory is as any other, and both threads have ended.
///
/// The memory is private and anonymous: what the guest writes stays its own, and a file that is replaced, or lost after all is in, does no harm. Zeros
/// take no memory. Until all is in a forked child does not have the memory (`MADV_DONTFORK`): to it, missing pages would be zeros. Afterwards
/// children get it again, unless the VMM had withheld it itself. Of a chain [of very many images](crate::Chain#many-images), until then those
/// that are not kept open must stay in place.
///
/// # When an image can't be read
/// No page is ever silently zeros. The error is kept for [`error`](Self::error) and [`wait`](Self::wait); reading ahead ends; the access that
/// asked for the page gets `SIGBUS` (a system call `EFAULT`, a vCPU `SIGBUS` in its thread), now and whenever the page is touched again. Before Linux 6.6,
/// which can't poison pages, the page is made inaccessible instead: `SIGSEGV`, and for a vCPU an error of `KVM_RUN`.
///
/// # Memory that is discarded, unmapped or moved
/// A balloon device may discard pages at any time, before and after they are filled: after
/// `MADV_DONTNEED` they are zeros, as in any private memory, and are not read from the images any more.
/// After `MADV_FREE`, pages that were not filled yet are zeros. `madvise` waits for the thread that
/// answers faults, for as long as that reads a page from the images. The kernel fills no page while a
/// thread is about to discard some: several threads that discard without a pause, and touch nothing,
/// hold up faults and [`wait`](Self::wait).
///
/// Memory must not be unmapped or moved until all is in. If it is nevertheless, that is the error
/// [`UserfaultfdError::Unmapped`], and missing pages at the new address are inaccessible. So are those
/// at the old address where it stays mapped (`MREMAP_DONTUNMAP`), including pages that were filled
/// before the move. A page that something else has put into the memory is
/// [`UserfaultfdError::Occupied`], and inaccessible too.
///
/// # Limitations
/// Dropped, the memory must not be touched any more. The missing pages are the kernel's to protect only
/// while the userfaultfd is open: a process that closes descriptors it does not own (`close_range`, as some
/// do when they become daemons) must do so before. A process that shares the address space
/// (`clone` with `CLONE_VM`) and outlives this one finds zeros in missing pages.
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
/// // Once: find out what the guest touches after it was restored.
/// let ram = LazyRam::options().record(true).start(Chain::open_raw(&full, 4096)?)?;
/// let mut byte = [0];
/// ram.read_at(70_000, &mut byte)?; // a guest would run
/// assert_eq!(byte, [7]);
/// ram.recorded().save(&set)?;
///
/// // From then on: read that first.
/// let ram = LazyRam::options().working_set(WorkingSet::load(&set)?).start(Chain::open_raw(&full, 4096)?)?;
/// println!("a guest of {} bytes at {:p}", ram.len(), ram.as_ptr());
/// ram.wait()?; // until all is in
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct LazyRam {
    filler: Arc<Filler>,
    /// Those that answer faults and that read ahead.
    threads: Vec<JoinHandle<()>>,
    /// Unmapped last; none for memory that a VMM has mapped.
    _region: Option<Region>,
}

/// How far a [`LazyRam`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Progress {
    /// Bytes of the images that are in memory. Pages that were discarded before they were filled are
    /// never.
    pub loaded: u64,
    /// Bytes of the images that will be, in whole pages of the host.
    pub stored: u64,
    /// Faults answered: how often an access had to wait.
    pub faults: u64,
}

impl LazyRam {
    /// Says how RAM is to be filled.
    pub fn options() -> LazyRamOptions {
        LazyRamOptions::default()
    }

    /// The address of the first byte (of the first region, where the memory was [adopted](LazyRamOptions::adopt)), aligned to the host's page.
    /// Valid for reads and writes as long as this value lives.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        let first = self.filler.memory.regions().next();
        first.map_or(std::ptr::null_mut(), |(start, _)| start)
    }

    /// The size of the RAM in bytes.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "a guest's RAM is never empty")]
    pub fn len(&self) -> usize {
        self.filler.chain.size() as usize
    }

    /// How far it is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            loaded: self.filler.loaded.load(Ordering::Relaxed),
            stored: self.filler.stored_bytes(),
            faults: self.filler.faults.load(Ordering::Relaxed),
        }
    }

    /// Waits until everything is in memory. If nothing is read ahead ([`prefetch(false)`](LazyRamOptions::prefetch), or while recording)
    /// this reads it.
    ///
    /// # Errors
    /// The first error since the start, as [`error`](Self::error) has it.
    pub fn wait(&self) -> Result<(), Arc<ImageError>> {
        let filler = &self.filler;
        let mut phase = locked(&filler.phase);
        if *phase == Phase::Idle {
            *phase = Phase::Running;
            drop(phase);
            let ended = Ended(filler);
            filler.fill_everything();
            std::mem::forget(ended);
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

    /// The first error since the start: [`ImageError::Read`], [`ImageError::Replaced`] (of a chain [of very many images](crate::Chain#many-images)), or
    /// [`ImageError::Userfaultfd`]. Some page was not read.
    #[must_use]
    pub fn error(&self) -> Option<&ImageError> {
        self.filler.failure.get().map(Arc::as_ref)
    }

    /// The pages touched so far, in the order of their first touch; none unless it was asked to [record](LazyRamOptions::record).
    #[must_use]
    pub fn recorded(&self) -> WorkingSet {
        match &self.filler.recorded {
            Some(recorded) => locked(recorded).clone(),
            None => WorkingSet::of(self.filler.chain.size()),
        }
    }
}

impl Drop for LazyRam {
    fn drop(&mut self) {
        self.filler.stop.store(true, Ordering::Relaxed);
        self.filler.dismiss();
        for thread in self.threads.drain(..) {
            // It does not panic.
            _ = thread.join();
        }
        match self.filler.released.load(Ordering::Acquire) {
            true => {}
            false if self.filler.own => self.filler.abandon(),
            // The VMM's memory stays.
            false => self.filler.shut(),
        }
    }
}

/// The RAM as the guest has it now: the images, and what was written since. What is missing is read from the images; the access of a page that
/// can't be is a `SIGBUS`, or where the kernel reads the memory an error.
impl PageReader for LazyRam {
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        end.filter(|end| *end <= self.filler.chain.size())
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
        let end = end.min(self.filler.chain.size());
        self.filler.memory.host_memory(offset..end)
    }
}

/// Answers faults until dismissed.
fn answer_faults(filler: &Filler) -> Result<(), ImageError> {
    let mut buffer = SecretBuffer::new();
    loop {
        let mut ready = [
            PollFd::new(filler.fault.as_fd(), PollFlags::POLLIN),
            PollFd::new(filler.dismissed.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut ready, PollTimeout::NONE) {
            Err(Errno::EINTR) => continue,
            polled => _ = polled.map_err(|errno| wait_error(errno.into()))?,
        }
        // All of them: a fault that was read does not make the descriptor readable again.
        while let Some(address) = filler.next_fault()? {
            filler.answer(address, &mut buffer)?;
        }
        if ready[1].any() == Some(true) {
            // Not while a thread waits for its message to be read.
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
    fn whoever_reads_ahead_ends_when_told_to_and_does_not_say_that_all_is_in() {
        if !Need::Userfaultfd.met("whoever_reads_ahead_ends_when_told_to") {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![1; 4 << 20]).unwrap();
        let chain = Chain::open_raw(file.path(), 4096).unwrap();
        let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
        ram.filler.stop.store(true, Ordering::Relaxed);
        ram.wait().unwrap();
        assert_eq!(ram.progress().loaded, 0);
        assert!(!ram.filler.released.load(Ordering::Acquire));
    }
}
