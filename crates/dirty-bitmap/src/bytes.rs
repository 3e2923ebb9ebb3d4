//! The encoding of a bitmap as bytes.

use thiserror::Error;

use crate::bitmap::DirtyBitmap;
use crate::geometry::{GeometryError, RamRange};
use crate::marks::Marks;

/// The first bytes of an encoded bitmap. The last one is the version.
const MAGIC: [u8; 8] = *b"DIRTYBM\x01";
const HEADER_LEN: usize = 40;
const WORD_LEN: usize = size_of::<u64>();

impl<K> DirtyBitmap<K> {
    /// Returns the geometry and the marks as bytes, for [`from_bytes`](DirtyBitmap::from_bytes).
    ///
    /// The bitmap keeps its marks. Marks that are set during the call may be missed. The epochs of
    /// the bitmap are not encoded; an open one holds marks that are not in the bitmap. The
    /// [parent](Self::parent) is not encoded either.
    ///
    /// # Format
    /// All numbers are little-endian words of 64 bits.
    ///
    /// | offset | contents |
    /// |---|---|
    /// | 0 | the bytes `DIRTYBM` and the version of the format, 1 |
    /// | 8 | [`ram_start`](Self::ram_start) |
    /// | 16 | [`ram_size`](Self::ram_size) in bytes |
    /// | 24 | [`page_size`](Self::page_size) in bytes |
    /// | 32 | [`granule`](Self::granule) in bytes |
    /// | 40 | words of marks: bit `i` of word `w` is the mark of granule `64 * w + i` |
    ///
    /// There are as many words as the RAM needs. The other bits of the last word are clear. There
    /// is no checksum: store the bytes where damage is detected.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let generation = self.marks.lock();
        let shift = generation.shift();
        let table = self.marks.table(shift);
        let words = words_of(self.marks.ram.pages(shift));
        let mut bytes = vec![0; HEADER_LEN + words as usize * WORD_LEN];
        let (header, marks) = bytes.split_at_mut(HEADER_LEN);
        header[..MAGIC.len()].copy_from_slice(&MAGIC);
        let fields = [
            self.ram_start(),
            self.ram_size(),
            self.page_size(),
            1 << shift,
        ];
        for (place, field) in header[MAGIC.len()..].chunks_exact_mut(WORD_LEN).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        for word in table.marked_words(0) {
            let place = &mut marks[word * WORD_LEN..][..WORD_LEN];
            place.copy_from_slice(&table.word(word).to_le_bytes());
        }
        bytes
    }
}

impl DirtyBitmap {
    /// Creates a bitmap from the bytes that [`to_bytes`](Self::to_bytes) returned.
    ///
    /// A mark is added to a bitmap that exists, of any kind, by [`mark_all`](Self::mark_all).
    ///
    /// # Errors
    /// Returns [`DecodeError`] for any other bytes. The length of the marks is checked before
    /// memory is allocated, and the bitmap takes about as much memory as the bytes: nothing for
    /// pages that are smaller than the granule, until the bitmap is [rebuilt](Self::rebuild) for
    /// them.
    ///
    /// # Examples
    /// ```
    /// use dirty_bitmap::DirtyBitmap;
    ///
    /// let bitmap = DirtyBitmap::new(0x4000_0000, 1 << 20, 4096)?;
    /// bitmap.mark(0x4000_5000)?;
    /// let copy = DirtyBitmap::from_bytes(&bitmap.to_bytes())?;
    /// assert!(copy.runs().eq([0x5000..0x6000]));
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, DecodeError> {
        let version = MAGIC.len() - 1;
        if !bytes.starts_with(&MAGIC[..version]) {
            return Err(DecodeError::NotABitmap);
        }
        if let Some(found) = bytes.get(version).copied()
            && found != MAGIC[version]
        {
            return Err(DecodeError::Version { found });
        }
        let Some((header, marks)) = bytes.split_at_checked(HEADER_LEN) else {
            let expected = HEADER_LEN as u64;
            return Err(length(expected, bytes.len()));
        };
        let field = |at: usize| word_at(header, at);
        let (ram_start, ram_size, page_size, granule) = (field(1), field(2), field(3), field(4));
        let ram = RamRange::new(ram_start, ram_size, page_size)?;
        let shift = ram.shift_of(granule)?;
        let granules = ram.pages(shift);
        // Check before memory is allocated.
        let expected = HEADER_LEN as u64 + words_of(granules) * WORD_LEN as u64;
        if bytes.len() as u64 != expected {
            return Err(length(expected, bytes.len()));
        }
        let unused = granules.wrapping_neg() % u64::from(u64::BITS);
        let last = word_at(marks, marks.len() / WORD_LEN - 1);
        if last.leading_zeros() < unused as u32 {
            return Err(DecodeError::MarkOutsideRam);
        }
        let page_shift = ram.shift_of(page_size)?;
        let bitmap = Self::over(Marks::clean_in_granules(ram, page_shift, shift)?);
        let table = bitmap.marks.table(shift);
        for word in 0..marks.len() / WORD_LEN {
            let bits = word_at(marks, word);
            if bits != 0 {
                table.mark_word(word, bits);
            }
        }
        Ok(bitmap)
    }
}

/// Returns the number of words that hold `bits` bits.
fn words_of(bits: u64) -> u64 {
    bits.div_ceil(u64::from(u64::BITS))
}

/// Returns the word with this index.
fn word_at(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; WORD_LEN];
    word.copy_from_slice(&bytes[index * WORD_LEN..][..WORD_LEN]);
    u64::from_le_bytes(word)
}

fn length(expected: u64, found: usize) -> DecodeError {
    let found = found as u64;
    DecodeError::Length { expected, found }
}

/// An error for bytes that are not an encoded bitmap.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum DecodeError {
    /// The bytes begin otherwise than an encoded bitmap.
    #[error("the bytes are not an encoded bitmap: pass the bytes that to_bytes returned")]
    NotABitmap,
    /// The format has another version.
    #[error("the format of the encoded bitmap has version {found}, and this crate reads version 1")]
    Version {
        /// The version of the bytes.
        found: u8,
    },
    /// The bytes end too early or too late.
    #[error("the encoded bitmap has length {found} instead of {expected}: it is damaged")]
    Length {
        /// The expected number of bytes.
        expected: u64,
        /// The number of bytes passed in.
        found: u64,
    },
    /// A bit is set for a granule after the end of the RAM.
    #[error("the encoded bitmap marks pages after the end of its RAM: it is damaged")]
    MarkOutsideRam,
    /// The geometry is invalid, or memory for the bitmap can't be allocated.
    #[error("failed to make the encoded bitmap: {0}")]
    Geometry(#[from] GeometryError),
}
