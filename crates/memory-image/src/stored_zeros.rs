//! Finds the pages of zeros that the images of a chain store.

use std::ops::Range;

use page_reader::{HostMemory, PageReader, SecretBuffer};

use crate::chain::Chain;
use crate::error::MergeError;

/// Bytes read at a time.
const CHUNK: u64 = 1 << 20;
/// Minimum length of zeros to take out of a stored run. Shorter ones would cost more in the list of
/// runs and in extents of the file than they save. Full images have the same minimum.
const MIN_ZEROS: u64 = 32 << 10;

/// The stored runs of a chain, divided into those that hold zeros alone and all others.
#[derive(Debug, Default)]
pub(crate) struct StoredZeros {
    pub(crate) zeros: Vec<Range<u64>>,
    pub(crate) data: Vec<Range<u64>>,
}

impl StoredZeros {
    /// Reads all stored runs of `chain`, and looks for zeros in pages of `page_size` bytes, which
    /// divides the page size of the chain. `report` is called with the number of bytes that were
    /// examined, and may end the search.
    pub(crate) fn find(
        chain: &Chain,
        page_size: u64,
        mut report: impl FnMut(u64) -> Result<(), MergeError>,
    ) -> Result<Self, MergeError> {
        let mut found = Self::default();
        let mut buffer = SecretBuffer::new();
        let chunk = CHUNK.max(page_size);
        let mut examined = 0;
        for run in chain.stored_runs() {
            // The bytes from `data` up to `zeros` are data, those from there up to `at` are zeros.
            let (mut data, mut zeros, mut at) = (run.start, run.start, run.start);
            while at < run.end {
                report(examined)?;
                let end = run.end.min((at / chunk + 1).saturating_mul(chunk));
                let bytes = buffer.sized((end - at) as usize);
                // Bytes that cannot be read count as data: the write reports the error.
                let is_read = chain.read_at(at, bytes).is_ok();
                examined += end - at;
                for page in bytes.chunks(page_size as usize) {
                    let page_end = at + page.len() as u64;
                    if !(is_read && HostMemory::from(page).is_zero()) {
                        data = found.divide(&run, data, zeros..at);
                        zeros = page_end;
                    }
                    at = page_end;
                }
            }
            let left = found.divide(&run, data, zeros..at)..at;
            if !left.is_empty() {
                found.data.push(left);
            }
        }
        Ok(found)
    }

    /// Takes `zeros` out of `run` if they are long enough, or all of it. Returns where the data
    /// that is not listed yet begins, which was `data` before.
    fn divide(&mut self, run: &Range<u64>, data: u64, zeros: Range<u64>) -> u64 {
        if zeros.end - zeros.start < MIN_ZEROS && zeros != *run {
            return data;
        }
        if data < zeros.start {
            self.data.push(data..zeros.start);
        }
        let end = zeros.end;
        self.zeros.push(zeros);
        end
    }
}
