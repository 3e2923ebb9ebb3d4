//! The start of lazily filled RAM.

#![allow(unsafe_code)]

use std::io;
use std::sync::Arc;
use std::thread;

use host_memory::BlockedSignals;

use crate::error::LazyError;
use crate::fault_handler::PageFaultHandler;
use crate::filling::Filling;
use crate::lazy_ram::LazyRam;
use crate::memory::Memory;
use crate::options::LazyRamOptions;
use crate::page_bits::PageBits;
use crate::pages::{Pages, Parts};
use crate::prefetcher::Prefetcher;
use crate::ram_source::RamSource;
use crate::region::{Region, host_page};
use crate::status::Status;
use crate::target::Target;
use crate::userfaultfd::{Userfaultfd, UserfaultfdError};
use crate::working_set::WorkingSet;

impl LazyRamOptions {
    /// Maps memory for the RAM of a [`Chain`](memory_image::Chain) or another source, as one range,
    /// and starts to fill it.
    ///
    /// # Errors
    /// Returns a [`LazyError`].
    pub fn start(&self, source: impl RamSource + 'static) -> Result<LazyRam, LazyError> {
        let size = ram_size(&source)?;
        let failed = |source| LazyError::Reserve { size, source };
        let len = size.checked_next_multiple_of(host_page());
        let region = Region::zeros(len.unwrap_or(u64::MAX)).map_err(failed)?;
        // SAFETY: the region is new and owned by the `LazyRam`. It is dropped after the threads
        // that fill it have ended.
        let memory = unsafe { Memory::new([(region.as_ptr(), region.len())]) };
        self.fill(Box::new(source), memory, Some(region))
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
    /// Restore the chain into such memory ([`Chain::restore`](memory_image::Chain::restore)) before
    /// others use it.
    ///
    /// This check reads `/proc/self/smaps`. The time for it grows with the memory of the process.
    ///
    /// # Errors
    /// Returns a [`LazyError`]. The memory is unchanged on error, with two exceptions. After
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
        &self,
        source: impl RamSource + 'static,
        regions: impl IntoIterator<Item = (*mut u8, usize)>,
    ) -> Result<LazyRam, LazyError> {
        // SAFETY: the caller of this function promises what `Memory::new` requires.
        let mut memory = unsafe { Memory::new(regions) };
        let ram_size = ram_size(&source)?;
        if memory.regions().len() != ram_size {
            return Err(LazyError::TargetSize {
                image: ram_size,
                target: memory.regions().len(),
            });
        }
        memory.check_private()?;
        self.fill(Box::new(source), memory, None)
    }

    fn fill(
        &self,
        source: Box<dyn RamSource>,
        memory: Memory,
        region: Option<Region>,
    ) -> Result<LazyRam, LazyError> {
        let checked = source.check_complete().and_then(|()| source.check_source());
        checked.map_err(LazyError::of_source)?;
        let (image, page) = (source.ram_size(), host_page());
        let ram_size = self.working_set.as_ref().map(WorkingSet::ram_size);
        if let Some(working_set) = ram_size.filter(|size| *size != image) {
            return Err(LazyError::WorkingSetSize { image, working_set });
        }
        let settled =
            PageBits::none(memory.regions().len(), page).map_err(|source| LazyError::Reserve {
                size: image,
                source,
            })?;
        let prefetching = self.prefetch && !self.record;
        let status = Status::new(prefetching).map_err(UserfaultfdError::Thread)?;
        let fault = Userfaultfd::open(page, self.userfaultfd.as_deref())?;
        memory.exclude_from_children()?;
        let registered = memory.register(&fault).and_then(|can_poison| {
            discard(&memory, &fault)?;
            Ok(can_poison)
        });
        let can_poison = match registered {
            Ok(can_poison) => can_poison && self.poison,
            Err(error) => {
                // Report the first error.
                for region in memory.regions().iter() {
                    let _ = fault.unregister(region.address, region.len);
                }
                let _ = memory.restore_to_children(&[0..memory.regions().len()]);
                return Err(error.into());
            }
        };
        let pages = Pages::new(Parts {
            source,
            target: Target::Own(memory),
            fault,
            can_poison,
            settled,
            counters: Arc::default(),
            status,
        });
        let pages = Arc::new(pages.map_err(UserfaultfdError::Thread)?);
        let handler = PageFaultHandler::new(Arc::clone(&pages), self.fault_around, self.record);
        let prefetcher = Prefetcher::new(Arc::clone(&pages), self.working_set.clone());
        let ram = LazyRam::new(Filling::new(pages, handler, prefetcher), region);
        ram.start(prefetching)?;
        Ok(ram)
    }
}

/// Returns the size of the RAM in bytes, which is not 0.
fn ram_size(source: &impl RamSource) -> Result<u64, LazyError> {
    match source.ram_size() {
        0 => Err(LazyError::NoRam),
        size => Ok(size),
    }
}

/// Checks that this process may fill memory on demand: that the kernel has userfaultfd with the
/// features that are needed, and that this process may open one.
///
/// A process that may not can get a descriptor from another one
/// ([`LazyRamOptions::userfaultfd`]), or restore or map the chain instead.
///
/// # Errors
/// Returns [`UserfaultfdError::NotPermitted`], which names the three ways to permit it, or
/// [`UserfaultfdError::Missing`] or [`UserfaultfdError::Open`] where there is none.
///
/// # Examples
/// ```
/// if let Err(error) = lazy_restore::available() {
///     eprintln!("RAM is restored before the guest starts: {error}");
/// }
/// ```
pub fn available() -> Result<(), UserfaultfdError> {
    Userfaultfd::open(host_page(), None).map(drop)
}

/// Discards the content of the registered memory. The kernel blocks `madvise` until its message is
/// read.
fn discard(memory: &Memory, fault: &Userfaultfd) -> Result<(), UserfaultfdError> {
    let discarded = thread::scope(|scope| {
        let thread = thread::Builder::new().name("lazy-ram-discard".into());
        let blocked = BlockedSignals::new();
        let discarding = thread.spawn_scoped(scope, || memory.discard());
        drop(blocked);
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
