//! What a bitmap covers, and what it refuses to cover.

use std::ops::Range;

use thiserror::Error;

/// The largest RAM a bitmap covers: 4 PiB, the 52 bits of physical address that x86-64 and Armv8.2-A end at
/// (Intel SDM vol. 3A 4.1.4; Arm ARM, `FEAT_LPA`).
pub const MAX_RAM_SIZE: u64 = 1 << 52;

/// A range of guest-physical addresses: `[start, start + size)`, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Ram {
    pub(crate) start: u64,
    pub(crate) size: u64,
}

impl Ram {
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

    /// The binary logarithm of a page size that this RAM can be tracked in.
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

    /// The pages of `1 << shift` bytes that cover this RAM.
    pub(crate) fn pages(self, shift: u32) -> u64 {
        ((self.size - 1) >> shift) + 1
    }

    /// The part of `[address, address + len)` inside this RAM as offsets from its start, and whether that is all of it.
    pub(crate) fn clip(self, address: u64, len: u64) -> (Range<u64>, Result<(), OutOfRange>) {
        let end = address.saturating_add(len);
        let ram_end = self.start + self.size;
        let from = address.clamp(self.start, ram_end);
        let to = end.clamp(from, ram_end);
        let whole = len == 0 && (self.start..=ram_end).contains(&address)
            || from == address && address.checked_add(len) == Some(to);
        let verdict = if whole {
            Ok(())
        } else {
            Err(self.out_of_range(address, end))
        };
        (from - self.start..to - self.start, verdict)
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

/// A range or a page size that no bitmap can have.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum GeometryError {
    /// `ram_size` is 0.
    #[error("the RAM to track has no bytes: pass the guest's RAM size as ram_size")]
    NoRam,
    /// `ram_size` is larger than [`MAX_RAM_SIZE`].
    #[error(
        "RAM of {ram_size:#x} bytes is more than the {MAX_RAM_SIZE:#x} a physical address reaches"
    )]
    RamTooLarge {
        /// The size asked for, in bytes.
        ram_size: u64,
    },
    /// `ram_start + ram_size` is no 64-bit address.
    #[error("RAM of {ram_size:#x} bytes from {ram_start:#x} on ends past the last 64-bit address")]
    AddressOverflow {
        /// The first guest-physical address.
        ram_start: u64,
        /// The size asked for, in bytes.
        ram_size: u64,
    },
    /// `page_size` is 0 or not a power of two.
    #[error("a page of {page_size} bytes: the page size must be a power of two")]
    PageSizeNotPowerOfTwo {
        /// The page size asked for, in bytes.
        page_size: u64,
    },
    /// `page_size` is larger than the RAM.
    #[error("a page of {page_size} bytes is larger than the RAM of {ram_size} bytes")]
    PageLargerThanRam {
        /// The page size asked for, in bytes.
        page_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// The host has no memory for the bits.
    #[error(
        "no memory for a bitmap of {bytes} bytes: track larger pages, or free memory on the host"
    )]
    OutOfMemory {
        /// The size of the bitmap in bytes.
        bytes: u64,
    },
}

/// A mark at least part of which falls outside the tracked RAM. What falls inside was marked.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "{start:#x}..{end:#x} is not inside the tracked RAM {ram_start:#x}..{ram_end:#x}: a page there would be lost"
)]
#[non_exhaustive]
pub struct OutOfRange {
    /// The first guest-physical address asked for.
    pub start: u64,
    /// The guest-physical address after the last one asked for; `u64::MAX` where that is no 64-bit number.
    pub end: u64,
    /// The first tracked guest-physical address.
    pub ram_start: u64,
    /// The guest-physical address after the last tracked one.
    pub ram_end: u64,
}

/// Marks can't move between these two bitmaps: they cover different RAM. Nothing was moved.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error(
    "the bitmap covers {this_start:#x}+{this_size:#x}, the other {other_start:#x}+{other_size:#x}: \
     both must cover the same RAM"
)]
#[non_exhaustive]
pub struct DifferentRam {
    /// The first guest-physical address of the bitmap that was asked.
    pub this_start: u64,
    /// Its size in bytes.
    pub this_size: u64,
    /// The first guest-physical address of the other bitmap.
    pub other_start: u64,
    /// Its size in bytes.
    pub other_size: u64,
}

#[cfg(all(test, not(memsnap_loom)))]
mod tests {
    use super::*;

    #[test]
    fn pages_cover_the_ram_and_no_more() {
        let pages = |size| Ram::new(0, size, 4096).unwrap().pages(12);
        assert_eq!(pages(4096), 1);
        assert_eq!(pages(8192), 2);
        assert_eq!(pages(8193), 3);
    }
}
