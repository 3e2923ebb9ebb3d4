//! Pages of zeros, which a full image does not store.

use std::ops::Range;

use host_memory::SecretBuffer;
use page_reader::{MIN_ZEROS, is_zeros};

use super::reading::Held;
use super::{Capture, Failure};
use crate::page_states::PageState;

/// The number of bytes of a page that are looked at before the page is claimed. Most pages that are
/// not zeros differ here.
const HEAD: usize = 64;

impl Capture {
    /// Frees pages of `run` that are zeros in the image, and returns their runs in ascending order.
    /// `run` is [needed](Self::needed). Pages in the pool count as other bytes.
    ///
    /// Protected RAM that the guest has never touched looks swapped out to the kernel, so only its
    /// bytes show that it is zeros.
    pub(crate) fn free_zeros(&self, run: Range<u64>, buffer: &mut SecretBuffer) -> Vec<Range<u64>> {
        let block = MIN_ZEROS.max(self.page_size);
        let mut zeros: Vec<Range<u64>> = Vec::new();
        let mut at = run.start.next_multiple_of(block);
        while at + block <= run.end {
            // After an error the block counts as other bytes, and its read returns the error.
            if let Ok(true) = self.free_block(at, buffer.sized(block as usize)) {
                match zeros.last_mut() {
                    Some(last) if last.end == at => last.end = at + block,
                    _ => zeros.push(at..at + block),
                }
            }
            at += block;
        }
        zeros
    }

    /// Frees the pages of a block if they are zeros.
    fn free_block(&self, offset: u64, buf: &mut [u8]) -> Result<bool, Failure> {
        let end = offset + buf.len() as u64;
        for page in (offset..end).step_by(self.page_size as usize) {
            let head = &mut buf[..HEAD.min(self.page_size as usize)];
            let read = self.memory.copy(page, head);
            read.map_err(|error| Failure::memory(page, error))?;
            if !is_zeros(head) {
                return Ok(false);
            }
        }
        // The bytes may be newer than the image unless the pages are held.
        let mut held = Held {
            capture: self,
            pages: 0..0,
        };
        for page in offset / self.page_size..end / self.page_size {
            let claimed = self
                .states
                .change(page, PageState::Pending, PageState::Copying);
            match claimed {
                Ok(()) => held.add(page),
                Err(_) => return Ok(false),
            }
        }
        self.copy_protected(offset, buf)?;
        let zeros = is_zeros(buf);
        if zeros {
            self.end_copies(std::mem::take(&mut held.pages), |_| PageState::Free);
        }
        Ok(zeros)
    }
}
