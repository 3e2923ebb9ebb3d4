//! The message of a VMM: where the regions of its RAM are.

use std::ops::Range;

use serde::Deserialize;
use thiserror::Error;

use crate::region::host_page;
use crate::regions::{Region, Regions};

/// The most regions that a message may list. The RAM of a VMM consists of few.
const MAX_REGIONS: usize = 1024;
/// The largest page size. A page is in memory while it is filled.
const MAX_PAGE: u64 = 2 << 20;
/// The page size of a message without one.
const DEFAULT_PAGE: u64 = 4096;

/// The regions of a VMM's RAM, as its message lists them.
///
/// The message is that of Firecracker: a JSON array with a member for each region.
///
/// | member | meaning |
/// |---|---|
/// | `base_host_virt_addr` | the address of the region in the VMM |
/// | `size` | its size in bytes |
/// | `offset` | the offset in the RAM of its first byte |
/// | `page_size` | the page size in bytes; without it `page_size_kib`, also in bytes; else 4096 |
///
/// Other members are ignored. The regions cover all of the RAM once. All have the same page size:
/// that of the host, or 2 MiB at most for hugetlbfs.
///
/// # Examples
/// ```
/// use lazy_restore::VmRegions;
///
/// let message = br#"[{"base_host_virt_addr": 1400897536, "size": 131072, "offset": 0,
///     "page_size": 65536}]"#;
/// let regions = VmRegions::parse(message, 131072)?;
/// assert_eq!((regions.len(), regions.page_size()), (1, 65536));
/// assert!(VmRegions::parse(message, 262144).is_err()); // another guest's
/// # Ok::<(), lazy_restore::MessageError>(())
/// ```
#[derive(Clone, Debug)]
pub struct VmRegions {
    pub(crate) regions: Regions,
    page_size: u64,
}

#[derive(Debug, Deserialize)]
struct Listed {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: Option<u64>,
    page_size_kib: Option<u64>,
}

impl Listed {
    fn page_size(&self) -> u64 {
        let page_size = self.page_size.or(self.page_size_kib);
        page_size.unwrap_or(DEFAULT_PAGE)
    }
}

impl VmRegions {
    /// Returns the regions that a message lists, for RAM of `ram_size` bytes.
    ///
    /// # Errors
    /// Returns a [`MessageError`].
    pub fn parse(message: &[u8], ram_size: u64) -> Result<Self, MessageError> {
        let listed: Vec<Listed> = serde_json::from_slice(message).map_err(MessageError::Json)?;
        Self::check(&listed, ram_size)
    }

    /// Returns the size of a page in bytes.
    #[must_use]
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Returns the number of regions.
    #[must_use]
    #[expect(clippy::len_without_is_empty, reason = "there is always a region")]
    pub fn len(&self) -> usize {
        self.regions.iter().count()
    }

    /// Returns the address of each region and its range in the RAM, ascending by the latter.
    pub fn regions(&self) -> impl Iterator<Item = (u64, Range<u64>)> {
        let regions = self.regions.iter();
        regions.map(|region| (region.address, region.offset..region.offset + region.len))
    }

    fn check(listed: &[Listed], ram_size: u64) -> Result<Self, MessageError> {
        let page_size = match listed {
            [] => return Err(MessageError::NoRegions),
            [first, ..] => first.page_size(),
        };
        if listed.len() > MAX_REGIONS {
            return Err(MessageError::TooMany { most: MAX_REGIONS });
        }
        if !page_size.is_power_of_two() || !(host_page()..=MAX_PAGE).contains(&page_size) {
            return Err(MessageError::PageSize { page_size });
        }
        let mut regions = Vec::with_capacity(listed.len());
        for region in listed {
            let &Listed {
                base_host_virt_addr: address,
                size: len,
                offset,
                ..
            } = region;
            if region.page_size() != page_size {
                return Err(MessageError::PageSizes);
            }
            let numbers = [address, len, offset];
            let aligned = numbers
                .iter()
                .all(|number| number.is_multiple_of(page_size));
            if !aligned || len == 0 || address == 0 {
                return Err(MessageError::Unaligned { address, page_size });
            }
            let ends = (address.checked_add(len), offset.checked_add(len));
            let (Some(_), Some(_)) = ends else {
                return Err(MessageError::Overflow { address });
            };
            regions.push(Region {
                offset,
                address,
                len,
            });
        }
        check_apart(&regions)?;
        let regions = Regions::covering(regions, ram_size)?;
        Ok(Self { regions, page_size })
    }
}

/// Checks that no two regions have an address in common.
fn check_apart(regions: &[Region]) -> Result<(), MessageError> {
    let mut addresses: Vec<_> = regions.iter().map(Region::addresses).collect();
    addresses.sort_by_key(|range| range.start);
    match addresses
        .windows(2)
        .find(|pair| pair[1].start < pair[0].end)
    {
        None => Ok(()),
        Some(pair) => Err(MessageError::Overlap {
            address: pair[1].start,
        }),
    }
}

impl Regions {
    /// Orders regions by their offsets, which must cover the RAM once.
    fn covering(mut regions: Vec<Region>, ram_size: u64) -> Result<Self, MessageError> {
        regions.sort_by_key(|region| region.offset);
        let mut end = 0;
        for region in &regions {
            if region.offset != end {
                let offset = end.min(region.offset);
                return Err(MessageError::Offsets { offset });
            }
            end += region.len;
        }
        match end == ram_size {
            true => Ok(Self::ordered(regions)),
            false => Err(MessageError::Size {
                listed: end,
                ram_size,
            }),
        }
    }
}

/// A reason why the message of a VMM is refused.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MessageError {
    /// It is not a JSON array of regions.
    #[error("the message is not a list of memory regions in JSON, as Firecracker sends it: {0}")]
    Json(#[source] serde_json::Error),
    /// It lists no region.
    #[error("the message lists no memory region")]
    NoRegions,
    /// It lists too many regions.
    #[error("the message lists too many memory regions (at most {most})")]
    TooMany {
        /// The most regions that are accepted.
        most: usize,
    },
    /// A page size that is not supported.
    #[error(
        "pages of {page_size} bytes are not supported: use the page size of the host, or pages of \
         hugetlbfs of at most 2 MiB"
    )]
    PageSize {
        /// The page size in bytes.
        page_size: u64,
    },
    /// Regions have several page sizes.
    #[error("the memory regions have several page sizes: use one for all")]
    PageSizes,
    /// A region is empty, or does not consist of whole pages.
    #[error(
        "the memory region at {address:#x} is empty, or its address, size or offset is not a \
         multiple of its page size, {page_size}"
    )]
    Unaligned {
        /// The address of the region.
        address: u64,
        /// The page size in bytes.
        page_size: u64,
    },
    /// A region ends past the last address or offset.
    #[error("the memory region at {address:#x} ends past the last address or offset")]
    Overflow {
        /// The address of the region.
        address: u64,
    },
    /// Two regions have an address in common.
    #[error("two memory regions overlap at {address:#x}")]
    Overlap {
        /// The first address that both have.
        address: u64,
    },
    /// Two regions have an offset in common, or none has one.
    #[error("the offset {offset:#x} in the RAM is in two memory regions, or in none")]
    Offsets {
        /// The first such offset.
        offset: u64,
    },
    /// The regions are smaller or larger than the RAM.
    #[error(
        "the memory regions have {listed} bytes, and the image {ram_size}: serve the image that \
         belongs to the state that the VMM loads"
    )]
    Size {
        /// The number of bytes in the regions.
        listed: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// It is longer than any list of regions, or is sent in very many parts.
    #[error("the message is too long, or in too many parts: send a list of memory regions at once")]
    TooLong,
}

#[cfg(test)]
mod tests;
