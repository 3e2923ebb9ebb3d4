//! Where each guest-physical range of RAM lies in the memory file.

const GIB: u64 = 1 << 30;

/// The guest's RAM: guest-physical ranges with gaps between them, and their places in the memory file.
///
/// The file holds RAM only. Its regions follow one another in ascending guest-physical order, without gaps, whatever
/// order they're given in: this is the order in which monitors with several memory slots dump them.
///
/// ```text
/// guest-physical   0 ........ 3 GiB   (MMIO gap)   4 GiB ........ 6 GiB
///                  |  region 0  |                  |   region 1    |
/// memory file      0 ........ 3 GiB ........................... 5 GiB
/// ```
///
/// Two regions may touch: they stay two, as two memory slots do, and a guest range may run across them.
///
/// With the feature `serde` a layout is serialised as the sequence of its `{ guest_start, size }`, in bytes, and
/// validated when it comes back.
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
    serde(try_from = "Vec<serialised::Region>", into = "Vec<serialised::Region>")
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

/// Why guest-physical ranges are no RAM layout. Ranges are given as start and size, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LayoutError {
    /// There is no region.
    #[error("the guest has no RAM region: give at least one")]
    NoRegion,
    /// A region has no byte.
    #[error("the RAM region at {guest_start:#x} is empty: leave it out, or give its size in bytes")]
    EmptyRegion {
        /// Its guest-physical start.
        guest_start: u64,
    },
    /// A region doesn't start or end at a multiple of [`RamLayout::ALIGNMENT`].
    #[error(
        "the RAM region at {guest_start:#x} of {size:#x} bytes doesn't start and end at a multiple of 4096 bytes: \
         memory slots are made of whole pages"
    )]
    Misaligned {
        /// Its guest-physical start.
        guest_start: u64,
        /// Its size.
        size: u64,
    },
    /// A region's end is no 64-bit address.
    #[error(
        "the RAM region at {guest_start:#x} of {size:#x} bytes ends past the 64-bit guest-physical address space"
    )]
    PastAddressSpace {
        /// Its guest-physical start.
        guest_start: u64,
        /// Its size.
        size: u64,
    },
    /// Two regions share an address.
    #[error(
        "the RAM region at {guest_start:#x} starts before the one at {previous_start:#x} ends ({previous_end:#x}): \
         a guest-physical address belongs to one region"
    )]
    Overlap {
        /// The guest-physical start of the lower region.
        previous_start: u64,
        /// The first guest-physical address after it.
        previous_end: u64,
        /// The start of the other.
        guest_start: u64,
    },
    /// All regions together don't fit in a file: offsets are signed 64-bit numbers.
    #[error("the RAM regions add up to 2^63 bytes or more, past what a file can hold")]
    TooLarge,
}

/// A range isn't RAM, or not all of it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OutsideRam {
    /// A guest-physical range touches an address that no region has.
    #[error(
        "{size:#x} bytes at guest-physical address {guest_start:#x}: there is no RAM at {outside:#x}"
    )]
    Guest {
        /// The start of the range asked for.
        guest_start: u64,
        /// Its size in bytes.
        size: u64,
        /// The lowest address of the range that isn't RAM.
        outside: u64,
    },
    /// A range of the memory file ends past the RAM.
    #[error(
        "{size:#x} bytes at offset {offset:#x} reach past the {ram_size:#x} bytes of RAM in the memory file"
    )]
    File {
        /// The start of the range asked for.
        offset: u64,
        /// Its size in bytes.
        size: u64,
        /// What the file holds, in bytes.
        ram_size: u64,
    },
}

impl RamLayout {
    /// What the start and size of every region are multiples of, in bytes: 4 KiB.
    ///
    /// The smallest page in which KVM takes memory slots on x86 and arm64 (and smaller than Apple Silicon's 16 KiB), so
    /// that no page belongs to two regions. A monitor whose pages are larger has regions that are multiples of them.
    pub const ALIGNMENT: u64 = 4096;

    /// The layout of RAM regions given as (guest-physical start, size in bytes), in any order.
    ///
    /// # Errors
    /// No region, an empty one, one that isn't [aligned](Self::ALIGNMENT), two that overlap, one that ends past
    /// 2<sup>64</sup> - 1, or 2<sup>63</sup> bytes and more in all.
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
            // Disjoint regions below 2^64 can't add up to more, so this can't wrap.
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

    /// The layout of one region: a guest without an MMIO gap in its RAM, such as most arm64 ones (QEMU's `virt` has
    /// its RAM at 1 GiB, Firecracker at 2 GiB).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn single(guest_start: u64, size: u64) -> Result<Self, LayoutError> {
        Self::new([(guest_start, size)])
    }

    /// The layout of an x86 guest: RAM from 0 up to 3 GiB, and what doesn't fit there from 4 GiB on.
    ///
    /// The gap of 1 GiB holds 32-bit MMIO (PCI, I/O APIC, local APIC). Firecracker and Cloud Hypervisor place it so;
    /// where it starts lower, as with some of QEMU's machines, or a second gap lies higher, as in Firecracker from
    /// 256 GiB on, use [`new`](Self::new).
    ///
    /// # Errors
    /// As [`new`](Self::new).
    pub fn x86_with_gap(ram_size: u64) -> Result<Self, LayoutError> {
        let below = ram_size.min(3 * GIB);
        let above = (4 * GIB, ram_size - below);
        Self::new(std::iter::once((0, below)).chain((above.1 > 0).then_some(above)))
    }

    /// The size of the guest's RAM, and so of the memory file, in bytes.
    #[must_use]
    pub fn ram_size(&self) -> u64 {
        // Not a sum over the regions: readers ask for it once a page.
        self.regions.last().map_or(0, RamRange::offset_end)
    }

    /// The regions, at least one, in ascending order of guest-physical address and of offset.
    #[must_use]
    pub fn regions(&self) -> &[RamRange] {
        &self.regions
    }

    /// The offset in the memory file of a guest-physical address, or `None` where that isn't RAM.
    #[must_use]
    pub fn offset_of(&self, guest_address: u64) -> Option<u64> {
        let region = self.region_at(guest_address)?;
        Some(region.offset + (guest_address - region.guest_start))
    }

    /// The guest-physical address of an offset in the memory file, or `None` past the RAM's end.
    #[must_use]
    pub fn guest_address_of(&self, offset: u64) -> Option<u64> {
        let region = self.region_at_offset(offset)?;
        Some(region.guest_start + (offset - region.offset))
    }

    /// The pieces, in ascending order, of `size` bytes of guest-physical memory: one for each region they touch.
    ///
    /// No bytes are no pieces, at any address.
    ///
    /// # Errors
    /// [`OutsideRam::Guest`] where any byte of the range isn't RAM, be it in a gap or past the last region.
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
        // Consecutive guest RAM is consecutive in the file, since regions are packed in order.
        let offset = self.offset_of(guest_start).unwrap_or(0);
        Ok(self.pieces(offset, size))
    }

    /// The pieces, in ascending order, of `size` bytes of the memory file from `offset` on: one for each region they
    /// touch.
    ///
    /// # Errors
    /// [`OutsideRam::File`] where the range ends past [`ram_size`](Self::ram_size).
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

    /// The pieces of a range of the memory file that is known to be in it.
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

impl RamRange {
    /// The guest-physical address after the last byte.
    #[must_use]
    pub fn guest_end(&self) -> u64 {
        self.guest_start + self.size
    }

    /// The offset in the memory file after the last byte.
    #[must_use]
    pub fn offset_end(&self) -> u64 {
        self.offset + self.size
    }

    /// The part of it inside the range of offsets that overlaps it.
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
mod serialised {
    //! What a layout is on the wire: regions only, so that offsets can't contradict them.

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
