//! Makes ranges of a file read as zeros, with or without holes.

use std::fs::File;
use std::io;
use std::iter;
use std::ops::{ControlFlow, Range};

use crate::space::{SpaceError, punch_hole};
use crate::write::{RunSource, WriteError, WriteOptions, write_runs};

/// An error of zeroing ranges. Ranges before the failed one read as zeros.
#[derive(Debug, thiserror::Error)]
pub enum ZeroError {
    /// A hole could not be punched, although the file system supports it.
    #[error(transparent)]
    Punch(#[from] SpaceError),
    /// Zeros could not be written. The file system does not support holes.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// Makes `range` read as zeros: punches a hole, or writes zeros where the file system cannot punch
/// one. The length of the file does not change.
///
/// The part of the range past the end of the file is ignored.
///
/// # Errors
/// Returns a [`ZeroError`]: an invalid range, or a failure of the file system. The range may then
/// consist of old bytes and zeros.
///
/// # Examples
/// ```
/// use sparse_file::{WriteOptions, zero_range};
/// use std::os::unix::fs::FileExt;
///
/// let file = tempfile::tempfile()?;
/// file.write_all_at(&[1; 8192], 0)?;
/// zero_range(&file, 100..8000, &WriteOptions::new())?;
/// let mut bytes = [1; 8192];
/// file.read_exact_at(&mut bytes, 0)?;
/// assert!(bytes[100..8000] == [0; 7900] && bytes[99] == 1);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn zero_range(file: &File, range: Range<u64>, options: &WriteOptions) -> Result<(), ZeroError> {
    zero_ranges(file, iter::once(range), options)
}

/// Makes each of `ranges` read as zeros, like [`zero_range`].
///
/// From the first range where no hole can be punched, all ranges are written with one call of
/// [`write_runs`], with the given options.
///
/// # Errors
/// Returns the errors of [`zero_range`].
pub fn zero_ranges(
    file: &File,
    ranges: impl IntoIterator<Item = Range<u64>>,
    options: &WriteOptions,
) -> Result<(), ZeroError> {
    zero_ranges_with(punch_hole, file, ranges, options)
}

fn zero_ranges_with(
    mut punch: impl FnMut(&File, Range<u64>) -> Result<(), SpaceError>,
    file: &File,
    ranges: impl IntoIterator<Item = Range<u64>>,
    options: &WriteOptions,
) -> Result<(), ZeroError> {
    let mut ranges = ranges.into_iter();
    while let Some(range) = ranges.next() {
        match punch(file, range.clone()) {
            Err(SpaceError::Unsupported { .. }) => {
                return write_zeros(file, iter::once(range).chain(ranges), options);
            }
            punched => punched?,
        }
    }
    Ok(())
}

fn write_zeros(
    file: &File,
    ranges: impl Iterator<Item = Range<u64>>,
    options: &WriteOptions,
) -> Result<(), ZeroError> {
    let len = file.metadata().map_err(|source| SpaceError::Io {
        operation: "determine the length of the file",
        range: 0..0,
        source,
    })?;
    let len = len.len();
    // `write_runs` refuses an invalid range.
    let inside = ranges.map(|range| {
        let is_valid = range.start <= range.end && libc::off_t::try_from(range.end).is_ok();
        match is_valid {
            true => range.start.min(len)..range.end.min(len),
            false => range,
        }
    });
    write_runs(file, inside, &Zeros, options, &mut |_| {
        ControlFlow::Continue(())
    })?;
    Ok(())
}

/// A source of zeros at every offset.
struct Zeros;

impl RunSource for Zeros {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use rstest::rstest;

    use super::*;

    /// Returns a punching function that is unsupported after `supported` calls.
    fn punch_only(mut supported: usize) -> impl FnMut(&File, Range<u64>) -> Result<(), SpaceError> {
        move |file, range| match supported.checked_sub(1) {
            Some(left) => {
                supported = left;
                punch_hole(file, range)
            }
            None => Err(SpaceError::Unsupported {
                operation: "punch a hole",
            }),
        }
    }

    #[rstest]
    #[case::by_holes(usize::MAX)]
    #[case::by_writes(0)]
    #[case::by_both(1)]
    fn exactly_the_ranges_are_zeros_and_the_length_stays(#[case] supported: usize) {
        const LEN: usize = 3 << 20;
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&vec![1; LEN], 0).unwrap();
        let ranges = [7..4097, 8192..2 << 20, LEN as u64 - 5..u64::MAX >> 1];
        let options = WriteOptions::new();
        zero_ranges_with(punch_only(supported), &file, ranges.clone(), &options).unwrap();
        assert_eq!(file.metadata().unwrap().len(), LEN as u64);
        let mut bytes = vec![2; LEN];
        file.read_exact_at(&mut bytes, 0).unwrap();
        for (at, byte) in bytes.into_iter().enumerate() {
            let zeroed = ranges.iter().any(|range| range.contains(&(at as u64)));
            assert_eq!(byte, u8::from(!zeroed), "{at}");
        }
    }

    #[rstest]
    #[case::by_holes(usize::MAX)]
    #[case::by_writes(0)]
    fn an_invalid_range_is_refused(#[case] supported: usize) {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 8192], 0).unwrap();
        let invalid = Range {
            start: 4096,
            end: 0,
        };
        let options = WriteOptions::new();
        let zeroed = zero_ranges_with(punch_only(supported), &file, [invalid], &options);
        assert!(zeroed.is_err());
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes == [1; 8192]);
    }

    #[test]
    fn a_failure_to_punch_is_not_replaced_by_writes() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1; 4096], 0).unwrap();
        let fail = |_: &File, range| {
            Err(SpaceError::Io {
                operation: "punch a hole",
                range,
                source: io::Error::from_raw_os_error(libc::EIO),
            })
        };
        let error = zero_ranges_with(fail, &file, [0..4096], &WriteOptions::new()).unwrap_err();
        assert!(matches!(error, ZeroError::Punch(SpaceError::Io { .. })));
        let mut byte = [0];
        file.read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [1]);
    }
}
