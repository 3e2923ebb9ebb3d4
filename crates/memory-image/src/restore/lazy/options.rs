//! How RAM is filled, and the start of it.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::filler::{Filler, Ledger, Phase};
use super::memory::Memory;
use super::present::Present;
use super::userfaultfd::{Userfaultfd, UserfaultfdError};
use super::{LazyRam, answer_faults};
use crate::chain::Chain;
use crate::error::ImageError;
use crate::map::{Region, host_page};
use crate::working_set::WorkingSet;

/// How RAM is filled as it is touched: [`LazyRam::options`].
#[derive(Clone, Debug)]
#[must_use = "options do nothing until `start` or `adopt`"]
pub struct LazyRamOptions {
    prefetch: bool,
    working_set: Option<WorkingSet>,
    record: bool,
    fault_around: u64,
    /// Whether the kernel may be asked to poison pages.
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
    /// Whether everything is read ahead while the guest runs; yes if not given. If not, pages come when they are touched, and the rest when
    /// somebody [waits](LazyRam::wait) for it.
    pub fn prefetch(mut self, prefetch: bool) -> Self {
        self.prefetch = prefetch;
        self
    }

    /// Reads these pages before all others, in this order. Of those that are zeros and not in the
    /// images, as many bytes are filled as the images store; the others are zeros when they are
    /// touched.
    pub fn working_set(mut self, working_set: WorkingSet) -> Self {
        self.working_set = Some(working_set);
        self
    }

    /// Whether to [record](LazyRam::recorded) what is touched. Nothing is read ahead then and every page faults by itself, so this is the slow way to
    /// start: once for an image, to start the faster from then on.
    pub fn record(mut self, record: bool) -> Self {
        self.record = record;
        self
    }

    /// How many bytes, aligned to their number, one fault may bring in at most, rounded to a power of two and no less than a page; 64 KiB if
    /// not given.
    pub fn fault_around(mut self, bytes: u64) -> Self {
        self.fault_around = bytes;
        self
    }

    /// Maps memory for the chain's RAM, as one range, and begins to fill it.
    ///
    /// # Errors
    /// [`ImageError::NotFull`] for a chain of diffs; [`ImageError::Reserve`]; [`ImageError::Userfaultfd`] where this process may not use it, which says what to do about it;
    /// [`ImageError::WorkingSetSize`].
    pub fn start(self, chain: impl Into<Arc<Chain>>) -> Result<LazyRam, ImageError> {
        let chain = chain.into();
        let size = chain.size();
        let failed = |source| ImageError::Reserve { size, source };
        let len = size.checked_next_multiple_of(host_page());
        let region = Region::zeros(len.unwrap_or(u64::MAX)).map_err(failed)?;
        // SAFETY: the region is fresh, ours, and outlives the filler's use of it: it drops after the threads have ended.
        let memory = unsafe { Memory::new([(region.as_ptr(), region.len())]) };
        self.fill(chain, memory, Some(region))
    }

    /// Begins to fill memory that the caller has mapped, as a guest of several regions has it: address and length in bytes of each, in the order of the
    /// memory file.
    ///
    /// Whatever the memory holds is discarded. If the value is dropped before everything is in, the
    /// memory is made inaccessible, as its missing pages would be zeros otherwise.
    ///
    /// The memory must be private and anonymous. Of shared memory, and of a memory file mapped privately,
    /// another mapping, another process or `read(2)` would find zeros where pages are missing, and a
    /// back end that writes before the page is filled would lose what it wrote. It is refused, so restore
    /// the chain into it ([`Chain::restore`]) before others use it.
    ///
    /// `/proc/self/smaps` is read to tell, which takes the longer the more memory the process has.
    ///
    /// # Errors
    /// [`ImageError::TargetSize`] where the regions are not as large as the RAM;
    /// [`UserfaultfdError::Shared`], [`UserfaultfdError::HugePages`] or [`UserfaultfdError::Unchecked`];
    /// otherwise as [`start`](Self::start). The memory is as it was, unless its bytes could not be
    /// discarded ([`UserfaultfdError::Prepare`]), or no second thread can be started, where it is
    /// inaccessible.
    ///
    /// # Safety
    /// As long as the value lives,
    /// - every region stays mapped, readable and writable; no two overlap;
    /// - no Rust reference covers any of it, and Rust code of this process accesses it through raw pointers by atomic or volatile
    ///   operations only.
    ///
    /// Once it is dropped, the memory is accessed only if [`wait`](LazyRam::wait) has returned `Ok`.
    pub unsafe fn adopt(
        self,
        chain: impl Into<Arc<Chain>>,
        regions: impl IntoIterator<Item = (*mut u8, usize)>,
    ) -> Result<LazyRam, ImageError> {
        let chain = chain.into();
        // SAFETY: what `Memory::new` asks is what this function asks of its caller.
        let mut memory = unsafe { Memory::new(regions) };
        if memory.len() != chain.size() {
            return Err(ImageError::TargetSize {
                image: chain.size(),
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
    ) -> Result<LazyRam, ImageError> {
        chain.check_full()?;
        let (image, page) = (chain.size(), host_page());
        let ram_size = self.working_set.as_ref().map(WorkingSet::ram_size);
        if let Some(working_set) = ram_size.filter(|size| *size != image) {
            return Err(ImageError::WorkingSetSize { image, working_set });
        }
        let settled = Present::none(memory.len(), page).map_err(|source| ImageError::Reserve {
            size: image,
            source,
        })?;
        let fault = Userfaultfd::open(page)?;
        let own = region.is_some();
        memory.withhold()?;
        let registered = memory.register(&fault).and_then(|can_poison| {
            discard(&memory, &fault)?;
            Ok(can_poison)
        });
        let can_poison = match registered {
            Ok(can_poison) => can_poison && self.poison,
            Err(error) => {
                // The error that is told is the first.
                let _ = memory.unregister(&fault, 0..memory.len());
                let _ = memory.give_back(&[0..memory.len()]);
                return Err(error.into());
            }
        };
        let around = match self.record {
            true => page,
            false => self.fault_around.clamp(page, 1 << 30).next_power_of_two(),
        };
        let ahead = self.prefetch && !self.record;
        let dismissed = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| UserfaultfdError::Thread(errno.into()))?;
        let phase = if ahead { Phase::Running } else { Phase::Idle };
        let filler = Arc::new(Filler {
            settled,
            ledger: Mutex::new(Ledger::default()),
            changes: AtomicU64::new(0),
            urgent: AtomicBool::new(false),
            ahead_waits: AtomicBool::new(false),
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
            stored: OnceLock::new(),
            failure: OnceLock::new(),
            phase: Mutex::new(phase),
            ended: Condvar::new(),
            stop: AtomicBool::new(false),
            released: AtomicBool::new(false),
            dismissed,
        });
        let mut ram = LazyRam {
            filler,
            threads: Vec::new(),
            _region: region,
        };
        ram.spawn("lazy-ram-faults", |filler| {
            if let Err(error) = answer_faults(filler) {
                filler.give_up(error);
            }
        })?;
        if ahead {
            ram.spawn("lazy-ram-ahead", Filler::fill_everything)?;
        }
        Ok(ram)
    }
}

/// Discards what the memory holds, which is registered: the kernel has `madvise` wait until its message
/// is read.
fn discard(memory: &Memory, fault: &Userfaultfd) -> Result<(), UserfaultfdError> {
    let discarded = thread::scope(|scope| {
        let thread = thread::Builder::new().name("lazy-ram-discard".into());
        let discarding = thread.spawn_scoped(scope, || memory.discard());
        let discarding = discarding.map_err(UserfaultfdError::Thread)?;
        let mut read = Ok(());
        while !discarding.is_finished() {
            // An access that waits already is woken below, and asks again.
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
    ) -> Result<(), ImageError> {
        let filler = Arc::clone(&self.filler);
        let thread = thread::Builder::new().name(name.into());
        let thread = thread.spawn(move || {
            let _ended = Ended(&filler);
            work(&filler);
        });
        self.threads.push(thread.map_err(UserfaultfdError::Thread)?);
        Ok(())
    }
}

/// Gives up should the thread panic: no access is to wait for ever.
pub(super) struct Ended<'f>(pub(super) &'f Filler);

impl Drop for Ended<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let panicked = io::Error::other("a thread panicked");
            self.0.give_up(UserfaultfdError::Thread(panicked).into());
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

    /// Memory of one page in an image, and one that isn't.
    fn start(options: LazyRamOptions) -> (LazyRam, tempfile::NamedTempFile) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), vec![7; host_page() as usize]).unwrap();
        file.as_file().set_len(2 * host_page()).unwrap();
        let chain = Chain::open_raw(file.path(), host_page()).unwrap();
        (options.start(chain).unwrap(), file)
    }

    /// As a system call finds the page.
    fn read(ram: &LazyRam, page: u64) -> nix::Result<()> {
        let memory = page_reader::PageReader::host_memory(ram, page * host_page(), 1).unwrap();
        byte_at(memory.as_ptr())
    }

    fn byte_at(address: *const u8) -> nix::Result<()> {
        let (_read, write) = io::pipe().unwrap();
        // SAFETY: the kernel reads one byte, and says so where it can't.
        let written = unsafe { libc::write(write.as_raw_fd(), address.cast(), 1) };
        Errno::result(written).map(drop)
    }

    #[test]
    fn where_the_kernel_cannot_poison_a_page_that_cannot_be_read_is_made_inaccessible() {
        if !Need::Userfaultfd
            .met("where_the_kernel_cannot_poison_a_page_that_cannot_be_read_is_made_inaccessible")
        {
            return;
        }
        let mut options = LazyRam::options().prefetch(false);
        options.poison = false;
        let (ram, file) = start(options);
        file.as_file().set_len(0).unwrap();
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
        assert_eq!(read(&ram, 1), Ok(()));
        assert!(matches!(*ram.wait().unwrap_err(), ImageError::Read { .. }));
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
    }

    /// By the same descriptor, as no other can.
    #[rstest]
    #[case::touched(true)]
    #[case::ahead(false)]
    fn a_page_that_something_else_filled_is_an_error(#[case] touched: bool) {
        if !Need::Userfaultfd.met("a_page_that_something_else_filled_is_an_error") {
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
            // Its neighbour is what the fault is about.
            assert_eq!(read(&ram, 1), Ok(()));
        }
        let why = ram.wait().unwrap_err();
        assert!(
            matches!(*why, ImageError::Userfaultfd(UserfaultfdError::Occupied { offset }) if offset == 2 * page),
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
                ImageError::Userfaultfd(UserfaultfdError::Unmapped { offset: 0, .. })
            ),
            "{why:?}"
        );
    }

    #[test]
    fn nobody_waits_for_a_thread_that_panicked() {
        if !Need::Userfaultfd.met("nobody_waits_for_a_thread_that_panicked") {
            return;
        }
        let (mut ram, _file) = start(LazyRam::options().prefetch(false));
        ram.spawn("panics", |_| panic!("on purpose")).unwrap();
        ram.threads.pop().unwrap().join().unwrap_err();
        assert_eq!(read(&ram, 0), Err(Errno::EFAULT));
        let why = ram.wait().unwrap_err();
        assert!(
            matches!(*why, ImageError::Userfaultfd(UserfaultfdError::Thread(_))),
            "{why:?}"
        );
    }
}
