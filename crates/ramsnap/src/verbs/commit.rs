//! `ramsnap commit`: diffs merged into the image that they build on.

use std::path::PathBuf;

use clap::Args;

use crate::args::{Formats, FromDir, ImageFile, RawImages};
use crate::chain_lock::Sharing;
use crate::exit_status::ExitStatus;
use crate::failure::ImagesFailure;
use crate::in_place::Merging;
use crate::save::Content;
use crate::session::Session;
use crate::verbs::merge::layout_of_first;
use crate::{in_place, input, memory_reserve, save};

/// Merge diffs into the first image, in place
///
/// The first file becomes the state of the last one, and has its id, so that later diffs follow it.
/// At every instant, also after a crash, it is the complete old image or the complete new one, and
/// the chain can be read. Where the file system can share blocks (btrfs, XFS), a raw or sealed
/// image shares those that did not change with the old one: only the pages of the diffs are
/// written. A packed image has no place for more pages and is written as a whole, as is any image
/// elsewhere. With --remove, the diffs are removed once the new image is on its disk.
///
/// A diff that was taken after a state which would be lost prevents the commit. It is looked for in
/// the directories of the files, and in those that links lead to.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap commit full.mem d1.mem d2.mem --remove\n  \
    ramsnap commit --chain snapshots d2.mem")]
pub struct Commit {
    /// Images, oldest first: the one to change, and the diffs
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// Remove the diffs after the commit
    #[arg(long)]
    remove: bool,
    /// Commit though a diff in the directory was taken after a state that is lost
    #[arg(long)]
    force: bool,
    /// Do not compare the files with their checksums first
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    raw: RawImages,
}

impl Commit {
    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        input::paths(&self.files)
    }

    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        if self.files.len() < 2 {
            return Err(ImagesFailure::NothingToCommit.into());
        }
        memory_reserve::check_new(&self.files[0].path)?;
        let (_lock, files) = self
            .from
            .lock(session, 0, &self.files, &[], Sharing::Exclusive)?;
        if files.len() < 2 {
            return Err(ImagesFailure::NothingToCommit.into());
        }
        let chain = input::chain(session, &files, self.formats, &self.raw)?;
        if !self.force {
            in_place::check_not_needed(&chain, self.remove)?;
        }
        let merging = Merging {
            layout: layout_of_first(&chain),
            skip_zeros: false,
            verify: !self.no_verify,
        };
        let staged = in_place::stage(session, &chain, merging)?;
        let content = Content::of(merging.layout.has_footer(), !chain.is_full());
        save::put_image_in_place(session, staged, content)?;
        if self.remove {
            let removed = in_place::remove_merged(session, chain)?;
            session.report(&format!("removed {}", in_place::names(&removed)))?;
        }
        Ok(ExitStatus::Success)
    }
}
