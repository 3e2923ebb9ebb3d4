//! Memory of this process that restored bytes are read into without a copy.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;

#[cfg(feature = "vm-memory")]
use host_memory::store_bytes;
use host_memory::store_zeros;
use nix::errno::Errno;
use nix::libc;

/// Writable memory of a restore target, by address. No Rust reference covers it.
#[derive(Debug)]
#[must_use = "a target has no effect until bytes are copied to it"]
pub struct TargetMemory<'a> {
    start: *mut u8,
    len: usize,
    /// Whether other code may access the memory.
    shared: bool,
    memory: PhantomData<&'a mut ()>,
}

// SAFETY: the value is an address and a length. Both constructors require that the memory is
// writable for the lifetime of the value, which for mapped memory does not depend on the thread.
unsafe impl Send for TargetMemory<'_> {}
// SAFETY: methods with `&self` return the address and the length only.
unsafe impl Sync for TargetMemory<'_> {}

impl TargetMemory<'_> {
    /// Creates the memory from its address and its length in bytes.
    ///
    /// # Safety
    /// For the lifetime of the value the memory must stay mapped and writable, and nothing else may
    /// read or write it.
    pub unsafe fn new(start: *mut u8, len: usize) -> Self {
        Self {
            start,
            len,
            shared: false,
            memory: PhantomData,
        }
    }

    /// Creates the memory from its address and its length in bytes, if other code may access it
    /// too. It is written by the kernel, or by atomic stores of machine words.
    ///
    /// # Safety
    /// For the lifetime of the value:
    /// - The memory stays mapped and writable.
    /// - No Rust reference covers any of it. Rust code of this process accesses it only through raw
    ///   pointers, with atomic or volatile operations.
    pub unsafe fn shared(start: *mut u8, len: usize) -> Self {
        Self {
            start,
            len,
            shared: true,
            memory: PhantomData,
        }
    }

    /// Returns the address of the first byte.
    #[must_use]
    pub fn as_ptr(&self) -> *mut u8 {
        self.start
    }

    /// Returns its length in bytes.
    #[must_use]
    #[expect(
        clippy::len_without_is_empty,
        reason = "a target returns `None` instead"
    )]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Writes zeros to a range of it.
    pub(super) fn fill_zeros(&mut self, range: Range<usize>) {
        let (at, len) = self.part(&range);
        if self.shared {
            // SAFETY: `part` returns memory inside the value. The rest is the contract of `shared`.
            unsafe { store_zeros(at, len) };
            return;
        }
        // SAFETY: `part` returns memory inside the value, which is mapped, writable and not
        // otherwise accessed, by the contract of `new`.
        unsafe { ptr::write_bytes(at, 0, len) };
    }

    /// Writes `bytes` to the start of it.
    #[cfg(feature = "vm-memory")]
    pub(super) fn write(&mut self, bytes: &[u8]) {
        let (at, _) = self.part(&(0..bytes.len()));
        // SAFETY: `part` returns memory inside the value, which is mapped and writable. Atomic
        // stores are right for the memory of both constructors.
        unsafe { store_bytes(at, bytes) };
    }

    /// Reads the bytes of `file` from `offset` on into a range of it. The error is that of one
    /// `pread`, with the offset at which it began.
    pub(crate) fn read_from(
        &mut self,
        range: Range<usize>,
        file: &File,
        offset: u64,
    ) -> Result<(), (u64, io::Error)> {
        let (start, len) = self.part(&range);
        read_all(len, offset, |part, position| {
            // SAFETY: the part begins inside the memory of length `len` at `start`.
            let to = unsafe { start.add(part.start) };
            // SAFETY: the kernel writes at most the length of the part from `to` on, which is
            // inside the memory. That is mapped, writable and not otherwise accessed, by the
            // contract of `new`.
            let read = unsafe { libc::pread(file.as_raw_fd(), to.cast(), part.len(), position) };
            Errno::result(read).map(|read| read as usize)
        })
    }

    fn part(&self, range: &Range<usize>) -> (*mut u8, usize) {
        assert!(range.start <= range.end && range.end <= self.len);
        // SAFETY: the start of the range is inside the memory, or its end.
        let at = unsafe { self.start.add(range.start) };
        (at, range.end - range.start)
    }
}

/// Reads `len` bytes from the file offset `offset` on. Each `read` is passed a part of `0..len`
/// that is not empty, and its file offset. It returns the number of bytes that it read.
fn read_all(
    len: usize,
    offset: u64,
    mut read: impl FnMut(Range<usize>, libc::off_t) -> nix::Result<usize>,
) -> Result<(), (u64, io::Error)> {
    let mut done = 0;
    while done < len {
        let at = offset + done as u64;
        let failed = |error: io::Error| (at, error);
        let position = libc::off_t::try_from(at);
        let position = position.map_err(|_| failed(io::ErrorKind::UnexpectedEof.into()))?;
        match read(done..len, position) {
            Ok(0) => return Err(failed(io::ErrorKind::UnexpectedEof.into())),
            Ok(read) => done += read,
            Err(Errno::EINTR) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
    }
    Ok(())
}

impl<'a> From<&'a mut [u8]> for TargetMemory<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        // SAFETY: the slice is mapped and writable, and borrowed exclusively for the lifetime of
        // the value.
        unsafe { Self::new(bytes.as_mut_ptr(), bytes.len()) }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn only_the_range_is_written() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut bytes = *b"..........";
        let mut memory = TargetMemory::from(&mut bytes[1..9]);
        assert_eq!(memory.len(), 8);
        memory.read_from(1..5, &file, 3).unwrap();
        memory.fill_zeros(6..7);
        memory.fill_zeros(8..8);
        assert_eq!(bytes, *b"..3456.\0..");
    }

    #[test]
    fn zeros_are_stored_to_a_range_of_shared_memory() {
        let mut bytes = *b"0123456789abcdef0123456789abcdef";
        // SAFETY: the bytes live longer, and are accessed only through the value until its last
        // use.
        let mut memory = unsafe { TargetMemory::shared(bytes.as_mut_ptr(), bytes.len()) };
        memory.fill_zeros(3..21);
        memory.fill_zeros(30..30);
        let mut expected = *b"0123456789abcdef0123456789abcdef";
        expected[3..21].fill(0);
        assert_eq!(bytes, expected);
    }

    #[test]
    fn short_file_is_an_error_with_its_end() {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(b"0123456789").unwrap();
        let mut bytes = [0; 8];
        let mut memory = TargetMemory::from(&mut bytes[..]);
        let (at, error) = memory.read_from(0..8, &file, 4).unwrap_err();
        assert_eq!((at, error.kind()), (10, io::ErrorKind::UnexpectedEof));
        let (_, error) = memory.read_from(0..8, &file, u64::MAX - 8).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn short_and_interrupted_reads_are_continued() {
        let mut results = [Ok(3), Err(Errno::EINTR), Ok(4), Ok(1)].into_iter();
        let mut calls = Vec::new();
        let done = read_all(8, 100, |part, position| {
            calls.push((part, position));
            results.next().unwrap()
        });
        done.unwrap();
        assert_eq!(calls, [(0..8, 100), (3..8, 103), (3..8, 103), (7..8, 107)]);
    }

    #[test]
    fn a_failed_read_is_an_error_with_its_offset() {
        let mut results = [Ok(3), Err(Errno::EIO)].into_iter();
        let (at, error) = read_all(8, 100, |_, _| results.next().unwrap()).unwrap_err();
        assert_eq!((at, error.raw_os_error()), (103, Some(Errno::EIO as i32)));
    }
}
