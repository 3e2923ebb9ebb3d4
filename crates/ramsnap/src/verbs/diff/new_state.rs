//! The new state of a diff.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use memory_image::{Chain, Image};
use memory_writer::{ImageId, Seal, SnapshotError};
use page_reader::PageReader;

use crate::failure::Failure;
use crate::input;
use crate::ram::Ram;
use crate::session::Session;

/// The new state.
pub(super) enum New {
    Ram(Ram),
    Images(Chain),
}

impl New {
    pub(super) fn size(&self) -> u64 {
        match self {
            Self::Ram(ram) => ram.size(),
            Self::Images(chain) => chain.ram_size(),
        }
    }

    /// Returns the error for an old state that has `old` bytes of RAM, and not as many as this.
    pub(super) fn other_size(&self, old: u64) -> Failure {
        let new = self.size();
        match self {
            Self::Ram(ram) => ram.other_size(old),
            Self::Images(_) => Failure::OtherGuest { old, new },
        }
    }

    pub(super) fn reader(&self) -> Box<dyn PageReader + Sync + '_> {
        match self {
            Self::Ram(ram) => ram.reader(),
            Self::Images(chain) => Box::new(chain),
        }
    }

    pub(super) fn regions(&self) -> Option<&[Range<u64>]> {
        match self {
            Self::Ram(_) => None,
            Self::Images(chain) => input::regions(chain),
        }
    }

    pub(super) fn id(&self) -> Option<ImageId> {
        match self {
            Self::Ram(_) => None,
            Self::Images(chain) => chain.id(),
        }
    }

    /// Returns the seal of the new state, before the old state is set as its parent.
    pub(super) fn seal(&self) -> Seal {
        match self {
            Self::Ram(_) => Seal::new(),
            Self::Images(chain) => chain.seal(),
        }
    }

    /// Returns the images of both states, each once.
    pub(super) fn images_beside<'i>(&'i self, old: &'i Chain) -> impl Iterator<Item = &'i Image> {
        let new = match self {
            Self::Ram(_) => None,
            Self::Images(chain) => Some(chain),
        };
        let known: BTreeSet<&Path> = old.paths().collect();
        let new = new.into_iter().flat_map(Chain::images);
        let beside = new.filter(move |image| !known.contains(image.path()));
        old.images().chain(beside)
    }

    pub(super) fn hold(&mut self, session: &Session) -> anyhow::Result<()> {
        match self {
            Self::Ram(ram) => ram.hold(session),
            Self::Images(_) => Ok(()),
        }
    }

    pub(super) fn check(&self) -> anyhow::Result<()> {
        match self {
            Self::Ram(ram) => ram.check(),
            Self::Images(chain) => Ok(chain.check_unchanged()?),
        }
    }

    pub(super) fn explain(&self, error: SnapshotError) -> anyhow::Error {
        match self {
            Self::Ram(ram) => ram.explain(error),
            Self::Images(_) => error.into(),
        }
    }
}
