//! The descriptor and its operations.

#![allow(unsafe_code)]

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use linux_raw_sys::general::{
    uffdio_continue, uffdio_copy, uffdio_move, uffdio_poison, uffdio_range, uffdio_register,
    uffdio_writeprotect, uffdio_zeropage,
};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::stat::{FileStat, SFlag, fstat};

use crate::abi::{WRITEPROTECT_MODE_DONTWAKE, WRITEPROTECT_MODE_WP};
use crate::error::RegisterError;
use crate::filled::{Filled, Stop};
use crate::flags::{Features, FillFlags, Modes, MoveFlags, Operations};
use crate::options::UserfaultfdOptions;
use crate::sys;

/// A userfaultfd: it receives the page faults of the memory that is registered with it, and
/// resolves them.
///
/// Addresses and lengths are in bytes, and must be of whole pages of the memory. They are those of
/// the process that opened the descriptor, or for
/// [`Event::Fork`](crate::Event::Fork) of the child. All calls may be
/// made by any thread.
///
/// When the last duplicate of the descriptor is closed, all ranges are unregistered: waiting
/// accesses continue, and missing pages are zeros.
///
/// # Events of changed mappings
/// With [`Features::EVENT_UNMAP`], [`Features::EVENT_REMOVE`] or [`Features::EVENT_REMAP`], the
/// thread that unmaps, discards or moves registered memory waits in its system call until the event
/// is read. If no thread reads events, it waits until the last duplicate of the descriptor is
/// closed, also one in another process. This includes a `munmap` by the thread that would read the
/// event, such as the drop of a mapping after the loop that handles faults has ended. Before memory
/// is unmapped, therefore [unregister](Self::unregister) it, or close all duplicates. No page can
/// be filled while such an event is unread ([`Stop::Changing`]).
#[derive(Debug)]
#[must_use = "all ranges are unregistered when this is dropped"]
pub struct Userfaultfd {
    fault: OwnedFd,
    features: Option<Features>,
}

impl Userfaultfd {
    /// Returns options for opening a userfaultfd.
    pub fn options() -> UserfaultfdOptions {
        UserfaultfdOptions::default()
    }

    pub(crate) fn new(fault: OwnedFd, features: Option<Features>) -> Self {
        Self { fault, features }
    }

    /// Uses a descriptor that another process or library has opened, and whose features it has
    /// requested. Makes the descriptor non-blocking.
    ///
    /// This is for handling the faults of another process, which sends its descriptor. To fill
    /// memory of this process, use [`adopt`](UserfaultfdOptions::adopt), which checks that.
    ///
    /// # Errors
    /// Returns [`InvalidInput`](io::ErrorKind::InvalidInput) if it is not a userfaultfd, and the
    /// errors of `fcntl`.
    pub fn from_fd(fault: OwnedFd) -> io::Result<Self> {
        let wrong = || {
            let what = "the descriptor is not a userfaultfd: give one that userfaultfd(2) returned";
            io::Error::new(io::ErrorKind::InvalidInput, what)
        };
        // The device refuses an empty range with the same error.
        let is_device = is_device(&fstat(&fault)?);
        match sys::wake(&fault, uffdio_range { start: 0, len: 0 }) {
            Err(Errno::EINVAL) if !is_device => {}
            _ => return Err(wrong()),
        }
        let flags = OFlag::from_bits_retain(fcntl(&fault, FcntlArg::F_GETFL)?);
        if !flags.contains(OFlag::O_NONBLOCK) {
            fcntl(&fault, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        }
        Ok(Self::new(fault, None))
    }

    pub(crate) fn descriptor(&self) -> &OwnedFd {
        &self.fault
    }

    pub(crate) fn set_features(&mut self, features: Features) {
        self.features = Some(features);
    }

    /// Returns whether a mapping that is registered in these modes is registered with this
    /// userfaultfd.
    pub(crate) fn is_registered(&self, range: Range<u64>, modes: Modes) -> bool {
        // SAFETY: a registration in the same modes with the same userfaultfd changes nothing, and
        // the kernel refuses memory of another one.
        unsafe { self.register(range, modes) }.is_ok()
    }

    /// Duplicates the descriptor. Both refer to the same registrations and events.
    ///
    /// # Errors
    /// Returns the errors of the operating system, such as too many open files.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Self::new(self.fault.try_clone()?, self.features))
    }

    /// Returns the features in use, or `None` for a descriptor of [`from_fd`](Self::from_fd).
    #[must_use]
    pub fn features(&self) -> Option<Features> {
        self.features
    }

    /// Registers a range: page faults of these kinds are reported, and the accesses wait until
    /// they are resolved. Returns the operations that the range supports.
    ///
    /// # Errors
    /// Returns a [`RegisterError`] if the kernel refuses the range.
    ///
    /// # Safety
    /// The range must be mapped in the process of the descriptor. The caller decides what its
    /// missing pages contain: no other code may rely on zeros there, and no reference may cover a
    /// missing page.
    pub unsafe fn register(
        &self,
        range: Range<u64>,
        modes: Modes,
    ) -> Result<Operations, RegisterError> {
        let mut register = uffdio_register {
            range: kernel_range(&range),
            mode: modes.bits(),
            ioctls: 0,
        };
        // SAFETY: the contract is the same.
        match unsafe { sys::register(&self.fault, &mut register) } {
            Ok(()) => Ok(Operations::from_bits_retain(register.ioctls)),
            Err(errno) => Err(RegisterError {
                range,
                modes,
                source: errno.into(),
            }),
        }
    }

    /// Unregisters a range, after which missing pages are zeros, and wakes waiting accesses.
    ///
    /// # Errors
    /// Returns the errors of the operating system: `EINVAL` if the range is not mapped.
    pub fn unregister(&self, range: Range<u64>) -> io::Result<()> {
        sys::unregister(&self.fault, kernel_range(&range))?;
        // The kernel (6.18) wakes before it locks the mapping. Since 6.7 a fault holds only the
        // lock of its mapping, so a thread that faults in between would sleep forever without this
        // call.
        self.wake(range)
    }

    /// Wakes accesses that wait for a page of the range. They fault again if the fault was not
    /// resolved.
    ///
    /// # Errors
    /// Returns the errors of the operating system: `EINVAL` if the range is not of whole pages.
    pub fn wake(&self, range: Range<u64>) -> io::Result<()> {
        Ok(sys::wake(&self.fault, kernel_range(&range))?)
    }

    /// Fills missing pages at `to` with the `len` bytes at `from` in this process.
    ///
    /// # Safety
    /// The bytes at `from` must not be written by other threads during the call, unless all code
    /// that accesses the filled pages accepts any mixture of old and new bytes. They need not be
    /// readable: the request then stops with `EFAULT`.
    pub unsafe fn copy(&self, to: u64, from: u64, len: u64, flags: FillFlags) -> Filled {
        let mut copy = uffdio_copy {
            dst: to,
            src: from,
            len,
            mode: flags.bits(),
            copy: 0,
        };
        // SAFETY: the contract is the same.
        let answer = unsafe { sys::copy(&self.fault, &mut copy) };
        Filled::new(len, answer, copy.copy)
    }

    /// Fills missing pages at `to` with `bytes`.
    pub fn copy_bytes(&self, to: u64, bytes: &[u8], flags: FillFlags) -> Filled {
        let from = bytes.as_ptr().expose_provenance() as u64;
        // SAFETY: the slice is borrowed, so that no other thread writes it.
        unsafe { self.copy(to, from, bytes.len() as u64, flags) }
    }

    /// Fills missing pages with zeros, which takes no memory for anonymous pages.
    pub fn zeropage(&self, range: Range<u64>, flags: FillFlags) -> Filled {
        let mut zeropage = uffdio_zeropage {
            range: kernel_range(&range),
            mode: flags.bits(),
            zeropage: 0,
        };
        let answer = sys::zeropage(&self.fault, &mut zeropage);
        Filled::new(zeropage.range.len, answer, zeropage.zeropage)
    }

    /// Maps pages that the mapped file has: resolves faults with
    /// [`FaultFlags::MINOR`](crate::FaultFlags::MINOR).
    pub fn continue_(&self, range: Range<u64>, flags: FillFlags) -> Filled {
        let mut continue_ = uffdio_continue {
            range: kernel_range(&range),
            mode: flags.bits(),
            mapped: 0,
        };
        let answer = sys::continue_(&self.fault, &mut continue_);
        Filled::new(continue_.range.len, answer, continue_.mapped)
    }

    /// Poisons missing pages. An access then gets `SIGBUS`, or `EFAULT` if the kernel makes it.
    pub fn poison(&self, range: Range<u64>, flags: FillFlags) -> Filled {
        let mut poison = uffdio_poison {
            range: kernel_range(&range),
            mode: flags.bits(),
            updated: 0,
        };
        let answer = sys::poison(&self.fault, &mut poison);
        Filled::new(poison.range.len, answer, poison.updated)
    }

    /// Moves `len` bytes of pages from `from` to missing pages at `to`, without a copy. The pages
    /// at `from` are missing afterwards. Both are private anonymous memory.
    ///
    /// # Safety
    /// No reference may cover the pages at `from`, and no other code may rely on their content.
    pub unsafe fn move_(&self, to: u64, from: u64, len: u64, flags: MoveFlags) -> Filled {
        let mut move_ = uffdio_move {
            dst: to,
            src: from,
            len,
            mode: flags.bits(),
            move_: 0,
        };
        // SAFETY: the contract is the same.
        let answer = unsafe { sys::move_(&self.fault, &mut move_) };
        Filled::new(len, answer, move_.move_)
    }

    /// Write-protects pages: writes to them wait. The range must be registered with
    /// [`Modes::WRITE_PROTECT`].
    ///
    /// # Errors
    /// Returns [`Stop::Changing`] if the request must be repeated, or another [`Stop`].
    pub fn write_protect(&self, range: Range<u64>) -> Result<(), Stop> {
        self.set_protection(&range, WRITEPROTECT_MODE_WP)
    }

    /// Permits writes to pages, and wakes the writes that wait if `wake` is true.
    ///
    /// # Errors
    /// Returns the errors of [`write_protect`](Self::write_protect).
    pub fn write_unprotect(&self, range: Range<u64>, wake: bool) -> Result<(), Stop> {
        let mode = if wake { 0 } else { WRITEPROTECT_MODE_DONTWAKE };
        self.set_protection(&range, mode)
    }

    fn set_protection(&self, range: &Range<u64>, mode: u64) -> Result<(), Stop> {
        let range = kernel_range(range);
        let request = uffdio_writeprotect { range, mode };
        sys::write_protect(&self.fault, request).map_err(Stop::of)
    }

    /// Returns whether the cause of an event other than a page fault is still in progress: its
    /// thread waits for the event to be read, or was just woken.
    ///
    /// After a range is unregistered, no further event is about it. After this call has returned
    /// `false`, no such event is pending.
    #[must_use]
    pub fn is_changing(&self) -> bool {
        // An empty range is invalid, so nothing is filled. The kernel returns EAGAIN before it
        // checks the range.
        let nothing = self.zeropage(0..0, FillFlags::empty());
        nothing.stop == Some(Stop::Changing)
    }
}

/// Returns whether a file is a character device.
pub(crate) fn is_device(file: &FileStat) -> bool {
    file.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFCHR.bits()
}

/// Converts a range. One that ends before its start is empty, which the kernel refuses.
fn kernel_range(range: &Range<u64>) -> uffdio_range {
    uffdio_range {
        start: range.start,
        len: range.end.saturating_sub(range.start),
    }
}

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fault.as_fd()
    }
}

impl AsRawFd for Userfaultfd {
    fn as_raw_fd(&self) -> RawFd {
        self.fault.as_raw_fd()
    }
}

impl From<Userfaultfd> for OwnedFd {
    fn from(fault: Userfaultfd) -> Self {
        fault.fault
    }
}
