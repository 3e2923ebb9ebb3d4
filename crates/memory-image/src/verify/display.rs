//! Texts of damage.

use std::fmt;

use super::{Damage, VerifyReport};

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
