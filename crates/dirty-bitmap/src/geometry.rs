//! Validation of address ranges and page sizes.

use std::ops::Range;

use thiserror::Error;

/// The largest RAM that a bitmap covers, in bytes: 4 PiB.
///
/// This is the limit of the 52-bit physical addresses of x86-64 and Armv8.2-A (Intel SDM vol. 3A
/// 4.1.4; Arm ARM, `FEAT_LPA`).
pub const MAX_RAM_SIZE: u64 = 1 << 52;

/// The guest-physical addresses `[start, start + size)`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RamRange {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

impl RamRange {
    pub(crate) fn new(start: u64, size: u64, page_size: u64) -> Result<Self, GeometryError> {
        if size == 0 {
            return Err(GeometryError::NoRam);
        }
        if size > MAX_RAM_SIZE {
            return Err(GeometryError::RamTooLarge { ram_size: size });
        }
        if start.checked_add(size).is_none() {
            return Err(GeometryError::AddressOverflow {
                ram_start: start,
                ram_size: size,
            });
        }
        let ram = Self { start, size };
        ram.shift_of(page_size)?;
        Ok(ram)
    }

    /// Returns the binary logarithm of `page_size`, if this RAM can be tracked in pages of that
    /// size.
    pub(crate) fn shift_of(self, page_size: u64) -> Result<u32, GeometryError> {
        if !page_size.is_power_of_two() {
            return Err(GeometryError::PageSizeNotPowerOfTwo { page_size });
        }
        if page_size > self.size {
            return Err(GeometryError::PageLargerThanRam {
                page_size,
                ram_size: self.size,
            });
        }
        Ok(page_size.trailing_zeros())
    }

    /// Returns the number of pages of `1 << shift` bytes that cover this RAM.
    pub(crate) fn pages(self, shift: u32) -> u64 {
        ((self.size - 1) >> shift) + 1
    }

    /// Returns an error if `other` covers other addresses.
    pub(crate) fn check_same(self, other: Self) -> Result<(), RangeMismatch> {
        if self == other {
            return Ok(());
        }
        Err(RangeMismatch {
            this_start: self.start,
            this_size: self.size,
            other_start: other.start,
            other_size: other.size,
        })
    }

    /// Returns the part of `[address, address + len)` inside this RAM, as offsets from its start,
    /// and an error if any other part lies outside.
    pub(crate) fn clip(self, address: u64, len: u64) -> (Range<u64>, Result<(), OutOfRange>) {
        let end = address.saturating_add(len);
        let ram_end = self.start + self.size;
        let from = address.clamp(self.start, ram_end);
        let to = end.clamp(from, ram_end);
        let whole = len == 0 && (self.start..=ram_end).contains(&address)
            || from == address && address.checked_add(len) == Some(to);
        let result = if whole {
            Ok(())
        } else {
            Err(self.out_of_range(address, end))
        };
        (from - self.start..to - self.start, result)
    }

    #[cold]
    pub(crate) fn out_of_range(self, start: u64, end: u64) -> OutOfRange {
        OutOfRange {
            start,
            end,
            ram_start: self.start,
            ram_end: self.start + self.size,
        }
    }
}

/// An error for a range or a page size that a bitmap can't have.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GeometryError {
    /// `ram_size` is 0.
    #[error("the RAM size is 0: pass the size of the guest's RAM as ram_size")]
    NoRam,
    /// `ram_size` is larger than [`MAX_RAM_SIZE`].
    #[error(
        "the RAM size {ram_size} exceeds the limit of {MAX_RAM_SIZE} bytes: pass a smaller size"
    )]
    RamTooLarge {
        /// The requested size, in bytes.
        ram_size: u64,
    },
    /// `ram_start + ram_size` exceeds 64 bits.
    #[error(
        "RAM of {ram_size} bytes at {ram_start:#x} ends past the last 64-bit address: pass a \
         smaller start or size"
    )]
    AddressOverflow {
        /// The first guest-physical address.
        ram_start: u64,
        /// The requested size, in bytes.
        ram_size: u64,
    },
    /// `page_size` is 0 or not a power of two.
    #[error("the page size {page_size} is not a power of two: pass one that is")]
    PageSizeNotPowerOfTwo {
        /// The requested page size, in bytes.
        page_size: u64,
    },
    /// `page_size` is larger than the RAM.
    #[error(
        "the page size {page_size} is larger than the RAM of {ram_size} bytes: pass a smaller one"
    )]
    PageLargerThanRam {
        /// The requested page size, in bytes.
        page_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// The host could not allocate memory for the bitmap.
    #[error(
        "failed to allocate {bytes} bytes for the bitmap: track larger pages, or free memory on \
         the host"
    )]
    OutOfMemory {
        /// The size of the failed allocation, in bytes.
        bytes: u64,
    },
}

/// An error for a mark that lies outside the tracked RAM, whole or in part. The part inside was
/// marked.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "{start:#x}..{end:#x} is not inside the tracked RAM {ram_start:#x}..{ram_end:#x}: pages \
     outside it are not saved"
)]
#[non_exhaustive]
pub struct OutOfRange {
    /// The first requested guest-physical address.
    pub start: u64,
    /// The guest-physical address after the last requested one; `u64::MAX` if that exceeds 64 bits.
    pub end: u64,
    /// The first tracked guest-physical address.
    pub ram_start: u64,
    /// The guest-physical address after the last tracked one.
    pub ram_end: u64,
}

/// An error for moving or copying marks between two bitmaps that cover different RAM. No mark was
/// moved or copied.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the bitmaps cover different RAM, {this_size} bytes at {this_start:#x} and {other_size} \
     bytes at {other_start:#x}: make both with the same start and size"
)]
#[non_exhaustive]
pub struct RangeMismatch {
    /// The first guest-physical address of the bitmap that the method was called on.
    pub this_start: u64,
    /// Its size in bytes.
    pub this_size: u64,
    /// The first guest-physical address of the other bitmap.
    pub other_start: u64,
    /// Its size in bytes.
    pub other_size: u64,
}

#[cfg(all(test, not(ramsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_exactly_the_ram() {
        let pages = |size| RamRange::new(0, size, 4096).unwrap().pages(12);
        assert_eq!(pages(4096), 1);
        assert_eq!(pages(8192), 2);
        assert_eq!(pages(8193), 3);
    }
}
