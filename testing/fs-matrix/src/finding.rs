//! What a check says, and how it travels from where the checks run to where the table is made: one
//! line of JSON each.

use std::fmt;
use std::io::{self, Write};
use std::time::Duration;

use anyhow::Context;
use harness::process::Process;
use serde::{Deserialize, Serialize};

/// What became of one property on one mount.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Verdict {
    /// As it should be.
    Holds,
    /// Could not be tried here, for the reason given as seen.
    NotRun,
    /// The file system just lacks this; what the library does about it is right.
    Differs,
    /// A promise of the library fails.
    Broken,
}

impl Verdict {
    pub(crate) fn mark(self) -> &'static str {
        match self {
            Self::Holds => "✓",
            Self::NotRun => "–",
            Self::Differs => "≠",
            Self::Broken => "✗",
        }
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Holds => "holds",
            Self::NotRun => "not run",
            Self::Differs => "differs",
            Self::Broken => "broken",
        })
    }
}

/// The columns of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Family {
    Bytes,
    Space,
    Atomicity,
    Durability,
    Faults,
    Power,
}

impl Family {
    pub(crate) const ALL: [Self; 6] = [
        Self::Bytes,
        Self::Space,
        Self::Atomicity,
        Self::Durability,
        Self::Faults,
        Self::Power,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Bytes => "bytes",
            Self::Space => "space",
            Self::Atomicity => "atomicity",
            Self::Durability => "durability",
            Self::Faults => "faults",
            Self::Power => "power loss",
        }
    }
}

/// What one check was to find, and found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub expected: String,
    pub seen: String,
    pub verdict: Verdict,
}

impl Outcome {
    fn new(verdict: Verdict, expected: impl Into<String>, seen: impl Into<String>) -> Self {
        Self {
            expected: expected.into(),
            seen: seen.into(),
            verdict,
        }
    }

    pub(crate) fn holds(expected: impl Into<String>, seen: impl Into<String>) -> Self {
        Self::new(Verdict::Holds, expected, seen)
    }

    pub(crate) fn differs(expected: impl Into<String>, seen: impl Into<String>) -> Self {
        Self::new(Verdict::Differs, expected, seen)
    }

    pub(crate) fn broken(expected: impl Into<String>, seen: impl Into<String>) -> Self {
        Self::new(Verdict::Broken, expected, seen)
    }

    pub(crate) fn not_run(why: impl Into<String>) -> Self {
        Self::new(Verdict::NotRun, "", why)
    }

    /// Holds if `right`, and is broken if not.
    pub(crate) fn promise(
        right: bool,
        expected: impl Into<String>,
        seen: impl Into<String>,
    ) -> Self {
        let verdict = if right {
            Verdict::Holds
        } else {
            Verdict::Broken
        };
        Self::new(verdict, expected, seen)
    }

    /// Holds if `has`; if not, the file system just lacks it.
    pub(crate) fn property(
        has: bool,
        expected: impl Into<String>,
        seen: impl Into<String>,
    ) -> Self {
        let verdict = if has {
            Verdict::Holds
        } else {
            Verdict::Differs
        };
        Self::new(verdict, expected, seen)
    }
}

/// An [`Outcome`] with the name of its check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Finding {
    pub family: Family,
    pub check: String,
    pub expected: String,
    pub seen: String,
    pub verdict: Verdict,
    pub milliseconds: u64,
}

/// One line from where the checks run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Line {
    /// This check begins.
    Checking(String),
    Found(Finding),
    /// What a loss of power left on this disk: the version, if one is there whole, and what there
    /// is.
    Recovered(String, Option<u32>, String),
    /// This disk has a new, empty file system.
    Remade(String),
    /// This disk has this version, and is to keep it.
    Committed(String, u32),
    /// All is done.
    Done,
    /// Nothing more comes, because of this.
    Failed(String),
}

impl Line {
    /// The next that `process` says; `None` once it has closed its output.
    pub(crate) fn next(process: &Process, within: Duration) -> anyhow::Result<Option<Self>> {
        let text = process.next(within)?;
        let parse = |text: String| {
            serde_json::from_str(&text).with_context(|| format!("not a finding: {}", text.trim()))
        };
        text.map(parse).transpose()
    }

    /// Writes the line at once.
    pub(crate) fn send(&self, mut to: impl Write) -> io::Result<()> {
        let mut line = serde_json::to_string(self)?;
        line.push('\n');
        to.write_all(line.as_bytes())?;
        to.flush()
    }
}
