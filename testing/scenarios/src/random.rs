//! Random numbers of the test programs.

use std::hash::{BuildHasher, Hasher, RandomState};

use crate::write_log::Fate;

/// A small generator (xorshift, Marsaglia 2003): the same numbers for the same seed.
pub struct Random(u64);

impl Random {
    /// Seeded by the system.
    #[expect(clippy::new_without_default, reason = "each is another one")]
    pub fn new() -> Self {
        Self::seeded(RandomState::new().build_hasher().finish())
    }

    /// One that always gives the same.
    pub fn seeded(seed: u64) -> Self {
        // Of neighbouring seeds, such as counts, the first numbers must not be alike; and zero
        // would stay zero.
        Self((seed ^ 0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9) | 1)
    }

    /// What becomes of a write of so many blocks that no flush has followed.
    pub fn fate(&mut self, blocks: u64) -> Fate {
        match self.below(4) {
            3 => Fate::Kept,
            2 => Fate::Torn(self.below(blocks)),
            _ => Fate::Dropped,
        }
    }

    /// A number below `end`.
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}
