//! An address range of this process, without a reference to it.

#![allow(unsafe_code)]

use std::marker::PhantomData;

/// A range of this process's memory that stays readable for `'a` and may change at any moment.
#[derive(Clone, Copy, Debug)]
pub struct HostMemory<'a> {
    start: *const u8,
    len: usize,
    source: PhantomData<&'a ()>,
}

impl<'a> HostMemory<'a> {
    /// Names `len` bytes from `start` on.
    ///
    /// # Safety
    /// The range must stay mapped and readable for `'a`.
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
}
