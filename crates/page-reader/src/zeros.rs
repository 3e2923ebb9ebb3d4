//! Zeros in RAM: what counts as zeros, and how many of them an image leaves out.

use std::io;
use std::ops::Range;

use host_memory::SecretBuffer;

use crate::reader::PageReader;

/// The minimum number of bytes of zeros that images do not store beside other bytes.
///
/// Shorter ones are stored with the bytes around them: another run in the list of an image, and
/// another extent of its file, take longer and may take more space.
pub const MIN_ZEROS: u64 = 32 << 10;

/// Bytes that are combined before they are compared.
const BLOCK: usize = 1024;
/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;

/// Returns whether all bytes are zeros, at the speed of memory.
///
/// [`HostMemory::is_zero`](host_memory::HostMemory::is_zero) examines memory that vCPUs may write.
///
/// # Examples
/// ```
/// let mut page = vec![0; 4096];
/// assert!(page_reader::is_zeros(&page));
/// page[4095] = 1;
/// assert!(!page_reader::is_zeros(&page));
/// ```
#[must_use]
pub fn is_zeros(bytes: &[u8]) -> bool {
    // Without a branch for each byte, so that the compiler uses vectors.
    let any = |block: &[u8]| block.iter().fold(0, |any, byte| any | byte);
    bytes.chunks(BLOCK).all(|block| any(block) == 0)
}

/// Returns whether `range` of the RAM is zeros. Reads it through `buffer`, up to the first piece of
/// 1 MiB that is not.
///
/// # Errors
/// Returns the error of the reader.
pub fn reads_as_zeros<R: PageReader + ?Sized>(
    reader: &R,
    range: Range<u64>,
    buffer: &mut SecretBuffer,
) -> io::Result<bool> {
    for start in range.clone().step_by(CHUNK as usize) {
        let end = range.end.min(start.saturating_add(CHUNK));
        let bytes = buffer.sized((end - start) as usize);
        reader.read_at(start, bytes)?;
        if !is_zeros(bytes) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Runs of pages that are divided into those that an image records as zeros, and all others.
///
/// Zeros beside other bytes of their run are recorded as zeros from [`MIN_ZEROS`] on, and a run of
/// zeros alone in any length.
///
/// # Examples
/// ```
/// use page_reader::ZeroRuns;
///
/// let mut ram = vec![0; 1 << 20];
/// ram[4096] = 7;
/// let runs = [0..65536, 131072..135168].into_iter();
/// let found = ZeroRuns::find(&ram, runs, 4096, |_| Ok::<(), std::io::Error>(()))?;
/// assert_eq!(found.zeros(), [8192..65536, 131072..135168]);
/// assert_eq!(found.data(), [0..8192]);
/// # Ok::<(), std::io::Error>(())
/// ```
#[derive(Clone, Debug, Default)]
pub struct ZeroRuns {
    zeros: Vec<Range<u64>>,
    data: Vec<Range<u64>>,
}

impl ZeroRuns {
    /// Reads `runs`, which ascend and consist of pages of `page_size` bytes. `report` is called
    /// with the number of bytes that were examined, and may end the search. Bytes that cannot be
    /// read count as data: the write reports the error.
    ///
    /// # Errors
    /// Returns the error of `report`.
    pub fn find<R: PageReader + ?Sized, E>(
        reader: &R,
        runs: impl Iterator<Item = Range<u64>>,
        page_size: u64,
        mut report: impl FnMut(u64) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut found = Self::default();
        let mut buffer = SecretBuffer::new();
        let chunk = CHUNK.max(page_size);
        let mut examined = 0;
        for run in runs {
            let (mut at, mut divided) = (run.start, Division::of(&run));
            while at < run.end {
                report(examined)?;
                let end = run.end.min((at / chunk + 1).saturating_mul(chunk));
                let bytes = buffer.sized((end - at) as usize);
                let is_read = reader.read_at(at, bytes).is_ok();
                examined += end - at;
                for page in bytes.chunks(page_size as usize) {
                    let page_end = at + page.len() as u64;
                    if !(is_read && is_zeros(page)) {
                        found.add_data(&mut divided, at..page_end);
                    }
                    at = page_end;
                }
            }
            found.end(divided);
        }
        Ok(found)
    }

    /// Divides `runs` by what is known about them: `data_in` returns the parts of a run that are
    /// not zeros, ascending.
    pub fn known<I: Iterator<Item = Range<u64>>>(
        runs: impl Iterator<Item = Range<u64>>,
        data_in: impl Fn(Range<u64>) -> I,
    ) -> Self {
        let mut found = Self::default();
        for run in runs {
            let mut divided = Division::of(&run);
            data_in(run).for_each(|data| found.add_data(&mut divided, data));
            found.end(divided);
        }
        found
    }

    /// Returns the runs of zeros, ascending.
    #[must_use]
    pub fn zeros(&self) -> &[Range<u64>] {
        &self.zeros
    }

    /// Returns all other runs, ascending.
    #[must_use]
    pub fn data(&self) -> &[Range<u64>] {
        &self.data
    }

    /// Adds bytes of a run that are not zeros, after those that were added before.
    fn add_data(&mut self, divided: &mut Division, data: Range<u64>) {
        self.divide(divided, data.start);
        divided.zeros = data.end;
    }

    fn end(&mut self, mut divided: Division) {
        let end = divided.run.end;
        self.divide(&mut divided, end);
        if divided.data < end {
            self.data.push(divided.data..end);
        }
    }

    /// Takes the zeros up to `end` out of the run if they are long enough, or all of it.
    fn divide(&mut self, divided: &mut Division, end: u64) {
        let zeros = divided.zeros..end;
        if zeros.is_empty() || (end - zeros.start < MIN_ZEROS && zeros != divided.run) {
            return;
        }
        if divided.data < zeros.start {
            self.data.push(divided.data..zeros.start);
        }
        divided.data = end;
        self.zeros.push(zeros);
    }
}

/// A run while it is divided.
struct Division {
    run: Range<u64>,
    /// Where the data that is not listed yet begins.
    data: u64,
    /// Where the zeros begin that are not listed yet.
    zeros: u64,
}

impl Division {
    fn of(run: &Range<u64>) -> Self {
        Self {
            run: run.clone(),
            data: run.start,
            zeros: run.start,
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const KIB: u64 = 1 << 10;

    #[test]
    fn any_byte_that_is_not_zero_is_found() {
        for len in (0..10).chain(BLOCK - 2..BLOCK + 2).chain([4096]) {
            let mut bytes = vec![0; len];
            assert!(is_zeros(&bytes), "{len}");
            for at in [0, len / 2, len.saturating_sub(1)] {
                if let Some(byte) = bytes.get_mut(at) {
                    *byte = 0x80;
                    assert!(!is_zeros(&bytes), "{at} of {len}");
                    bytes[at] = 0;
                }
            }
        }
    }

    /// Runs of pages of 4 KiB, and the numbers of the KiB that are not zeros.
    #[rstest]
    #[case::zeros_alone(&[0..4], &[], &[0..4], &[])]
    #[case::data_alone(&[0..8], &[0, 4], &[], &[0..8])]
    #[case::zeros_of_32_kib(&[0..36], &[0], &[4..36], &[0..4])]
    #[case::zeros_that_are_too_short(&[0..32], &[0], &[], &[0..32])]
    #[case::zeros_between(&[0..48], &[3, 40], &[4..40], &[0..4, 40..48])]
    #[case::several_runs(&[0..40, 100..104], &[36], &[0..36, 100..104], &[36..40])]
    #[case::over_a_mebibyte(&[1000..1100], &[1050], &[1000..1048, 1052..1100], &[1048..1052])]
    fn runs_are_divided(
        #[case] runs: &[Range<u64>],
        #[case] nonzero: &[u64],
        #[case] zeros: &[Range<u64>],
        #[case] data: &[Range<u64>],
    ) {
        let bytes = |runs: &[Range<u64>]| -> Vec<Range<u64>> {
            let runs = runs.iter();
            runs.map(|run| run.start * KIB..run.end * KIB).collect()
        };
        let mut ram = vec![0; 2 << 20];
        nonzero
            .iter()
            .for_each(|at| ram[(at * KIB) as usize + 1] = 1);
        let page = |at: &u64| at / 4 * 4 * KIB..(at / 4 + 1) * 4 * KIB;
        let is_in = |page: &Range<u64>, run: &Range<u64>| run.contains(&page.start);
        let read = ZeroRuns::find(&ram, bytes(runs).into_iter(), 4 * KIB, |_| Ok::<(), ()>(()));
        let known = ZeroRuns::known(bytes(runs).into_iter(), |run| {
            let pages = nonzero.iter().map(page);
            pages.filter(move |page| is_in(page, &run))
        });
        for found in [read.unwrap(), known] {
            assert_eq!(found.zeros(), bytes(zeros));
            assert_eq!(found.data(), bytes(data));
        }
    }

    #[test]
    fn zeros_are_read_up_to_the_first_other_piece() {
        let mut ram = vec![0; 3 << 20];
        let mut buffer = SecretBuffer::new();
        assert!(reads_as_zeros(&ram, 0..3 << 20, &mut buffer).unwrap());
        ram[(2 << 20) - 1] = 1;
        assert!(!reads_as_zeros(&ram, 0..3 << 20, &mut buffer).unwrap());
        assert!(reads_as_zeros(&ram, 2 << 20..3 << 20, &mut buffer).unwrap());
        assert!(reads_as_zeros(&ram, 0..4 << 20, &mut buffer).is_ok());
        ram.truncate((1 << 20) + 1);
        assert!(reads_as_zeros(&ram, 0..3 << 20, &mut buffer).is_err());
    }
}
