//! Options of lazily filled RAM, and its start.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::error::LazyError;
use super::filler::{Filler, Ledger, Phase};
use super::memory::Memory;
use super::page_bits::PageBits;
use super::userfaultfd::{Userfaultfd, UserfaultfdError};
use super::{LazyRam, handle_faults};
use crate::chain::Chain;
use crate::map::{Region, host_page};
use crate::working_set::WorkingSet;

/// Options for filling RAM on demand, created by [`LazyRam::options`].
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `start` or `adopt`"]
pub struct LazyRamOptions {
    prefetch: bool,
    working_set: Option<WorkingSet>,
    record: bool,
    fault_around: u64,
    /// Whether to use the kernel's page poisoning.
    poison: bool,
}

impl Default for LazyRamOptions {
    fn default() -> Self {
        Self {
            prefetch: true,
            working_set: None,
            record: false,
            fault_around: 64 << 10,
            poison: true,
        }
    }
}

impl LazyRamOptions {
    /// Sets whether to prefetch all pages while the guest runs. The default is true. With false, a
    /// page is read when it is touched, and [`LazyRam::wait`] reads the others.
    pub fn prefetch(mut self, prefetch: bool) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Sets the pages to read first, in this order. Pages of the set that are zeros and not in the
    /// images are filled up to the number of bytes that the images store. The others become zeros
    /// when they are touched.
    pub fn working_set(mut self, working_set: WorkingSet) -> Self {
        self.working_set = Some(working_set);
        self
    }

    /// Sets whether to [record](LazyRam::recorded) touched pages. Recording disables prefetching,
    /// and every page faults separately. This makes the start slow: record once for an image, so
    /// that later starts are faster.
    pub fn record(mut self, record: bool) -> Self {
        self.record = record;
        self
    }

    /// Sets the maximum number of bytes that one fault reads. The range is aligned to its length.
    /// The number is rounded to a power of two of at least one page. The default is 64 KiB.
    pub fn fault_around(mut self, bytes: u64) -> Self {
        self.fault_around = bytes;
        self
    }

    /// Maps memory for the chain's RAM, as one range, and starts to fill it.
    ///
    /// # Errors
    /// [`LazyError`].
    pub fn start(self, chain: impl Into<Arc<Chain>>) -> Result<LazyRam, LazyError> {
        let chain = chain.into();
        let size = chain.ram_size();
        let failed = |source| LazyError::Reserve { size, source };
        let len = size.checked_next_multiple_of(host_page());
        let region = Region::zeros(len.unwrap_or(u64::MAX)).map_err(failed)?;
        // SAFETY: the region is new and owned by the `LazyRam`. It is dropped after the threads
        // that fill it have ended.
        let memory = unsafe { Memory::new([(region.as_ptr(), region.len())]) };
        self.fill(chain, memory, Some(region))
    }

    /// Starts to fill memory that the caller has mapped, such as the regions of a guest: address
    /// and length in bytes of each region, in the order of the memory file.
    ///
    /// The previous content of the memory is discarded. If the value is dropped before filling has
    /// completed, the memory is made inaccessible, because its missing pages would otherwise be
    /// zeros.
    ///
    /// The memory must be private and anonymous. Shared memory, and a privately mapped memory file,
    /// are refused: another mapping, another process or `read(2)` would find zeros in missing
    /// pages, and a back end that writes to a page before it is filled would lose its write.
    /// Restore the chain into such memory ([`Chain::restore`]) before others use it.
    ///
    /// This check reads `/proc/self/smaps`. The time for it grows with the memory of the process.
    ///
    /// # Errors
    /// [`LazyError`]. The memory is unchanged on error, with two exceptions. After
    /// [`UserfaultfdError::Prepare`] a part of it may have been discarded. If the second thread
    /// cannot be started, it is inaccessible.
    ///
    /// # Safety
    /// As long as the value lives:
    /// - every region stays mapped, readable and writable; no two overlap;
    /// - no Rust reference covers any of it, and Rust code of this process accesses it only by
    ///   atomic or volatile operations on raw pointers.
    ///
    /// After the value is dropped, the memory may be accessed only if [`wait`](LazyRam::wait) has
    /// returned `Ok`.
    pub unsafe fn adopt(
        self,
        chain: impl Into<Arc<Chain>>,
        regions: impl IntoIterator<Item = (*mut u8, usize)>,
    ) -> Result<LazyRam, LazyError> {
        let chain = chain.into();
        // SAFETY: the caller of this function promises what `Memory::new` requires.
        let mut memory = unsafe { Memory::new(regions) };
        if memory.len() != chain.ram_size() {
            return Err(LazyError::TargetSize {
                image: chain.ram_size(),
                target: memory.len(),
            });
        }
        memory.check_private()?;
        self.fill(chain, memory, None)
    }

    fn fill(
        self,
        chain: Arc<Chain>,
        memory: Memory,
        region: Option<Region>,
    ) -> Result<LazyRam, LazyError> {
        chain.check_full()?;
        let (image, page) = (chain.ram_size(), host_page());
        let ram_size = self.working_set.as_ref().map(WorkingSet::ram_size);
        if let Some(working_set) = ram_size.filter(|size| *size != image) {
            return Err(LazyError::WorkingSetSize { image, working_set });
        }
        let settled = PageBits::none(memory.len(), page).map_err(|source| LazyError::Reserve {
            size: image,
            source,
        })?;
        let fault = Userfaultfd::open(page)?;
        let own = region.is_some();
        memory.exclude_from_children()?;
        let registered = memory.register(&fault).and_then(|can_poison| {
            discard(&memory, &fault)?;
            Ok(can_poison)
        });
        let can_poison = match registered {
            Ok(can_poison) => can_poison && self.poison,
            Err(error) => {
                // Report the first error.
                let _ = memory.unregister(&fault, 0..memory.len());
                let _ = memory.restore_to_children(&[0..memory.len()]);
                return Err(error.into());
            }
        };
        let around = match self.record {
            true => page,
            false => self.fault_around.clamp(page, 1 << 30).next_power_of_two(),
        };
        let ahead = self.prefetch && !self.record;
        let stopping = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| UserfaultfdError::Thread(errno.into()))?;
        let phase = if ahead { Phase::Running } else { Phase::Idle };
        let filler = Arc::new(Filler {
            settled,
            ledger: Mutex::new(Ledger::default()),
            changes: AtomicU64::new(0),
            handler_waits: AtomicBool::new(false),
            prefetcher_waits: AtomicBool::new(false),
            turn: Condvar::new(),
            chain,
            memory,
            own,
            fault,
            can_poison,
            page,
            around,
            recorded: self.record.then(|| Mutex::new(WorkingSet::of(image))),
            working_set: self.working_set,
            loaded: AtomicU64::new(0),
            faults: AtomicU64::new(0),
            stored_bytes: OnceLock::new(),
            failure: OnceLock::new(),
            phase: Mutex::new(phase),
            ended: Condvar::new(),
            stop_prefetch: AtomicBool::new(false),
            finished: AtomicBool::new(false),
            stopping,
        });
        let mut ram = LazyRam {
            filler,
            threads: Vec::new(),
            _region: region,
        };
        ram.spawn("lazy-ram-faults", |filler| {
            if let Err(error) = handle_faults(filler) {
                filler.abort(error);
            }
        })?;
        if ahead {
            ram.spawn("lazy-ram-ahead", Filler::fill_everything)?;
        }
        Ok(ram)
    }
}

/// Discards the content of the registered memory. The kernel blocks `madvise` until its message is
/// read.
fn discard(memory: &Memory, fault: &Userfaultfd) -> Result<(), UserfaultfdError> {
    let discarded = thread::scope(|scope| {
        let thread = thread::Builder::new().name("lazy-ram-discard".into());
        let discarding = thread.spawn_scoped(scope, || memory.discard());
        let discarding = discarding.map_err(UserfaultfdError::Thread)?;
        let mut read = Ok(());
        while !discarding.is_finished() {
            // A waiting access is woken below, and faults again.
            if let Err(error) = fault.next_message() {
                read = Err(UserfaultfdError::Wait(error));
            }
            thread::yield_now();
        }
        let panicked = |_| UserfaultfdError::Thread(io::Error::other("a thread panicked"));
        let discarded = discarding.join().map_err(panicked)?;
        discarded.and(read)
    });
    memory.wake(fault)?;
    discarded
}

impl LazyRam {
    fn spawn(
        &mut self,
        name: &str,
        work: impl FnOnce(&Filler) + Send + 'static,
    ) -> Result<(), LazyError> {
        let filler = Arc::clone(&self.filler);
        let thread = thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || {
            let _guard = AbortOnPanic(&filler);
            work(&filler);
        });
        self.threads.push(thread.map_err(UserfaultfdError::Thread)?);
        Ok(())
    }
}

/// Aborts filling on drop if the thread panics, to unblock waiting accesses.
pub(super) struct AbortOnPanic<'f>(pub(super) &'f Filler);

impl Drop for AbortOnPanic<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let panicked = io::Error::other("a thread panicked");
            self.0.abort(UserfaultfdError::Thread(panicked).into());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use nix::errno::Errno;
    use nix::libc;
    use rstest::rstest;
    use test_machine::Need;

    use super::*;

    /// Starts RAM of one page that is stored in the image and one page that is not.
    fn start(options: LazyRamOptions) -> (LazyRam, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; host_page() as usize]).unwrap();
        file.as_file().set_len(2 * host_page()).unwrap();
        let chain = Chain::open_raw(file.path(), host_page()).unwrap();
        (options.start(chain).unwrap(), file)
    }

    /// Reads a page by a system call.
    fn read(ram: &LazyRam, page: u64) -> nix::Result<()> {
        let memory = page_reader::PageReader::host_memory(ram, page * host_page(), 1).unwrap();
        byte_at(memory.as_ptr())
    }

    fn byte_at(address: *const u8) -> nix::Result<()> {
        let (_read, write) = io::pipe().unwrap();
        // SAFETY: the kernel reads one byte, and reports an error if it cannot.
        let written = unsafe { libc::write(write.as_raw_fd(), address.cast(), 1) };
        Errno::result(written).map(drop)
    }

    #[test]
    fn without_poison_an_unreadable_page_is_made_inaccessible() {
        if !Need::Userfaultfd.met("without_poison_an_unreadable_page_is_made_inaccessible") {
            return;
        }
        let mut options = LazyRam::options().prefetch(false);
        options.poison = false;
        let (ram, file) = start(options);
        file.as_file().set_len(0).unwrap();
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
        assert_eq!(read(&ram, 1), Ok(()));
        assert!(matches!(*ram.wait().unwrap_err(), LazyError::Read { .. }));
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
    }

    /// The test fills the page by the same descriptor, because no other can.
    #[rstest]
    #[case::touched(true)]
    #[case::ahead(false)]
    fn page_filled_by_something_else_is_an_error(#[case] touched: bool) {
        if !Need::Userfaultfd.met("page_filled_by_something_else_is_an_error") {
            return;
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; 4 * host_page() as usize]).unwrap();
        let chain = Chain::open_raw(file.path(), host_page()).unwrap();
        let ram = LazyRam::options().prefetch(false).start(chain).unwrap();
        let address = ram.as_ptr().addr() as u64;
        let page = host_page();
        assert_eq!(ram.filler.fault.zero(address + 2 * page, page).stop, None);
        if touched {
            // The fault is about its neighbour.
            assert_eq!(read(&ram, 1), Ok(()));
        }
        let why = ram.wait().unwrap_err();
        assert!(
            matches!(*why, LazyError::Userfaultfd(UserfaultfdError::Occupied { offset }) if offset == 2 * page),
            "{why:?}"
        );
        assert_eq!(read(&ram, 2), Err(Errno::EFAULT));
        assert_eq!(read(&ram, 1), Ok(()));
    }

    #[rstest]
    #[case::unmapped(0)]
    #[case::mapped_still(libc::MREMAP_DONTUNMAP)]
    fn without_poison_moved_memory_is_inaccessible(#[case] more_flags: libc::c_int) {
        if !Need::Userfaultfd.met("without_poison_moved_memory_is_inaccessible") {
            return;
        }
        let mut options = LazyRam::options().prefetch(false);
        options.poison = false;
        let (ram, _file) = start(options);
        let len = host_page() as usize;
        let elsewhere = Region::zeros(host_page()).unwrap();
        let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED | more_flags;
        let to: *mut libc::c_void = elsewhere.as_ptr().cast();
        // SAFETY: nothing accesses either page meanwhile.
        let moved = unsafe { libc::mremap(ram.as_ptr().cast(), len, len, flags, to) };
        assert_eq!(moved, to);
        assert_eq!(byte_at(to.cast()), Err(Errno::EFAULT));
        if more_flags != 0 {
            assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
        }
        let why = ram.wait().unwrap_err();
        assert!(
            matches!(
                *why,
                LazyError::Userfaultfd(UserfaultfdError::Unmapped { offset: 0, .. })
            ),
            "{why:?}"
        );
    }

    #[test]
    fn panic_of_a_thread_unblocks_waiters() {
        if !Need::Userfaultfd.met("panic_of_a_thread_unblocks_waiters") {
            return;
        }
        let (mut ram, _file) = start(LazyRam::options().prefetch(false));
        ram.spawn("panics", |_| panic!("on purpose")).unwrap();
        ram.threads.pop().unwrap().join().unwrap_err();
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
        let why = ram.wait().unwrap_err();
        assert!(
            matches!(*why, LazyError::Userfaultfd(UserfaultfdError::Thread(_))),
            "{why:?}"
        );
    }
}
