//! Marks that a hypervisor kept: a dirty log as KVM's `KVM_GET_DIRTY_LOG` gives it.

use thiserror::Error;

use crate::bitmap::DirtyBitmap;
use crate::geometry::OutOfRange;
use crate::kind::Markable;

impl<K: Markable> DirtyBitmap<K> {
    /// Adds a dirty log that begins at the guest-physical `address`: bit `i` of little-endian word `w` stands for the page of `page_size` bytes
    /// at `address + (64 * w + i) * page_size`. The log's page size is independent of this bitmap's. Returns how many pages the log reports.
    ///
    /// The words are taken as they lie in memory after `KVM_GET_DIRTY_LOG` (Linux `Documentation/virt/kvm/api.rst` 4.8); on a
    /// little-endian host they are plain numbers. Clear bits may reach past the RAM's end: KVM pads its logs.
    ///
    /// # Errors
    /// [`DirtyLogError`]. Every page inside the RAM has been marked all the same, unless the page size made no sense.
    ///
    /// # Examples
    /// ```
    /// let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 16384)?;
    /// let log = [0b1_0001u64.to_le(), 0, 0, 0];
    /// assert_eq!(bitmap.mark_log(0, 4096, &log)?, 2);
    /// assert_eq!(bitmap.runs().collect::<Vec<_>>(), [0..32768]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn mark_log(
        &self,
        address: u64,
        page_size: u64,
        words: &[u64],
    ) -> Result<u64, DirtyLogError> {
        if !page_size.is_power_of_two() {
            return Err(DirtyLogError::PageSizeNotPowerOfTwo { page_size });
        }
        let mut pages = 0;
        let mut outside = None;
        for (word, bits) in words.iter().enumerate() {
            let mut bits = u64::from_le(*bits);
            pages += u64::from(bits.count_ones());
            while bits != 0 {
                let first = bits.trailing_zeros();
                let count = (bits >> first).trailing_ones();
                bits &= !(u64::MAX >> (u64::BITS - count) << first);
                // Past the last address, every run is outside the RAM: saturated, it stays there.
                let first = word as u64 * 64 + u64::from(first);
                let start = address.saturating_add(first.saturating_mul(page_size));
                let marked = self.set_range(start, u64::from(count).saturating_mul(page_size));
                outside = outside.or(marked.err());
            }
        }
        outside.map_or(Ok(pages), |source| Err(DirtyLogError::OutOfRange(source)))
    }
}

/// A dirty log that does not fit the bitmap.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// The log's page size is 0 or not a power of two. Nothing was marked.
    #[error("a dirty log in pages of {page_size} bytes: the page size must be a power of two")]
    PageSizeNotPowerOfTwo {
        /// The page size given, in bytes.
        page_size: u64,
    },
    /// The log reports a page outside the tracked RAM; the first such run is named. Every page inside was marked.
    #[error(
        "the dirty log reports pages outside the RAM: its slot and the bitmap cover different addresses"
    )]
    OutOfRange(#[source] OutOfRange),
}
