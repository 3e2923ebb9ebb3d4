//! An address range of this process that the kernel reads and Rust never does.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

/// A range of this process's memory that stays readable for `'a` and may change at any moment, as a guest's RAM
/// does under a running vCPU.
///
/// It is an address and a length, never a reference or a slice: only the kernel looks at the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    start: *const u8,
    len: usize,
    source: PhantomData<&'a ()>,
}

// SAFETY: an address and a length; what `new` was promised, that the range stays mapped for `'a`, holds on every thread, and
// that the bytes may change under whoever reads them is part of it.
unsafe impl Send for Memory<'_> {}

// SAFETY: as for `Send`; no method changes anything.
unsafe impl Sync for Memory<'_> {}

impl<'a> Memory<'a> {
    /// Names `len` bytes from `start` on.
    ///
    /// # Safety
    /// For `'a` the whole range must stay mapped in this process, and must not be handed to anything that needs
    /// the bytes kept from being read (memory of another allocation, say). Its contents may change at any time, by any
    /// thread, vCPU or device.
    #[must_use]
    pub unsafe fn new(start: *const u8, len: usize) -> Self {
        Self {
            start,
            len,
            source: PhantomData,
        }
    }

    /// The address of the first byte.
    #[must_use]
    pub fn as_ptr(self) -> *const u8 {
        self.start
    }

    /// The length in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the range has no bytes.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// The first `len` bytes, or all where there are fewer.
    pub(crate) fn first(self, len: usize) -> Self {
        Self {
            len: self.len.min(len),
            ..self
        }
    }

    /// What follows the first `len` bytes; empty where there are no more.
    pub(crate) fn after(self, len: usize) -> Self {
        let len = len.min(self.len);
        Self {
            start: self.start.wrapping_add(len),
            len: self.len - len,
            ..self
        }
    }

    /// One `pwrite(2)` of the range to `offset`: the number of bytes that the kernel took.
    pub(crate) fn write_at(self, file: &File, offset: u64) -> io::Result<usize> {
        let offset =
            libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        // SAFETY: pwrite only reads memory, through the kernel, which answers EFAULT for an address that it can't
        // read; that the range may be read was promised to `new`, or follows from the slice in `from`. `file` is
        // borrowed, so the descriptor is open.
        let taken = unsafe { libc::pwrite(file.as_raw_fd(), self.start.cast(), self.len, offset) };
        usize::try_from(taken).map_err(|_| io::Error::last_os_error())
    }
}

impl<'a> From<&'a [u8]> for Memory<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Self {
            start: bytes.as_ptr(),
            len: bytes.len(),
            source: PhantomData,
        }
    }
}
