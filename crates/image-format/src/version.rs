//! Versions and limits of the format.

/// A version of the format.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Version {
    /// Packed images have no header, and a file may have any length. If the length is a multiple of
    /// 512, the file cannot be distinguished from raw RAM to which a guest wrote a footer, and
    /// [`Footer::read`](crate::Footer::read) refuses it.
    V1,
    /// Packed images start with a header. The length of a file is never a multiple of 512.
    #[default]
    V2,
}

impl Version {
    /// The version in which images are written.
    pub const CURRENT: Self = Self::V2;

    pub(crate) fn to_wire(self) -> u32 {
        match self {
            Self::V1 => 1,
            Self::V2 => 2,
        }
    }

    pub(crate) fn from_wire(number: u32) -> Option<Self> {
        match number {
            1 => Some(Self::V1),
            2 => Some(Self::V2),
            _ => None,
        }
    }

    /// Returns the smallest page size in bytes. In version 2 it makes the length of raw RAM a
    /// multiple of [`RAW_UNIT`].
    pub(crate) fn min_page_size(self) -> u64 {
        match self {
            Self::V1 => 1,
            Self::V2 => RAW_UNIT,
        }
    }
}

/// The unit of the length of raw RAM in bytes: 512, the smallest page size.
///
/// The length of raw RAM is a multiple of this unit. The length of a sealed or packed image of
/// version 2 never is.
pub const RAW_UNIT: u64 = 512;

/// The largest RAM size of an image: 4 PiB, the limit of the 52-bit physical addresses of x86-64
/// and Armv8.2-A.
pub const MAX_RAM_SIZE: u64 = 1 << 52;

/// The minimum length of a packed image's header in bytes.
pub(crate) const MIN_HEADER: u64 = 4096;
