//! Import of a hypervisor's dirty log, in the format of KVM's `KVM_GET_DIRTY_LOG`.

use thiserror::Error;

use crate::bitmap::DirtyBitmap;
use crate::geometry::OutOfRange;
use crate::kind::Markable;

impl<K: Markable> DirtyBitmap<K> {
    /// Marks the pages in a dirty log that begins at `address`, an address of the bitmap. Returns
    /// the number of pages in the log.
    ///
    /// A bitmap of RAM with several regions covers the memory file, without the gaps between the
    /// regions. The log of such a region begins at [`ram_start`](Self::ram_start) and the offset of
    /// the region in the memory file, not at the guest-physical address of the region.
    ///
    /// Bit `i` of little-endian word `w` stands for the page of `page_size` bytes at
    /// `address + (64 * w + i) * page_size`. The page size of the log is independent of that of the
    /// bitmap.
    ///
    /// The words have the byte order that `KVM_GET_DIRTY_LOG` leaves in memory (Linux
    /// `Documentation/virt/kvm/api.rst` 4.8). On a little-endian host they are plain integers.
    /// Clear bits may reach past the end of the RAM, because KVM pads its logs.
    ///
    /// <div class="warning">
    ///
    /// Your devices' writes are not in KVM's log, which has only those of the vCPUs. Pages that the
    /// VMM writes through its own mapping must be marked too, or they are missing from the next
    /// diff: by [`mark_range`](Self::mark_range) after each write, or for the guest memory of the
    /// `vm-memory` crate by `DirtyBitmapSlice` or `mark_guest_memory` (feature `vm-memory`).
    ///
    /// </div>
    ///
    /// # Errors
    /// Returns [`DirtyLogError`]. Every page inside the RAM is marked nevertheless, unless the page
    /// size is invalid.
    ///
    /// # Examples
    /// ```
    /// let bitmap = dirty_bitmap::DirtyBitmap::new(0, 1 << 20, 16384)?;
    /// let log = [0b1_0001u64.to_le(), 0, 0, 0];
    /// assert_eq!(bitmap.mark_dirty_log(0, 4096, &log)?, 2);
    /// assert_eq!(bitmap.runs().collect::<Vec<_>>(), [0..32768]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn mark_dirty_log(
        &self,
        address: u64,
        page_size: u64,
        words: &[u64],
    ) -> Result<u64, DirtyLogError> {
        let words = words.iter().map(|word| u64::from_le(*word));
        self.mark_words_at(address, page_size, words, |_, len| len)
    }
}

/// An error for words of bits, or a dirty log, that do not fit the bitmap.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DirtyLogError {
    /// The page size of the words is 0 or not a power of two. Nothing was marked.
    #[error("the page size of the words, {page_size}, is not a power of two: pass one that is")]
    PageSizeNotPowerOfTwo {
        /// The page size passed in, in bytes.
        page_size: u64,
    },
    /// A bit is set for a page outside the RAM. The source has the first run of such pages. Every
    /// page inside was marked.
    #[error(
        "bits are set for pages outside the RAM of the bitmap: pass the page size of the words, the \
         address of their first bit (of a dirty log: of its memory slot), and a bitmap that covers \
         the pages: {0}"
    )]
    OutOfRange(#[source] OutOfRange),
}
