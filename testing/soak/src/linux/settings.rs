//! What all guests share.

use std::path::PathBuf;

use clap::ValueEnum;
use guests::kind::Kind;
use harness::interrupt::Interrupt;
use random::Random;

use super::plan::Means;
use super::stats::Tally;

/// A deliberately broken save.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Mutant {
    /// A save forgets one of its marks
    MarkDropped,
    /// A byte of an image changes once it is committed
    PageFlipped,
    /// The marks of a save are released, and then it fails
    ReleasedEarly,
    /// A file stays open when a guest is gone
    FileKept,
    /// The RAM of a live snapshot is copied after the pause
    LateCopy,
    /// RAM is served without the newest image of its chain
    LayerMissing,
}

/// What all guests share.
pub(super) struct Settings {
    pub seed: u64,
    pub dir: PathBuf,
    pub kinds: Vec<Kind>,
    pub means: Means,
    /// What other processes run.
    pub program: Option<PathBuf>,
    pub mutant: Option<Mutant>,
    pub tally: Tally,
    pub interrupt: Interrupt,
}

impl Settings {
    /// Numbers for what has this number.
    pub(super) fn random(&self, of: &[u64]) -> Random {
        let mixed = of.iter().fold(self.seed, |mixed, number| {
            (mixed.rotate_left(23) ^ (number + 1)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
        });
        Random::seeded(mixed)
    }
}
