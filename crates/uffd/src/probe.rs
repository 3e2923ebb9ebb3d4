//! A page of this process, with which a descriptor from elsewhere is examined.

#![allow(unsafe_code)]

use std::ffi::c_void;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::{self, PipeReader, PipeWriter};
use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;
use std::thread;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use nix::sys::signal::{SigSet, SigmaskHow};
use nix::unistd::{SysconfVar, sysconf};

use crate::error::AdoptError;
use crate::event::Event;
use crate::flags::{FillFlags, Modes};
use crate::userfaultfd::Userfaultfd;

/// The addresses that every process may use.
const ADDRESSES: usize = (1 << 46) - 1;

/// The wait in milliseconds for an event that another process may have read instead.
const EVENT_LIMIT: u16 = 10_000;

/// A page that was never touched, at an address where another process most likely has nothing.
#[derive(Debug)]
pub(crate) struct Probe {
    start: NonNull<c_void>,
    len: NonZeroUsize,
}

impl Probe {
    pub(crate) fn new() -> io::Result<Self> {
        let page = sysconf(SysconfVar::PAGE_SIZE)?.unwrap_or(4096);
        let len = usize::try_from(page).ok().and_then(NonZeroUsize::new);
        let len = len.ok_or(io::ErrorKind::Unsupported)?;
        // Processes that were forked have the same mappings, so the kernel's choice of an address
        // could be one that another process uses. A random one is not.
        let random = RandomState::new().build_hasher().finish() as usize;
        let address = (random & ADDRESSES) / len * len.get();
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        let flags = MapFlags::MAP_PRIVATE | MapFlags::MAP_NORESERVE;
        // SAFETY: a new mapping. The address is only a hint, so it replaces no other.
        let start = unsafe { mmap_anonymous(NonZeroUsize::new(address), len, access, flags) }?;
        Ok(Self { start, len })
    }

    fn range(&self) -> Range<u64> {
        let start = self.start.expose_provenance().get() as u64;
        start..start + self.len.get() as u64
    }

    /// Returns whether the descriptor is of a process that has mapped this page. That changes
    /// nothing: the page is not registered.
    pub(crate) fn is_in_memory_of(&self, fault: &Userfaultfd) -> bool {
        fault.unregister(self.range()).is_ok()
    }

    /// Checks that the descriptor receives a fault on this page: one that the kernel takes, or, if
    /// `user_mode_only`, any.
    pub(crate) fn check_faults(
        &self,
        fault: &Userfaultfd,
        user_mode_only: bool,
    ) -> Result<(), AdoptError> {
        // SAFETY: the page is mapped, and only system calls and loads below access it.
        unsafe { fault.register(self.range(), Modes::MISSING) }
            .map_err(|error| AdoptError::Unchecked(error.source))?;
        self.touch(fault, user_mode_only)
    }

    /// Touches the page in another thread, and fills it.
    fn touch(&self, fault: &Userfaultfd, user_mode_only: bool) -> Result<(), AdoptError> {
        let (done, ended) = io::pipe().map_err(AdoptError::Unchecked)?;
        let address = self.start.expose_provenance().get();
        let touch = move || touch_page(address, &ended, user_mode_only);
        let thread = thread::Builder::new().name("uffd-probe".into());
        // A signal handler must not wait for the page.
        let signals = SigSet::all().thread_swap_mask(SigmaskHow::SIG_BLOCK);
        let toucher = thread.spawn(touch);
        let restored = signals.and_then(|signals| signals.thread_set_mask());
        let received = match &toucher {
            Ok(_) => self.receive_fault(fault, &done),
            Err(_) => Ok(false),
        };
        let filled = fault.zeropage(self.range(), FillFlags::empty());
        // The access continues in any case.
        let unregistered = fault.unregister(self.range());
        let toucher = toucher.map_err(AdoptError::Unchecked)?;
        let touched = toucher.join().unwrap_or(Err(Errno::EINVAL));
        restored.map_err(unchecked)?;
        unregistered.map_err(AdoptError::Unchecked)?;
        match (received?, touched) {
            (true, Ok(())) if filled.stop.is_none() => Ok(()),
            (_, Err(Errno::EFAULT)) => Err(AdoptError::UserModeOnly),
            // The page was not missing: another process has it at the same address.
            (false, Ok(())) => Err(AdoptError::OtherProcess),
            _ => Err(AdoptError::InUse("another process uses it")),
        }
    }

    /// Waits until the fault is received, or the access ends without one. Returns whether it was
    /// received.
    fn receive_fault(&self, fault: &Userfaultfd, done: &PipeReader) -> Result<bool, AdoptError> {
        loop {
            let mut ready = [
                PollFd::new(fault.as_fd(), PollFlags::POLLIN),
                PollFd::new(done.as_fd(), PollFlags::POLLIN),
            ];
            match poll(&mut ready, PollTimeout::from(EVENT_LIMIT)) {
                Err(Errno::EINTR) => continue,
                Err(errno) => return Err(unchecked(errno)),
                Ok(0) => return Err(AdoptError::InUse("another process reads its events")),
                Ok(_) => {}
            }
            match fault.read_event().map_err(AdoptError::Unchecked)? {
                Some(Event::PageFault { address, .. }) if self.range().contains(&address) => {
                    return Ok(true);
                }
                Some(_) => return Err(AdoptError::InUse("it has events of other memory")),
                None if ready[1].any() == Some(true) => return Ok(false),
                None => {}
            }
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        // SAFETY: the value's own mapping. It fails only for an unaligned address.
        let _ = unsafe { munmap(self.start, self.len.get()) };
    }
}

/// Reads a byte of the page, by a system call unless `user_mode_only`.
fn touch_page(address: usize, pipe: &PipeWriter, user_mode_only: bool) -> nix::Result<()> {
    let page = std::ptr::with_exposed_provenance::<c_void>(address);
    if user_mode_only {
        // SAFETY: the page is mapped until this thread was joined, and no reference covers it.
        let _ = unsafe { page.cast::<u8>().read_volatile() };
    }
    // SAFETY: the kernel reads one byte, and reports an error if it cannot.
    Errno::result(unsafe { libc::write(pipe.as_raw_fd(), page, 1) }).map(drop)
}

fn unchecked(errno: Errno) -> AdoptError {
    AdoptError::Unchecked(errno.into())
}
