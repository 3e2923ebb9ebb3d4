//! What a verification finds.

use std::fmt;
use std::ops::Range;

/// The result of [`Image::verify`](crate::Image::verify).
///
/// Damage is part of the result, not an error. The compiler warns if the result is unused:
/// ```compile_fail
/// #![deny(unused_must_use)]
/// use std::ops::ControlFlow;
///
/// fn verify(image: &memory_image::Image) -> Result<(), memory_image::VerifyError> {
///     image.verify(&mut |_| ControlFlow::Continue(()))?;
///     Ok(())
/// }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[must_use = "a damaged image is not an error: call `is_ok`"]
pub struct VerifyReport {
    /// Bytes of pages that were checksummed.
    pub bytes: u64,
    /// Chunks that were checksummed.
    pub chunks: u64,
    /// The damaged places, ascending by offset in the file: at most the first thousand found.
    pub damage: Vec<Damage>,
    /// The number of damaged places found.
    pub damage_count: u64,
}

impl VerifyReport {
    /// Returns whether no damage was found.
    #[must_use]
    pub fn is_ok(&self) -> bool {
        self.damage_count == 0
    }
}

/// Bytes that differ from the bytes that were written.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Damage {
    /// The present pages of a chunk do not match its checksum.
    Chunk {
        /// The number of the chunk.
        number: u64,
        /// The guest offsets that it covers, in bytes.
        guest: Range<u64>,
        /// The offset of its first present byte in the file.
        offset: u64,
    },
    /// Nonzero bytes where nothing was written: between pages, or before the first one. Restoring
    /// does not read them. Mapping the file as it is would expose them.
    NotZero {
        /// The offset in the file of the first byte.
        offset: u64,
    },
    /// Bytes that the system could not read.
    Unreadable {
        /// The number of the chunk and the guest offsets that it covers. `None` for bytes between
        /// pages.
        chunk: Option<(u64, Range<u64>)>,
        /// The offset in the file of the read that failed.
        offset: u64,
        /// The error of the system.
        reason: String,
    },
}

impl Damage {
    /// Returns its offset in the file, in bytes.
    #[must_use]
    pub fn offset(&self) -> u64 {
        match self {
            Self::Chunk { offset, .. }
            | Self::NotZero { offset }
            | Self::Unreadable { offset, .. } => *offset,
        }
    }
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chunk {
                number,
                guest,
                offset,
            } => write!(
                f,
                "the checksum of chunk {number} does not match its pages: {:#x}..{:#x} of the RAM, \
                 from {offset:#x} of the file on",
                guest.start, guest.end
            ),
            Self::Unreadable {
                chunk: Some((number, guest)),
                offset,
                reason,
            } => write!(
                f,
                "chunk {number} cannot be read: {:#x}..{:#x} of the RAM, from {offset:#x} of the file \
                 on: {reason}",
                guest.start, guest.end
            ),
            Self::Unreadable {
                chunk: None,
                offset,
                reason,
            } => write!(f, "the file cannot be read from {offset:#x} on: {reason}"),
            Self::NotZero { offset } => write!(
                f,
                "the byte at {offset:#x} of the file is not zero, although no page is there"
            ),
        }
    }
}

/// Displays the number of damaged places, and the first one.
impl fmt::Display for VerifyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { bytes, chunks, .. } = self;
        match (self.damage_count, self.damage.first()) {
            (0, _) | (_, None) => write!(f, "no damage (bytes: {bytes}, chunks: {chunks})"),
            (1, Some(first)) => write!(f, "1 damaged place: {first}"),
            (count, Some(first)) => write!(f, "{count} damaged places, the first: {first}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_names_the_first_damaged_place() {
        let mut report = VerifyReport {
            bytes: 8192,
            chunks: 2,
            ..VerifyReport::default()
        };
        assert_eq!(report.to_string(), "no damage (bytes: 8192, chunks: 2)");
        report.damage = vec![
            Damage::Chunk {
                number: 1,
                guest: 0x10_0000..0x20_0000,
                offset: 0x1000,
            },
            Damage::NotZero { offset: 0x300 },
        ];
        report.damage_count = 2;
        let [text, second] = [report.to_string(), report.damage[1].to_string()];
        for part in [
            "2 damaged places",
            "chunk 1 ",
            "0x100000..0x200000",
            " 0x1000 ",
        ] {
            assert!(text.contains(part), "{text}");
        }
        assert!(second.contains("0x300"), "{second}");
    }
}
