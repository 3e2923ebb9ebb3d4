//! `ramsnap merge`: one image made of a chain.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use memory_image::{Chain, Image, Layout};

use crate::args::{Formats, FromDir, ImageFile, Output, RawImages, layouts};
use crate::chain_lock::Sharing;
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::in_place::Merging;
use crate::save::Content;
use crate::session::Session;
use crate::{in_place, input, memory_reserve, save};

/// Make one image of a full image and its diffs, or one diff of diffs
///
/// The result represents the same state as the last file, and has its id, so the next diff applies
/// to it. If the last file is raw, the result has a new id and no metadata. The regions are those
/// of any file that has some. A raw first file is read as a full image, unless --raw-diffs is
/// given. Stored pages of zeros take no space in the result, except in a raw diff and where the
/// result shares the blocks of the first file; a diff records them as zeros, which are not clean
/// pages.
#[derive(Debug, Args)]
#[command(
    group = ArgGroup::new("where").required(true).args(["output", "in_place"]),
    after_help = "Examples:\n  \
        ramsnap merge full.mem d1.mem d2.mem -o new.mem\n  \
        ramsnap merge d1.mem d2.mem -o both.mem\n  \
        ramsnap merge raw:full.raw d1.mem -o new.mem --layout packed\n  \
        ramsnap merge --in-place full.mem d1.mem"
)]
pub struct Merge {
    /// Images, oldest first
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// The file to write; it appears when it is complete
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the first file by the result
    ///
    /// At every instant, also after a crash, the file is the complete old one or the complete new
    /// one. The new file has the old one's owner, group, mode, access control list and extended
    /// attributes, as far as that is permitted. Where the file system can share blocks (btrfs,
    /// XFS), only the pages of the diffs are written, as by `ramsnap commit`. If another writer
    /// replaces the first file while it is merged, the merge fails, and that writer's file stays. A
    /// diff that was taken after a state which would be lost prevents the merge, as it does
    /// `ramsnap commit`.
    #[arg(long)]
    in_place: bool,
    /// Replace the output if it exists; with --in-place, merge though a diff was taken after a
    /// state that is lost
    #[arg(long)]
    force: bool,
    /// The layout of the result; by default that of the first file
    #[arg(long, value_parser = layouts())]
    layout: Option<Layout>,
    /// All files are raw diffs
    #[arg(long, conflicts_with = "format")]
    raw_diffs: bool,
    /// Do not compare the files with their checksums first
    #[arg(long)]
    no_verify: bool,
    /// Store the pages of zeros that the images store
    #[arg(long)]
    keep_zeros: bool,
    #[command(flatten)]
    raw: RawImages,
}

impl Merge {
    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let files = input::paths(&self.files).into_iter();
        files.chain(self.output.clone()).collect()
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let output = self.checked_output()?;
        let open = |files: &[ImageFile]| match self.raw_diffs {
            true => input::raw_diffs(session, files, &self.raw),
            false => input::chain(session, files, self.formats, &self.raw),
        };
        let lock = |sharing| {
            let output = output.iter().map(|output| output.path.clone());
            let others: Vec<_> = output.collect();
            self.from.lock(session, 0, &self.files, &others, sharing)
        };
        let read_only = match self.in_place {
            true => None,
            // A full image builds on nothing that another run may replace meanwhile.
            false => Some(self.from.open(0, &self.files, open)?).filter(Chain::is_full),
        };
        let (_lock, chain) = match (read_only, self.in_place) {
            (Some(chain), _) => (None, chain),
            (None, in_place) => {
                let (lock, files) = lock(match in_place {
                    true => Sharing::Exclusive,
                    false => Sharing::Shared,
                })?;
                (Some(lock), open(&files)?)
            }
        };
        if self.in_place && !self.force {
            in_place::check_not_needed(&chain, false)?;
        }
        let merging = Merging {
            layout: self.layout.unwrap_or_else(|| layout_of_first(&chain)),
            skip_zeros: !self.keep_zeros,
            verify: !self.no_verify,
        };
        let staged = match output {
            None => in_place::stage(session, &chain, merging)?,
            Some(output) => {
                let options = merging.options(session, &chain);
                let (size, page_size) = (chain.ram_size(), save::page_size(&chain)?);
                let writer = save::stage(session, &output, options, size, page_size)?;
                merging.write(session, &chain, writer)?
            }
        };
        let content = Content::of(merging.layout.has_footer(), !chain.is_full());
        save::put_image_in_place(session, staged, content)?;
        Ok(ExitStatus::Success)
    }

    /// Returns the output, unless the first file is replaced.
    fn checked_output(&self) -> anyhow::Result<Option<Output>> {
        let Some(path) = &self.output else {
            memory_reserve::check_new(&self.files[0].path)?;
            return Ok(None);
        };
        if input::is_one_of(path, &input::paths(&self.files)) {
            let path = path.clone();
            return Err(Failure::MergeOntoInput { path }.into());
        }
        let output = Output {
            path: path.clone(),
            force: self.force,
        };
        save::check_output(&output, &[])?;
        Ok(Some(output))
    }
}

pub fn layout_of_first(chain: &Chain) -> Layout {
    chain.images().next().map_or(Layout::Raw, Image::layout)
}
