//! What a recycled stage still holds of the snapshot that it was, until it is written or wiped.

use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};

use page_reader::PageReader;
use sparse_file::{Source, SpaceError, WriteError, WriteOptions, punch_hole, write_runs};

use crate::page_set::PageSet;

#[derive(Debug)]
pub(crate) struct Unwritten {
    /// The pages that were written. The others have their old bytes.
    written: PageSet,
}

impl Unwritten {
    /// All the pages of a file of `ram_size` bytes.
    pub(crate) fn all(ram_size: u64, page_size: u64) -> Self {
        Self {
            written: PageSet::new(ram_size, page_size),
        }
    }

    /// A run of bytes, of whole pages, is being written.
    pub(crate) fn remove(&mut self, run: &Range<u64>) {
        self.written.add(run);
    }

    /// The runs of bytes that were not written, ascending, and as long as can be: a block that pages share is freed once none
    /// of them is written.
    fn runs(&self) -> impl Iterator<Item = Range<u64>> {
        self.written.missing()
    }

    /// Makes them the holes that they are in a new file, or zeros where the file system can't.
    pub(crate) fn wipe(&self, file: &File, options: &WriteOptions) -> Result<(), WipeError> {
        for run in self.runs() {
            match punch_hole(file, run.clone()) {
                Ok(()) => {}
                Err(SpaceError::Unsupported { .. }) => return self.zero(file, options),
                Err(SpaceError::Io { source, .. }) => return Err(WipeError::Punch(run, source)),
                Err(other) => return Err(WipeError::Punch(run, io::Error::other(other))),
            }
        }
        Ok(())
    }

    fn zero(&self, file: &File, options: &WriteOptions) -> Result<(), WipeError> {
        let go_on = &mut |_| ControlFlow::Continue(());
        write_runs(file, self.runs(), &Zeros, options, go_on).map_err(WipeError::Zero)?;
        Ok(())
    }
}

/// Why old bytes are still there.
pub(crate) enum WipeError {
    Punch(Range<u64>, io::Error),
    Zero(WriteError),
}

/// Zeros, wherever.
pub(crate) struct Zeros;

impl Source for Zeros {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

impl PageReader for Zeros {
    fn read_at(&self, _: u64, buf: &mut [u8]) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn what_is_wiped_is_zeros_whatever_the_buffer_held() {
        let mut buf = [7; 9];
        Source::read_at(&Zeros, 3, &mut buf).unwrap();
        assert_eq!(buf, [0; 9]);
    }

    #[rstest]
    #[case::nothing_written(&[], &[0..65536])]
    #[case::all_written(&[0..65536], &[])]
    #[case::ends(&[0..4096, 61440..65536], &[4096..61440])]
    #[case::middle_in_any_order(&[8192..12288, 4096..8192, 4096..8192], &[0..4096, 12288..65536])]
    #[case::every_other(&[0..4096, 8192..12288, 16384..65536], &[4096..8192, 12288..16384])]
    fn what_is_not_written_is_left(#[case] written: &[Range<u64>], #[case] left: &[Range<u64>]) {
        let mut unwritten = Unwritten::all(65536, 4096);
        written.iter().for_each(|run| unwritten.remove(run));
        assert_eq!(unwritten.runs().collect::<Vec<_>>(), left);
    }
}
