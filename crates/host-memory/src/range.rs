//! Range checks of sources of known size.

use std::io;

/// The payload of the `UnexpectedEof` error of a read past the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a range of length {len} at offset {offset:#x} ends past the {size} bytes of the source: check \
     the RAM size or layout"
)]
#[non_exhaustive]
pub struct PastEnd {
    /// The offset of the read in bytes.
    pub offset: u64,
    /// The length of the read in bytes.
    pub len: usize,
    /// The size of the source in bytes.
    pub size: u64,
}

/// Checks that `len` bytes at `offset` are within a source of `size` bytes.
///
/// # Errors
/// Returns [`UnexpectedEof`](io::ErrorKind::UnexpectedEof) with [`PastEnd`] if they are not, also
/// if `offset` plus `len` overflows.
///
/// # Examples
/// ```
/// assert!(host_memory::check_range(4096, 4096, 8192).is_ok());
/// assert!(host_memory::check_range(u64::MAX, 1, 8192).is_err());
/// ```
pub fn check_range(offset: u64, len: usize, size: u64) -> io::Result<()> {
    match offset.checked_add(len as u64) {
        Some(end) if end <= size => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            PastEnd { offset, len, size },
        )),
    }
}

/// Returns how many of `len` bytes at `offset` a source of `size` bytes has, or `None` if it has
/// none.
///
/// # Examples
/// ```
/// assert_eq!(host_memory::available_len(4096, 100, 4100), Some(4));
/// assert_eq!(host_memory::available_len(4100, 100, 4100), None);
/// ```
#[must_use]
pub fn available_len(offset: u64, len: usize, size: u64) -> Option<usize> {
    let rest = size.checked_sub(offset)?;
    let available = usize::try_from(rest).map_or(len, |rest| rest.min(len));
    (available > 0).then_some(available)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::whole(0, 10, 10, true)]
    #[case::empty_at_the_end(10, 0, 10, true)]
    #[case::empty_past_the_end(11, 0, 10, false)]
    #[case::one_past_the_end(1, 10, 10, false)]
    #[case::overflow(u64::MAX, 2, u64::MAX, false)]
    fn a_range_within_the_size_is_accepted(
        #[case] offset: u64,
        #[case] len: usize,
        #[case] size: u64,
        #[case] inside: bool,
    ) {
        match check_range(offset, len, size) {
            Ok(()) => assert!(inside),
            Err(error) => {
                assert!(!inside, "{error}");
                assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
                let past: PastEnd = error.downcast().unwrap();
                assert_eq!(past, PastEnd { offset, len, size });
            }
        }
    }

    #[rstest]
    #[case::all(0, 5, 10, Some(5))]
    #[case::some(8, 5, 10, Some(2))]
    #[case::none_at_the_end(10, 5, 10, None)]
    #[case::none_past_the_end(u64::MAX, 5, 10, None)]
    #[case::none_of_no_bytes(0, 0, 10, None)]
    #[case::a_size_past_usize(0, usize::MAX, u64::MAX, Some(usize::MAX))]
    fn the_available_length_ends_at_the_size(
        #[case] offset: u64,
        #[case] len: usize,
        #[case] size: u64,
        #[case] expected: Option<usize>,
    ) {
        assert_eq!(available_len(offset, len, size), expected);
    }
}
