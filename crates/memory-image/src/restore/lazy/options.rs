//! How RAM is filled, and the start of it.

#![allow(unsafe_code)]

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::sync::{Arc, Condvar, Mutex, OnceLock};
use std::thread;

use nix::sys::eventfd::{EfdFlags, EventFd};

use super::filler::{Filler, Phase};
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

    /// Reads these pages before all others, in this order.
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
    /// Pages that the memory holds already stay as they are. If the value is dropped before everything is in, the memory is made inaccessible, as
    /// its missing pages would be zeros otherwise.
    ///
    /// # Errors
    /// [`ImageError::TargetSize`] where the regions are not as large as the RAM; otherwise as [`start`](Self::start). The
    /// memory is as it was, or, where no second thread can be started, inaccessible.
    ///
    /// # Safety
    /// As long as the value lives,
    /// - every region stays mapped, private and anonymous or of a memory file, readable and writable; no two overlap;
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
        let memory = unsafe { Memory::new(regions) };
        if memory.len() != chain.size() {
            return Err(ImageError::TargetSize {
                image: chain.size(),
                target: memory.len(),
            });
        }
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
        let fault = Userfaultfd::open(page)?;
        let can_poison = memory.register(&fault)? && self.poison;
        let own = region.is_some();
        if own {
            let kept = memory.inherit(false);
            kept.map_err(|errno| ImageError::Reserve {
                size: image,
                source: errno.into(),
            })?;
        }
        let around = match self.record {
            true => page,
            false => self.fault_around.clamp(page, 1 << 30).next_power_of_two(),
        };
        let ahead = self.prefetch && !self.record;
        let dismissed = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)
            .map_err(|errno| UserfaultfdError::Thread(errno.into()))?;
        let phase = if ahead { Phase::Running } else { Phase::Idle };
        let filler = Arc::new(Filler {
            present: Present::none(memory.len(), page),
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

/// Gives up should the thread panic: nobody is to wait for it for ever.
struct Ended<'f>(&'f Filler);

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
        let (_read, write) = io::pipe().unwrap();
        // SAFETY: the kernel reads one byte, and says so where it can't.
        let written = unsafe { nix::libc::write(write.as_raw_fd(), memory.as_ptr().cast(), 1) };
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
