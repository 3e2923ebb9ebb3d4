//! Diffs that are not merged, and why.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use crate::catalog::{Catalog, Entry};
use crate::print::JsonPath;

/// Diffs that stay, with all diffs after them.
#[derive(Debug, Serialize)]
pub(super) struct Left {
    /// The full image of their chain.
    file: Option<JsonPath>,
    pub(super) diffs: Vec<JsonPath>,
    reason: &'static str,
}

/// Why diffs are not merged.
#[derive(Clone, Copy, Debug)]
pub(super) enum Reason {
    /// Each of them needs the state that they were taken after.
    SeveralDiffs,
    /// Several files have the state that they were taken after.
    SameId,
    OtherRam,
    NoFullImage,
}

impl Reason {
    fn text(self) -> &'static str {
        match self {
            Self::SeveralDiffs => "they were taken after the same state",
            Self::SameId => "several files have the state that they were taken after, by its id",
            Self::OtherRam => "their RAM has another size",
            Self::NoFullImage => "they follow no sealed or packed full image here",
        }
    }
}

impl Left {
    pub(super) fn new(full: Option<&Entry>, diffs: &[&Entry], reason: Reason) -> Self {
        let diffs = diffs.iter().map(|diff| diff.path.clone().into());
        Self {
            file: full.map(|full| full.path.clone().into()),
            diffs: diffs.collect(),
            reason: reason.text(),
        }
    }

    /// Returns the diffs that follow no full image, if there are any.
    pub(super) fn without_full_image(catalog: &Catalog) -> Option<Self> {
        let full = catalog.entries.iter().filter(|entry| !entry.is_diff);
        let mut ids: BTreeSet<_> = full.clone().map(|entry| entry.id).collect();
        let mut left: Vec<_> = full.collect();
        while let Some(entry) = left.pop() {
            left.extend(catalog.after(entry.id).filter(|it| ids.insert(it.id)));
        }
        let is_alone = |entry: &&Entry| {
            let parent = entry.parent.is_some_and(|parent| ids.contains(&parent));
            entry.is_diff && !parent
        };
        let alone: Vec<_> = catalog.entries.iter().filter(is_alone).collect();
        let found = || Self::new(None, &alone, Reason::NoFullImage);
        (!alone.is_empty()).then(found)
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let quoted = |path: &JsonPath| format!("{:?}", &**path);
        let diffs: Vec<_> = self.diffs.iter().map(quoted).collect();
        let diffs = diffs.join(", ");
        match &self.file {
            Some(file) => write!(f, "not merged into {}: {diffs}", quoted(file))?,
            None => write!(f, "not merged: {diffs}")?,
        }
        write!(f, ", and what follows: {}", self.reason)
    }
}
