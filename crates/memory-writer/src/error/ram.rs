//! Errors of the size of the RAM.

use image_format::RAW_UNIT;
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
        "the RAM size {ram_size} exceeds the maximum of 2^52 bytes: pass the guest's RAM size as \
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
        "the page size {page_size} is larger than the RAM of {ram_size} bytes: {}",
        advice(*ram_size)
    )]
    PageLargerThanRam {
        /// The requested page size in bytes.
        page_size: u64,
        /// The size of the RAM in bytes.
        ram_size: u64,
    },
    /// `ram_size` is not a multiple of `page_size`.
    #[error(
        "the RAM size {ram_size} is not a multiple of the page size {page_size}: {}",
        advice(*ram_size)
    )]
    NotWholePages {
        /// The requested size in bytes.
        ram_size: u64,
        /// The requested page size in bytes.
        page_size: u64,
    },
}

/// Returns what to do about RAM of `ram_size` bytes that is not a multiple of the page size. The
/// largest page that it is a multiple of may be below the minimum: no page size would do.
fn advice(ram_size: u64) -> String {
    match ram_size & ram_size.wrapping_neg() {
        largest if largest >= RAW_UNIT => format!("pass a page size of at most {largest}"),
        _ => format!("pass the guest's RAM size, which is a multiple of {RAW_UNIT}"),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::smaller_page(3 << 12, 1 << 14, "at most 4096")]
    #[case::smallest_page(512, 4096, "at most 512")]
    #[case::no_page((1 << 20) + 1, 4096, "the guest's RAM size")]
    #[case::no_page_either((1 << 20) + 256, 4096, "the guest's RAM size")]
    fn a_smaller_page_is_advised_only_if_one_would_do(
        #[case] ram_size: u64,
        #[case] page_size: u64,
        #[case] advice: &str,
    ) {
        let not_whole = RamError::NotWholePages {
            ram_size,
            page_size,
        };
        let too_large = RamError::PageLargerThanRam {
            page_size,
            ram_size,
        };
        for error in [not_whole, too_large] {
            let text = error.to_string();
            assert!(text.contains(advice), "{text}");
        }
    }
}
