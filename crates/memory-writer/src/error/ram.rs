//! Errors of the size of the RAM.

use thiserror::Error;

/// An invalid size of a memory file or of its pages.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum RamError {
    /// `ram_size` is 0.
    #[error("the RAM size is 0: pass the guest's RAM size as ram_size")]
    NoRam,
    /// `ram_size` exceeds the address space of every machine.
    #[error(
        "the RAM size {ram_size:#x} exceeds the maximum of 2^52 bytes: pass the guest's RAM size as \
         ram_size"
    )]
    TooLarge {
        /// The requested size in bytes.
        ram_size: u64,
    },
    /// `page_size` is 0 or not a power of two.
    #[error(
        "the page size {page_size} is not a power of two: pass 4096, or 16384 on Apple silicon"
    )]
    PageSizeNotPowerOfTwo {
        /// The requested page size in bytes.
        page_size: u64,
    },
    /// `page_size` is below 512: raw RAM is distinguished from images by a size that is a multiple
    /// of 512.
    #[error("the page size {page_size} is too small: pass at least 512")]
    PageTooSmall {
        /// The requested page size in bytes.
        page_size: u64,
    },
    /// `page_size` is larger than the RAM.
    #[error(
        "the page size {page_size} is larger than the RAM of {ram_size} bytes: pass a smaller one"
    )]
    PageLargerThanRam {
        /// The requested page size in bytes.
        page_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// `ram_size` is not a multiple of `page_size`.
    #[error(
        "the RAM size {ram_size:#x} is not a multiple of the page size {page_size:#x}: pass a smaller \
         page size"
    )]
    NotWholePages {
        /// The requested size in bytes.
        ram_size: u64,
        /// The requested page size in bytes.
        page_size: u64,
    },
}
