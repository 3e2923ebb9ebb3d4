//! `ramsnap rebase`: a diff on top of another image.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use memory_image::{Chain, Image, find_difference};
use page_reader::Touched;

use crate::args::{Formats, FromDir, ImageFile, Output, RawImages, kept_seal};
use crate::chain_lock::Sharing;
use crate::exit_status::ExitStatus;
use crate::failure::{Failure, ImagesFailure};
use crate::numbers::text_of;
use crate::session::Session;
use crate::{input, memory_reserve, save};

/// Change the image that a diff builds on, and keep the state that it represents
///
/// The files are the chain of the diff, which is the last one. The diff is replaced by one that has
/// the pages in which its state differs from the new parent. It keeps its id, metadata and layout,
/// so diffs that were taken after it still follow it. Pages of zeros take no space in it, except in
/// a raw diff: they are recorded as zeros, which are not clean pages. At every instant, also after
/// a crash, the file is the complete old diff or the complete new one.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap rebase full.mem d1.mem d2.mem --onto full.mem\n  \
    ramsnap rebase --chain snapshots d2.mem --onto full.mem\n  \
    ramsnap rebase old.mem d1.mem --onto golden.mem --onto g1.mem")]
pub struct Rebase {
    /// Images, oldest first; the last one is the diff to change
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    /// An image of the new parent; repeat it for a chain, oldest first
    #[arg(long, required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    onto: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// Store the pages that are zeros and differ from the new parent
    #[arg(long)]
    keep_zeros: bool,
    /// Do not compare the images with their checksums first
    #[arg(long)]
    no_verify: bool,
    #[command(flatten)]
    raw: RawImages,
}

impl Rebase {
    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        [&self.files[..], &self.onto].map(input::paths).concat()
    }

    /// Finds the images of both chains.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)?;
        match self.onto.len() {
            1 => self.from.find(&mut self.onto),
            _ => Ok(()),
        }
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let path = self.files[self.files.len() - 1].path.clone();
        if input::is_one_of(&path, &input::paths(&self.onto)) {
            return Err(ImagesFailure::OntoTheDiff { path }.into());
        }
        memory_reserve::check_new(&path)?;
        let all = self.files();
        let (_lock, files) = self
            .from
            .lock(session, 0, &self.files, &all, Sharing::Exclusive)?;
        let path = files[files.len() - 1].path.clone();
        let onto = self.from.find_again(1, &self.onto)?;
        let state = input::full_chain(session, &files, self.formats, &self.raw)?;
        let diff = state.images().last().context("there is no image")?;
        if !diff.is_diff() {
            return Err(ImagesFailure::NotADiff { path }.into());
        }
        let onto = input::full_chain(session, &onto, self.formats, &self.raw)?;
        check_same_guest(&onto, &state)?;
        let mut seal = state.seal();
        if let Some(id) = state.id().filter(|it| onto.ids().any(|id| id == *it))
            && onto.id() != Some(id)
        {
            return Err(ImagesFailure::OntoItself { id }.into());
        }
        match onto.id() {
            Some(id) if state.id() == Some(id) => return Err(Failure::SameState { id }.into()),
            Some(parent) => seal = seal.parent(parent),
            None => {
                seal = seal.on_raw_image();
                session.warn(
                    "the new parent is raw and has no id: \
                     it cannot be checked later whether the diff follows it",
                );
            }
        }
        let page_size = diff.footer().map_or(input::RAW_PAGE, |it| it.page_size);
        let page_size = page_size.min(onto.writable_page_size());
        let layout = diff.layout();
        let options = session
            .options("rebasing")
            .layout(layout)
            .seal(kept_seal(layout, seal))
            .skip_zeros(!self.keep_zeros)
            .ram_start(0)
            // A file that another writer puts there in the meantime stays.
            .replace_only(diff.version()?);
        let output = Output { path, force: true };
        let mut writer = save::stage(session, &output, options, state.ram_size(), page_size)?;
        if !self.no_verify {
            let beside = onto.images().filter(|image| !is_in(&state, image));
            input::check_sums(session, state.images().chain(beside))?;
        }
        let progress = &mut session.progress("comparing");
        let found = find_difference(&onto, &state, state.ram_size(), page_size, progress)?;
        found.write_to(&mut writer, &Touched::new(&state, state.ram_size()))?;
        state.check_unchanged()?;
        onto.check_unchanged()?;
        save::commit(session, writer)?;
        Ok(ExitStatus::Success)
    }
}

fn is_in(chain: &Chain, image: &Image) -> bool {
    chain.paths().any(|path| path == image.path())
}

fn check_same_guest(onto: &Chain, state: &Chain) -> Result<(), Failure> {
    let (old, new) = (onto.ram_size(), state.ram_size());
    if old != new {
        return Err(Failure::OtherGuest { old, new });
    }
    match (input::regions(onto), input::regions(state)) {
        (Some(old), Some(new)) if !input::same_regions(old, new) => {
            let (old, new) = (text_of(old), text_of(new));
            Err(Failure::OtherRegions { old, new })
        }
        _ => Ok(()),
    }
}
