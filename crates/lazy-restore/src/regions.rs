//! The regions of a guest's RAM: their places in the memory file and in an address space.

use std::ops::Range;

/// The regions of a guest's RAM in the order of the memory file, which they cover without gaps.
#[derive(Clone, Debug)]
pub(crate) struct Regions(Vec<Region>);

/// A region's place in the memory file and in the address space.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Region {
    /// Offset in the memory file.
    pub(crate) offset: u64,
    pub(crate) address: u64,
    pub(crate) len: u64,
}

impl Region {
    /// Returns the addresses of the region.
    pub(crate) fn addresses(&self) -> Range<u64> {
        self.address..self.address.saturating_add(self.len)
    }
}

impl Regions {
    /// Returns the regions with these addresses and lengths, one after the other.
    pub(crate) fn concatenated(regions: impl IntoIterator<Item = (u64, u64)>) -> Self {
        let mut offset = 0;
        let regions = regions.into_iter().map(|(address, len)| {
            offset += len;
            Region {
                offset: offset - len,
                address,
                len,
            }
        });
        Self(regions.collect())
    }

    /// Returns regions that are ordered by their offsets.
    pub(crate) fn ordered(regions: Vec<Region>) -> Self {
        Self(regions)
    }

    /// Returns the number of bytes of all regions.
    pub(crate) fn len(&self) -> u64 {
        self.0.iter().map(|region| region.len).sum()
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Region> {
        self.0.iter()
    }

    /// Returns the parts of a range of the memory file, region by region: the address and the range
    /// of each part.
    pub(crate) fn parts(&self, range: Range<u64>) -> impl Iterator<Item = (u64, Range<u64>)> {
        self.0.iter().filter_map(move |region| {
            let start = range.start.max(region.offset);
            let end = range.end.min(region.offset + region.len);
            (start < end).then(|| (region.address + (start - region.offset), start..end))
        })
    }

    /// Returns the ranges of the memory file at these addresses.
    pub(crate) fn at(&self, addresses: Range<u64>) -> impl Iterator<Item = Range<u64>> {
        self.0.iter().filter_map(move |region| {
            let start = addresses.start.max(region.address) - region.address;
            let end = addresses.end.min(region.address + region.len);
            let end = end.saturating_sub(region.address);
            (start < end).then(|| region.offset + start..region.offset + end)
        })
    }

    /// Returns the offset in the memory file of an address.
    pub(crate) fn offset_of(&self, address: u64) -> Option<u64> {
        self.0.iter().find_map(|region| {
            let offset = address.checked_sub(region.address)?;
            (offset < region.len).then_some(region.offset + offset)
        })
    }
}
