//! What a run of the comparison found, as data.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A part of the comparison, which runs by itself and has a page of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Dumps, diffs, images, chains and bitmaps.
    Writing,
    /// Live snapshots of a KVM guest.
    Live,
    /// The page server.
    Serving,
}

impl Part {
    /// Every part, in the order in which they run.
    pub const ALL: [Self; 3] = [Self::Writing, Self::Live, Self::Serving];

    /// The name of the part on the command line.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Writing => "writing",
            Self::Live => "live",
            Self::Serving => "serving",
        }
    }
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Part {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|part| part.name() == name);
        found.ok_or_else(|| format!("the parts are {}", Self::ALL.map(Self::name).join(", ")))
    }
}

/// One call of the comparison.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Processor, kernel, and where was written to.
    pub machine: Vec<(String, String)>,
    /// How often each contender ran.
    pub rounds: usize,
    /// What was compared.
    pub cases: Vec<Case>,
    /// Other figures: name, value, and the limit it is to keep, if any.
    pub figures: Vec<(String, String, String)>,
}

/// One thing that several contenders did, by turns.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// What they did.
    pub name: String,
    /// The group of its chart.
    pub group: String,
    /// Bytes that reached the file, where it is about bytes.
    pub bytes: u64,
    /// The contenders, ours first.
    pub contenders: Vec<Contender>,
    /// At least this many times as fast as the contender of that name.
    pub goals: Vec<(String, f64)>,
}

/// What one of them needed.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Contender {
    /// Who.
    pub name: String,
    /// Seconds of each round.
    pub seconds: Vec<f64>,
}

impl Contender {
    /// The median of the rounds.
    #[must_use]
    pub fn median(&self) -> f64 {
        let mut sorted = self.seconds.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        match sorted.len() {
            0 => f64::NAN,
            len => sorted[len / 2],
        }
    }
}

impl Case {
    /// As many times as fast as the contender `name` ours is, if that ran: by the medians.
    #[must_use]
    pub fn ratio(&self, name: &str) -> Option<f64> {
        let ours = self.contenders.first()?;
        let other = self.contenders.iter().find(|other| other.name == name)?;
        Some(other.median() / ours.median())
    }
}
