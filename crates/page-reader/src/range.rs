//! Range checks shared by the sources of known size.

use std::io;

/// The payload of the `UnexpectedEof` error of a read past the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{len} bytes at offset {offset} end past the {size} bytes of the source: check the RAM size or \
     layout"
)]
struct PastEnd {
    offset: u64,
    len: usize,
    size: u64,
}

/// Returns an error unless `len` bytes at `offset` are within a source of `size` bytes.
pub(crate) fn check(offset: u64, len: usize, size: u64) -> io::Result<()> {
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
pub(crate) fn available(offset: u64, len: usize, size: u64) -> Option<usize> {
    let rest = size.checked_sub(offset)?;
    let available = usize::try_from(rest).map_or(len, |rest| rest.min(len));
    (available > 0).then_some(available)
}
