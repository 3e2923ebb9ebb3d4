//! `ramsnap merge`: one image made of a chain.

use std::path::PathBuf;

use clap::{ArgGroup, Args};
use image_format::Footer;
use memory_image::{Chain, Image, Layout};

use crate::args::{Formats, FromDir, ImageFile, Output, RawImages, kept_seal, layouts};
use crate::chain_lock::{ChainLock, Sharing};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::session::Session;
use crate::{in_place, input, memory_reserve, save};

/// Make one image of a full image and its diffs, or one diff of diffs
///
/// The result represents the same state as the last file, and has its id, so the next diff applies
/// to it. If the last file is raw, the result has a new id and no metadata. The regions are those
/// of any file that has some. A raw first file is read as a full image, unless --raw-diffs is
/// given. Stored pages of zeros take no space in the result, except in a raw diff and where a raw
/// result shares the blocks of a raw first file; a diff records them as zeros, which are not clean
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
    /// attributes, as far as that is permitted. If another writer replaces the first file while it
    /// is merged, the merge fails, and that writer's file stays. A diff that was taken after a
    /// state which would be lost prevents the merge, as it does `ramsnap commit`.
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
        let _lock = match self.in_place {
            true => {
                let files = input::paths(&self.files);
                Some(ChainLock::take(session, &files, Sharing::Exclusive)?)
            }
            false => None,
        };
        let chain = match self.raw_diffs {
            true => input::raw_diffs(session, &self.files, &self.raw)?,
            false => input::chain(session, &self.files, self.formats, &self.raw)?,
        };
        if self.in_place && !self.force {
            in_place::check_not_needed(&chain, false)?;
        }
        let first = chain.images().next().and_then(Image::footer);
        let below = first.filter(|_| !chain.is_full()).and_then(Footer::parent);
        save::check_replaces_no(below, &output.path)?;
        let layout = self.layout.unwrap_or_else(|| layout_of_first(&chain));
        let mut options = session
            .options("merging")
            .layout(layout)
            .seal(kept_seal(layout, chain.seal()))
            .skip_untouched(true)
            .skip_zeros(!self.keep_zeros)
            .ram_start(0);
        if let (true, Some(first)) = (self.in_place, chain.images().next()) {
            // A file that another writer puts there in the meantime stays.
            options = options.replace_only(first.version()?);
        }
        let page_size = save::page_size(&chain)?;
        if layout.has_footer() {
            input::warn_of_old_metadata(session, &chain);
        }
        let mut writer = save::stage(session, &output, options, chain.ram_size(), page_size)?;
        save::check_room_for(session, &writer, &chain)?;
        // Once there is a place for the result: this takes as long as the rest.
        if !self.no_verify {
            input::check_sums(session, chain.images())?;
        }
        save::write_chain(&mut writer, &chain)?;
        save::commit_as(session, writer, !chain.is_full())?;
        Ok(ExitStatus::Success)
    }

    fn checked_output(&self) -> anyhow::Result<Output> {
        let Some(path) = &self.output else {
            let path = self.files[0].path.clone();
            memory_reserve::check_new(&path)?;
            return Ok(Output { path, force: true });
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
        Ok(output)
    }
}

pub fn layout_of_first(chain: &Chain) -> Layout {
    chain.images().next().map_or(Layout::Raw, Image::layout)
}
