//! Errors of the verbs that find images in a directory, or read a part of one.

use std::path::PathBuf;

use memory_image::ImageId;
use thiserror::Error;

use crate::exit_status::ExitStatus;

/// An error about the images of a chain.
#[derive(Debug, Error)]
pub enum ImagesFailure {
    // Usage: change the command line. Nothing was written.
    #[error(
        "--chain finds all images that one file builds on: name only the newest one, or leave out --chain"
    )]
    SeveralNewest,
    #[error(
        "{path:?} is neither sealed nor packed, and has no id to find its parent by: name all files of its chain, \
         or seal it by `ramsnap convert`"
    )]
    RawNewest { path: PathBuf },
    #[error(
        "{start:#x}..{end:#x} is not all RAM of the guest, which is at {regions}: choose --at and --len inside of it"
    )]
    NotRamAddress {
        start: u64,
        end: u64,
        regions: String,
    },
    #[error("there is nothing to merge: name the full image and the diffs to commit to it")]
    NothingToCommit,
    #[error(
        "{path:?} was taken after {after:?}, which is not named before it: name the images in the order in which they were \
         taken, oldest first"
    )]
    OutOfOrder { path: PathBuf, after: PathBuf },
    #[error("name the other state: an image after those of the first state, or --to")]
    NoOtherState,
    #[error(
        "{path:?} is a diff, and alone it is not the other state: name all images of that state by --to, oldest first"
    )]
    OtherIsDiff { path: PathBuf },
    #[error(
        "the last file {path:?} is the diff to change, and --onto names it too: name the new parent by --onto, and the \
         diff last"
    )]
    OntoTheDiff { path: PathBuf },
    #[error("the last file {path:?} is not a sealed or packed diff: only such a diff is rebased")]
    NotADiff { path: PathBuf },
    #[error("the images to rebase onto build on the diff itself, {id}: name images that do not")]
    OntoItself { id: ImageId },
    #[error(
        "the diff {path:?} was taken after the image {parent}, which would be replaced: merge to another file \
         by `ramsnap merge -o`, or add --force to give that diff up"
    )]
    NeededByOther { path: PathBuf, parent: ImageId },
    #[error(
        "the diff {path:?} was taken on a raw image, which may be the one that would be changed: merge to another \
         file by `ramsnap merge -o`, or add --force if it was another image"
    )]
    MayFollowRaw { path: PathBuf },
    #[error(
        "{path:?} may need a state that would be replaced, and cannot be read: make it readable, move it to another \
         directory, or add --force to give it up: {why}"
    )]
    MayNeedLost { path: PathBuf, why: String },
    #[error(
        "{path:?} follows the image {parent}, which no other file here has or leads to, so the result could not be \
         read: begin with a full image, or add --force"
    )]
    FollowsNone { path: PathBuf, parent: ImageId },
    #[error("say what to compact: add --keep N, --older-than AGE or --max-size SIZE")]
    NoPolicy,

    // A check failed: name other files.
    #[error(
        "{path:?} follows the image {parent}, and no file in {dir:?} has this id: name the directory that has it, or all \
         files of the chain"
    )]
    NoParent {
        path: PathBuf,
        parent: ImageId,
        dir: PathBuf,
    },
    #[error("{path:?} has no metadata: `ramsnap info` shows which image has some")]
    NoMetadata { path: PathBuf },

    // Other failures.
    #[error(
        "{path:?} has all of the chain, and {left:?}, which is merged into it, cannot be removed: remove it"
    )]
    NotRemoved {
        path: PathBuf,
        left: PathBuf,
        source: std::io::Error,
    },
}

impl ImagesFailure {
    /// Returns the exit status of the tool.
    pub fn exit_status(&self) -> ExitStatus {
        match self {
            Self::SeveralNewest
            | Self::RawNewest { .. }
            | Self::NotRamAddress { .. }
            | Self::NothingToCommit
            | Self::OutOfOrder { .. }
            | Self::NoOtherState
            | Self::OtherIsDiff { .. }
            | Self::OntoTheDiff { .. }
            | Self::NotADiff { .. }
            | Self::NeededByOther { .. }
            | Self::MayFollowRaw { .. }
            | Self::MayNeedLost { .. }
            | Self::FollowsNone { .. }
            | Self::OntoItself { .. }
            | Self::NoPolicy => ExitStatus::Usage,
            Self::NoParent { .. } | Self::NoMetadata { .. } => ExitStatus::CheckFailed,
            Self::NotRemoved { .. } => ExitStatus::Failed,
        }
    }
}
