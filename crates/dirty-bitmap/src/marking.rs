//! Marking: by address, range, page, words, and the marks of another bitmap.

use crate::bitmap::DirtyBitmap;
use crate::dirty_log::DirtyLogError;
use crate::geometry::{OutOfRange, RangeMismatch};
use crate::kind::Markable;
use crate::ranges::runs_of_word;

impl<K: Markable> DirtyBitmap<K> {
    /// Marks the page that holds `address`, in the address space of the bitmap. Returns whether its
    /// granule was clean.
    ///
    /// The bitmap of RAM with gaps, such as that of a `GuestRam`, starts at 0 and takes offsets in
    /// the memory file.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] if `address` is outside the RAM. Nothing was marked.
    #[inline]
    pub fn mark(&self, address: u64) -> Result<bool, OutOfRange> {
        self.marks.mark_address(address)
    }

    /// Marks the page with this index. Returns whether any part of it was clean.
    ///
    /// The index counts pages of [`page_size`](Self::page_size) from the start of the RAM. It does
    /// not depend on the granule.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] if the page is outside the RAM. Nothing was marked.
    pub fn mark_page(&self, index: u64) -> Result<bool, OutOfRange> {
        let page_size = self.page_size();
        let start = index
            .checked_mul(page_size)
            .filter(|start| *start < self.marks.ram.size);
        let Some(start) = start else {
            let start = self
                .marks
                .ram
                .start
                .saturating_add(index.saturating_mul(page_size));
            return Err(self
                .marks
                .ram
                .out_of_range(start, start.saturating_add(page_size)));
        };
        Ok(self
            .marks
            .mark_offsets(start..self.marks.ram.size.min(start + page_size)))
    }

    /// Marks every page that overlaps the `len` bytes from `address` on, in the address space of
    /// the bitmap (see [`mark`](Self::mark)). Returns whether any of them was clean.
    ///
    /// A length of 0 marks no page.
    ///
    /// # Errors
    /// Returns [`OutOfRange`] if any byte lies outside the RAM. The pages inside are marked
    /// nevertheless.
    pub fn mark_range(&self, address: u64, len: u64) -> Result<bool, OutOfRange> {
        let (offsets, inside) = self.marks.ram.clip(address, len);
        let was_clean = !offsets.is_empty() && self.marks.mark_offsets(offsets);
        inside.map(|()| was_clean)
    }

    /// Marks the pages whose bits are set. Returns the number of set bits.
    ///
    /// Bit `i` of word `w` stands for the page of `page_size` bytes with the index `64 * w + i`,
    /// counted from the start of the RAM. The page size is independent of that of the bitmap. The
    /// words are plain integers, as [`to_words`](Self::to_words) returns them; for the words of a
    /// hypervisor, see [`mark_dirty_log`](Self::mark_dirty_log). The last page ends where the RAM
    /// ends. Clear bits may reach past it.
    ///
    /// # Errors
    /// Returns [`DirtyLogError`]. Every page inside the RAM is marked nevertheless, unless the page
    /// size is invalid.
    ///
    /// # Examples
    /// ```
    /// let bitmap = dirty_bitmap::DirtyBitmap::new(0x8000_0000, 1 << 20, 16384)?;
    /// assert_eq!(bitmap.mark_words(4096, &[0b1_0001])?, 2);
    /// assert_eq!(bitmap.to_words()[..], [0b11]);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn mark_words(&self, page_size: u64, words: &[u64]) -> Result<u64, DirtyLogError> {
        let ram_end = self.ram_start() + self.ram_size();
        let words = words.iter().copied();
        self.mark_words_at(self.ram_start(), page_size, words, |start, len| {
            let past_the_end = start.saturating_add(len).saturating_sub(ram_end);
            // The last page may be cut off, but a page after it is outside the RAM.
            match past_the_end < page_size {
                true => len - past_the_end,
                false => len,
            }
        })
    }

    /// Marks the pages whose bits are set in words that begin at `address`. `cut_off`
    /// returns the length to mark of the pages at an address with a length.
    pub(crate) fn mark_words_at(
        &self,
        address: u64,
        page_size: u64,
        words: impl Iterator<Item = u64>,
        cut_off: impl Fn(u64, u64) -> u64,
    ) -> Result<u64, DirtyLogError> {
        if !page_size.is_power_of_two() {
            return Err(DirtyLogError::PageSizeNotPowerOfTwo { page_size });
        }
        let mut pages = 0;
        let mut outside = None;
        for (word, bits) in (0_u64..).zip(words) {
            for run in runs_of_word(bits) {
                let count = run.end - run.start;
                pages += count;
                // A run past the last address is outside the RAM, and saturation keeps it there.
                let first = word * 64 + run.start;
                let start = address.saturating_add(first.saturating_mul(page_size));
                let len = count.saturating_mul(page_size);
                let marked = self.mark_range(start, cut_off(start, len));
                outside = outside.or(marked.err());
            }
        }
        outside.map_or(Ok(pages), |source| Err(DirtyLogError::OutOfRange(source)))
    }

    /// Marks every page that is marked in `other`, which keeps its marks and may have any granule
    /// and [kind](Self#kinds).
    ///
    /// A mark that is set in `other` during the call may be missed. It stays in `other`.
    ///
    /// # Errors
    /// Returns [`RangeMismatch`] if `other` covers other addresses. Nothing was marked.
    ///
    /// # Examples
    /// ```
    /// use dirty_bitmap::DirtyBitmap;
    ///
    /// let (a, b) = (DirtyBitmap::new(0, 1 << 20, 4096)?, DirtyBitmap::new(0, 1 << 20, 4096)?);
    /// a.mark(0)?;
    /// b.mark(0x5000)?;
    /// a.mark_all(&b)?; // the union of both
    /// assert!(a.runs().eq([0..0x1000, 0x5000..0x6000]));
    /// assert!(b.is_dirty(0x5000)?);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn mark_all<L>(&self, other: &DirtyBitmap<L>) -> Result<(), RangeMismatch> {
        self.marks.ram.check_same(other.marks.ram)?;
        self.marks.add(&other.marks);
        Ok(())
    }
}
