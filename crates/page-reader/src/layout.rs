//! The guest-physical ranges of RAM, and their offsets in the memory file.

mod error;

use std::ops::Range;
use std::{fmt, iter};

pub use error::{LayoutError, OutsideRam};

const GIB: u64 = 1 << 30;

/// The layout of a guest's RAM: guest-physical ranges with gaps, and their offsets in the memory
/// file.
///
/// The memory file has RAM only. Its regions follow one another without gaps, in ascending
/// guest-physical order, regardless of the order in which they are given. VMMs with several memory
/// slots dump them in this order.
///
/// ```text
/// guest-physical   0 ........ 3 GiB   (MMIO gap)   4 GiB ........ 6 GiB
///                  |  region 0  |                  |   region 1    |
/// memory file      0 ........ 3 GiB ........................... 5 GiB
/// ```
///
/// Two adjacent regions stay separate, like two memory slots. A guest-physical range may span them.
///
/// With the feature `serde`, a layout is serialized as the sequence of its regions,
/// `{ guest_start, size }` in bytes. It is validated when deserialized.
///
/// # Examples
/// ```
/// use page_reader::RamLayout;
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// const GIB: u64 = 1 << 30;
/// let layout = RamLayout::x86_with_gap(5 * GIB)?;
///
/// assert_eq!(layout.ram_size(), 5 * GIB);
/// assert_eq!(layout.offset_of(4 * GIB), Some(3 * GIB));
/// assert_eq!(layout.offset_of(0xfee0_0000), None); // the local APIC, in the gap
/// assert_eq!(layout.guest_address_of(3 * GIB), Some(4 * GIB));
///
/// // 8 KiB of the memory file around the border are two pieces of guest RAM ...
/// let pieces: Vec<_> = layout.offset_pieces(3 * GIB - 4096, 8192)?.collect();
/// assert_eq!((pieces[0].guest_start, pieces[0].size), (3 * GIB - 4096, 4096));
/// assert_eq!((pieces[1].guest_start, pieces[1].size), (4 * GIB, 4096));
/// // ... and a guest range that reaches into the gap is an error.
/// assert!(layout.guest_pieces(3 * GIB - 4096, 8192).is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
#[cfg_attr(feature = "serde", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(
    feature = "serde",
    serde(try_from = "Vec<serialized::Region>", into = "Vec<serialized::Region>")
)]
pub struct RamLayout {
    regions: Box<[RamRange]>,
}

/// A region of a [`RamLayout`], or a part of one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub struct RamRange {
    /// The region, as an index into [`RamLayout::regions`].
    pub region: usize,
    /// The guest-physical address of the first byte.
    pub guest_start: u64,
    /// The offset of the first byte in the memory file.
    pub offset: u64,
    /// The length in bytes, at least 1.
    pub size: u64,
}

impl RamLayout {
    /// The alignment of the start and size of every region, in bytes: 4 KiB.
    ///
    /// This is the smallest page size of KVM memory slots on x86 and arm64, and smaller than the 16
    /// KiB of Apple silicon. No page belongs to two regions. Regions of a VMM with larger pages are
    /// multiples of those.
    pub const ALIGNMENT: u64 = 4096;

    /// Creates a layout of the given RAM regions (guest-physical start, size in bytes), in any
    /// order. The layout numbers them in ascending order of their starts.
    ///
    /// # Errors
    /// Returns an error if there is no region, or if a region is empty, not
    /// [aligned](Self::ALIGNMENT), overlaps another, or ends past 2<sup>64</sup> - 1. Returns an
    /// error if the sizes add up to 2<sup>63</sup> bytes or more.
    pub fn new(regions: impl IntoIterator<Item = (u64, u64)>) -> Result<Self, LayoutError> {
        let mut given: Vec<_> = regions.into_iter().collect();
        given.sort_unstable();
        let mut regions = Vec::<RamRange>::with_capacity(given.len());
        let mut offset = 0_u64;
        for (guest_start, size) in given {
            if size == 0 {
                return Err(LayoutError::EmptyRegion { guest_start });
            }
            if !(guest_start | size).is_multiple_of(Self::ALIGNMENT) {
                return Err(LayoutError::Misaligned { guest_start, size });
            }
            if guest_start.checked_add(size).is_none() {
                return Err(LayoutError::PastAddressSpace { guest_start, size });
            }
            if let Some(previous) = regions.last()
                && guest_start < previous.guest_end()
            {
                return Err(LayoutError::Overlap {
                    previous_start: previous.guest_start,
                    previous_end: previous.guest_end(),
                    guest_start,
                });
            }
            regions.push(RamRange {
                region: regions.len(),
                guest_start,
                offset,
                size,
            });
            // Disjoint regions below 2^64 cannot add up to more, so this does not wrap.
            offset += size;
        }
        if regions.is_empty() {
            return Err(LayoutError::NoRegion);
        }
        if i64::try_from(offset).is_err() {
            return Err(LayoutError::TooLarge);
        }
        Ok(Self {
            regions: regions.into(),
        })
    }

    /// Creates a layout of one region, without an MMIO gap in the RAM. Most arm64 guests have one:
    /// the RAM of QEMU's `virt` machine starts at 1 GiB, that of Firecracker at 2 GiB.
    ///
    /// # Errors
    /// Returns the errors of [`new`](Self::new).
    pub fn single(guest_start: u64, size: u64) -> Result<Self, LayoutError> {
        Self::new([(guest_start, size)])
    }

    /// Creates the layout of an x86 guest: RAM from 0 up to 3 GiB, and the rest from 4 GiB.
    ///
    /// The gap of 1 GiB holds 32-bit MMIO (PCI, I/O APIC, local APIC), as in Firecracker and Cloud
    /// Hypervisor. Use [`new`](Self::new) if the gap starts lower, as in some of QEMU's machines,
    /// or if there is a second gap, as in Firecracker from 256 GiB.
    ///
    /// # Errors
    /// Returns the errors of [`new`](Self::new).
    pub fn x86_with_gap(ram_size: u64) -> Result<Self, LayoutError> {
        let below = ram_size.min(3 * GIB);
        let above = (4 * GIB, ram_size - below);
        Self::new(iter::once((0, below)).chain((above.1 > 0).then_some(above)))
    }

    /// Returns the size of the guest's RAM, which is that of the memory file, in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        // Not a sum over the regions: readers call this for each page.
        self.regions.last().map_or(0, RamRange::offset_end)
    }

    /// Returns the regions, at least one, in ascending order of guest-physical address and offset.
    #[must_use]
    pub fn regions(&self) -> &[RamRange] {
        &self.regions
    }

    /// Returns the ranges of guest-physical addresses that are RAM, ascending. Adjacent regions are
    /// one range, so layouts with the same ranges have each byte at the same address.
    ///
    /// # Examples
    /// ```
    /// use page_reader::RamLayout;
    ///
    /// let split = RamLayout::new([(0, 4096), (4096, 4096)])?;
    /// assert!(split.addresses().eq(RamLayout::single(0, 8192)?.addresses()));
    /// assert!(split.addresses().ne(RamLayout::single(4096, 8192)?.addresses()));
    /// # Ok::<(), page_reader::LayoutError>(())
    /// ```
    pub fn addresses(&self) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let mut regions = self.regions.iter().peekable();
        iter::from_fn(move || {
            let first = regions.next()?;
            let mut end = first.guest_end();
            while let Some(next) = regions.next_if(|next| next.guest_start == end) {
                end = next.guest_end();
            }
            Some(first.guest_start..end)
        })
    }

    /// Returns the offset in the memory file of a guest-physical address, or `None` if it is not
    /// RAM.
    #[must_use]
    pub fn offset_of(&self, guest_address: u64) -> Option<u64> {
        let region = self.region_at(guest_address)?;
        Some(region.offset + (guest_address - region.guest_start))
    }

    /// Returns the guest-physical address of an offset in the memory file, or `None` past the end
    /// of the RAM.
    #[must_use]
    pub fn guest_address_of(&self, offset: u64) -> Option<u64> {
        let region = self.region_at_offset(offset)?;
        Some(region.guest_start + (offset - region.offset))
    }

    /// Splits `size` bytes at a guest-physical address into pieces, ascending, one for each region.
    ///
    /// An empty range at any address has no pieces.
    ///
    /// # Errors
    /// Returns [`OutsideRam::Guest`] if any byte of the range is in a gap or past the last region.
    pub fn guest_pieces(
        &self,
        guest_start: u64,
        size: u64,
    ) -> Result<impl Iterator<Item = RamRange> + use<'_>, OutsideRam> {
        let mut next = guest_start;
        let mut left = size;
        while left > 0 {
            let region = self.region_at(next).ok_or(OutsideRam::Guest {
                guest_start,
                size,
                outside: next,
            })?;
            left = left.saturating_sub(region.guest_end() - next);
            next = region.guest_end();
        }
        // Consecutive guest RAM is consecutive in the file, because regions are packed in order.
        let offset = self.offset_of(guest_start).unwrap_or(0);
        Ok(self.pieces(offset, size))
    }

    /// Splits `size` bytes at an offset in the memory file into pieces, ascending, one for each
    /// region.
    ///
    /// # Errors
    /// Returns [`OutsideRam::File`] if the range ends past [`ram_size`](Self::ram_size).
    pub fn offset_pieces(
        &self,
        offset: u64,
        size: u64,
    ) -> Result<impl Iterator<Item = RamRange> + use<'_>, OutsideRam> {
        let ram_size = self.ram_size();
        match offset.checked_add(size) {
            Some(end) if end <= ram_size => Ok(self.pieces(offset, size)),
            _ => Err(OutsideRam::File {
                offset,
                size,
                ram_size,
            }),
        }
    }

    /// Splits a range of the memory file into pieces. The range must be within it.
    pub(crate) fn pieces(
        &self,
        offset: u64,
        size: u64,
    ) -> impl Iterator<Item = RamRange> + use<'_> {
        let first = self.regions.partition_point(|r| r.offset_end() <= offset);
        let end = offset + size;
        self.regions[first..]
            .iter()
            .take_while(move |region| size > 0 && region.offset < end)
            .map(move |region| region.within(offset, end))
    }

    fn region_at(&self, guest_address: u64) -> Option<&RamRange> {
        let region = self
            .regions
            .partition_point(|r| r.guest_end() <= guest_address);
        self.regions
            .get(region)
            .filter(|region| region.guest_start <= guest_address)
    }

    fn region_at_offset(&self, offset: u64) -> Option<&RamRange> {
        self.regions
            .get(self.regions.partition_point(|r| r.offset_end() <= offset))
    }
}

/// Lists the [ranges of addresses](RamLayout::addresses) in hexadecimal.
impl fmt::Display for RamLayout {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (number, Range { start, end }) in self.addresses().enumerate() {
            let separator = if number > 0 { ", " } else { "" };
            write!(f, "{separator}{start:#x}..{end:#x}")?;
        }
        Ok(())
    }
}

impl RamRange {
    /// Returns the guest-physical address after the last byte.
    #[must_use]
    pub fn guest_end(&self) -> u64 {
        self.guest_start + self.size
    }

    /// Returns the offset in the memory file after the last byte.
    #[must_use]
    pub fn offset_end(&self) -> u64 {
        self.offset + self.size
    }

    /// Returns the part of the region inside the given range of offsets, which must overlap it.
    fn within(&self, offset: u64, end: u64) -> Self {
        let skip = offset.saturating_sub(self.offset);
        Self {
            region: self.region,
            guest_start: self.guest_start + skip,
            offset: self.offset + skip,
            size: end.min(self.offset_end()) - (self.offset + skip),
        }
    }
}

#[cfg(feature = "serde")]
mod serialized {
    //! The serialized form: regions only, so that offsets cannot contradict them.

    use super::{LayoutError, RamLayout};

    #[derive(serde::Serialize, serde::Deserialize)]
    pub(super) struct Region {
        guest_start: u64,
        size: u64,
    }

    impl From<RamLayout> for Vec<Region> {
        fn from(layout: RamLayout) -> Self {
            let region = |region: &super::RamRange| Region {
                guest_start: region.guest_start,
                size: region.size,
            };
            layout.regions.iter().map(region).collect()
        }
    }

    impl TryFrom<Vec<Region>> for RamLayout {
        type Error = LayoutError;

        fn try_from(regions: Vec<Region>) -> Result<Self, LayoutError> {
            Self::new(
                regions
                    .into_iter()
                    .map(|region| (region.guest_start, region.size)),
            )
        }
    }
}
