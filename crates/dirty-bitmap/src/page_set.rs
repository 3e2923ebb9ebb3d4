//! Conversion between marks and bit vectors, for set algebra.

use bitvec::order::Lsb0;
use bitvec::slice::BitSlice;
use bitvec::vec::BitVec;

use crate::bitmap::DirtyBitmap;
use crate::geometry::GeometryError;
use crate::kind::Markable;

/// A copy of the marks of a bitmap.
///
/// Bit `i` stands for the granule at byte offset `i * granule` from the start of the RAM.
///
/// # Examples
/// The pages that two saves have in common:
/// ```
/// use dirty_bitmap::DirtyBitmap;
///
/// let (a, b) = (DirtyBitmap::new(0, 1 << 20, 4096)?, DirtyBitmap::new(0, 1 << 20, 4096)?);
/// a.set_range(0x1000, 0x4000)?;
/// b.set_range(0x3000, 0x4000)?;
/// let both = a.page_set().bits & b.page_set().bits;
/// assert_eq!(both.iter_ones().collect::<Vec<_>>(), [3, 4]);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct PageSet {
    /// The size of the page that a bit stands for, in bytes.
    pub granule: u64,
    /// One bit for each granule of the RAM. The last granule ends where the RAM ends.
    pub bits: BitVec<u64, Lsb0>,
}

impl<K> DirtyBitmap<K> {
    /// Returns a copy of the marks, in the current granule. The bitmap keeps its marks.
    #[must_use]
    pub fn page_set(&self) -> PageSet {
        let generation = self.marks.lock();
        let shift = generation.shift();
        // It fits a usize, because the table has as many bits in memory.
        let granules = self.ram_size().div_ceil(1 << shift) as usize;
        let mut words = vec![0; granules.div_ceil(64)];
        let table = self.marks.table(shift);
        for word in table.marked_words(0) {
            words[word] = table.word(word);
        }
        let mut bits = BitVec::from_vec(words);
        bits.truncate(granules);
        PageSet {
            granule: 1 << shift,
            bits,
        }
    }
}

impl<K: Markable> DirtyBitmap<K> {
    /// Marks every granule of `granule` bytes whose bit is set. Bits past the last granule of the
    /// RAM must be clear.
    ///
    /// # Errors
    /// Returns [`PageSetError`]. Nothing was marked.
    pub fn mark_bits(&self, granule: u64, bits: &BitSlice<u64, Lsb0>) -> Result<(), PageSetError> {
        if !granule.is_power_of_two() {
            return Err(GeometryError::PageSizeNotPowerOfTwo { page_size: granule }.into());
        }
        let granules = self.ram_size().div_ceil(granule);
        if let Some(last) = bits.last_one().filter(|last| *last as u64 >= granules) {
            return Err(PageSetError::OutOfRange {
                index: last as u64,
                granules,
            });
        }
        let mut rest = bits;
        let mut done = 0;
        while let Some(first) = rest.first_one() {
            let len = rest[first..].leading_ones();
            let start = (done + first) as u64 * granule;
            let end = ((done + first + len) as u64)
                .saturating_mul(granule)
                .min(self.ram_size());
            self.marks.mark_offsets(start..end);
            done += first + len;
            rest = &rest[first + len..];
        }
        Ok(())
    }
}

/// An error for bits that don't fit the bitmap.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum PageSetError {
    /// The granule is 0 or not a power of two.
    #[error(transparent)]
    Geometry(#[from] GeometryError),
    /// A set bit stands for a granule past the end of the RAM.
    #[error(
        "bit {index} is set, but the RAM has {granules} granules: pass a set made for RAM of this \
         size and for this granule"
    )]
    OutOfRange {
        /// The index of the last set bit.
        index: u64,
        /// The number of granules of that size in the RAM.
        granules: u64,
    },
}
