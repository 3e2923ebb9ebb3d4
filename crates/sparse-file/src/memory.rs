//! Address ranges of this process that only the kernel reads.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;

/// A range of this process's memory that remains readable for `'a` and may change at any time, such
/// as a guest's RAM while a vCPU runs.
///
/// Consists of an address and a length and is never converted to a reference or a slice: only the
/// kernel reads the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Memory<'a> {
    start: *const u8,
    len: usize,
    source: PhantomData<&'a ()>,
}

// SAFETY: an address and a length. The caller of `new` promised that the range stays mapped for
// `'a`, which holds on every thread, and that concurrent changes of the bytes are permitted.
unsafe impl Send for Memory<'_> {}

// SAFETY: as for `Send`; no method changes anything.
unsafe impl Sync for Memory<'_> {}

impl<'a> Memory<'a> {
    /// Creates a range of `len` bytes that starts at `start`.
    ///
    /// # Safety
    /// For `'a` the whole range must stay mapped in this process. Reading it must not violate the
    /// aliasing rules of its owner (memory of another allocation, for example). Its contents may
    /// change at any time, by any thread, vCPU or device.
    #[must_use]
    pub unsafe fn new(start: *const u8, len: usize) -> Self {
        Self {
            start,
            len,
            source: PhantomData,
        }
    }

    /// Returns the address of the first byte.
    #[must_use]
    pub fn as_ptr(self) -> *const u8 {
        self.start
    }

    /// Returns the length in bytes.
    #[must_use]
    pub fn len(self) -> usize {
        self.len
    }

    /// Returns whether the range is empty.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Returns the first `len` bytes, or all if there are fewer.
    pub(crate) fn first(self, len: usize) -> Self {
        Self {
            len: self.len.min(len),
            ..self
        }
    }

    /// Returns the bytes after the first `len`. Empty if there are none.
    pub(crate) fn after(self, len: usize) -> Self {
        let len = len.min(self.len);
        Self {
            start: self.start.wrapping_add(len),
            len: self.len - len,
            ..self
        }
    }

    /// Writes the range to `offset` by one `pwrite(2)` and returns the number of bytes written.
    pub(crate) fn write_at(self, file: &File, offset: u64) -> io::Result<usize> {
        let offset =
            libc::off_t::try_from(offset).map_err(|_| io::Error::from_raw_os_error(libc::EFBIG))?;
        // SAFETY: pwrite only reads memory, through the kernel, which returns EFAULT for an
        // unreadable address. That the range may be read was promised to `new`, or follows from the
        // slice in `from`. `file` is borrowed, so the descriptor is open.
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
