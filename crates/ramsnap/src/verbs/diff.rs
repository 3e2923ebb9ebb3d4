//! `ramsnap diff`: the changes between two states.

mod difference;
mod new_state;

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use memory_image::{Chain, Difference, Layout, find_difference};
use memory_writer::MemoryWriter;
use page_reader::Touched;

use crate::args::{
    self, Extras, Format, Formats, FromDir, ImageFile, InProcess, Output, RawImages, kept_seal,
    layouts,
};
use crate::chain_lock::Sharing;
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::numbers::text_of;
use crate::print::{self, count, size};
use crate::ram::{Ram, RamFile};
use crate::session::Session;
use crate::{input, save};
use difference::Printed;
use new_state::New;

/// Take a diff: the pages of a new state of the RAM that differ from an old one
///
/// The old state comes first: a full image, or one and its diffs, oldest first. The new state is
/// RAM, by --ram or --pid (pause the guest first); or the last file, a full image or a diff on top
/// of the old ones; or a chain of its own, by --to. A raw file does not say whether it is a full
/// image or a diff: add --raw-full or --raw-diff where the new state begins with one.
///
/// The diff names the old state as its parent, and has the id of the new one; RAM gets a new id.
/// Pages that became zeros take no space in it, except in a raw diff: they are recorded as zeros,
/// which are not clean pages. Without --output nothing is written, and the exit status is 1 if the
/// states differ.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap diff full.mem --ram /dev/shm/guest -o d1.mem\n  \
    ramsnap diff full.mem d1.mem --ram /dev/shm/guest -o d2.mem\n  \
    ramsnap diff yesterday.mem today.mem -o day.mem\n  \
    ramsnap diff full.mem d1.mem d2.mem --to full.mem --to d1.mem -o back.mem\n  \
    ramsnap diff full.mem raw:d1.raw --raw-diff\n  \
    ramsnap diff full.mem --pid 4242 --region /memfd:ram -o d1.mem\n  \
    ramsnap diff a.mem b.mem")]
pub struct Diff {
    /// The old state's images, oldest first, and then, without --ram, --pid or --to, that of the
    /// new state
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    /// The new state: the RAM itself, a file or memfd as for `ramsnap dump`
    #[arg(long, value_name = "RAMFILE")]
    ram: Option<PathBuf>,
    /// The new state: an image; repeat it for a chain, oldest first
    #[arg(long, value_name = "FILE", value_parser = ImageFile::parser())]
    to: Vec<ImageFile>,
    /// The new state's first image is raw, and a full image
    #[arg(long, conflicts_with = "raw_diff")]
    raw_full: bool,
    /// The new state's images begin with a raw one, and are diffs on top of the old state
    #[arg(long)]
    raw_diff: bool,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    #[command(flatten)]
    process: InProcess,
    /// The diff to write; it appears when it is complete
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the output if it exists
    #[arg(long, requires = "output")]
    force: bool,
    /// The layout of the diff
    #[arg(long, default_value = "packed", value_parser = layouts(), requires = "output")]
    layout: Layout,
    /// Do not compare the images with their checksums first
    #[arg(long)]
    no_verify: bool,
    /// Store the pages that became zeros
    #[arg(long, requires = "output")]
    keep_zeros: bool,
    /// Print the differences as JSON: sizes and offsets in bytes
    #[arg(long, conflicts_with = "output")]
    json: bool,
    #[command(flatten)]
    raw: RawImages,
    #[command(flatten)]
    extras: Extras,
}

impl Diff {
    /// Finds the images of the chain.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        self.from.find(&mut self.files)
    }

    /// Returns the files that are read and written.
    pub fn files(&self) -> Vec<PathBuf> {
        let images = [&self.files[..], &self.to].map(input::paths).concat();
        let others = self.ram.iter().chain(&self.output).cloned();
        self.extras.and_inputs(images.into_iter().chain(others))
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let session = &self.process.session(session);
        let (old_files, new_files) = self.states(&self.files)?;
        let new_is_diff = self.new_is_diff(new_files)?;
        let output = self.output.as_ref().map(|path| Output {
            path: path.clone(),
            force: self.force,
        });
        if let Some(output) = &output {
            let images = [input::paths(old_files), input::paths(new_files)].concat();
            let files = images.into_iter().chain(self.ram.clone());
            save::check_output(output, &self.extras.and_inputs(files))?;
            args::check_records(self.layout, !self.extras.is_empty(), &output.path)?;
        }
        // Another run must not replace the old state meanwhile.
        let locked = output.as_ref().map(|output| {
            let others = [output.path.clone()];
            self.from
                .lock(session, 0, &self.files, &others, Sharing::Shared)
        });
        let (_lock, files) = locked.transpose()?.unzip();
        let files = files.unwrap_or_else(|| self.files.clone());
        let (old_files, new_files) = self.states(&files)?;
        let old = input::full_chain(session, old_files, self.formats, &self.raw)?;
        let mut new = match (&self.ram, self.process.find()?) {
            (Some(path), _) => New::Ram(Ram::File(RamFile::open(path)?)),
            (None, Some(ram)) => New::Ram(ram),
            (None, None) => {
                New::Images(self.new_chain(session, old_files, new_files, new_is_diff)?)
            }
        };
        if old.ram_size() != new.size() {
            return Err(new.other_size(old.ram_size()).into());
        }
        self.check_regions(&old, &new)?;
        let writer = match &output {
            None => None,
            Some(output) => Some(self.stage(session, output, &old, &new)?),
        };
        if !self.no_verify {
            // If the RAM equals a damaged page, the diff would lack that page.
            input::check_sums(session, new.images_beside(&old))?;
        }
        // The last step, as it may stop a process.
        new.hold(session)?;
        let changed = self.changed(session, &old, &new)?;
        match writer {
            None => {
                old.check_unchanged()?;
                new.check()?;
                drop(new);
                self.tell(&changed)
            }
            Some(writer) => self.save(session, writer, &old, new, &changed),
        }
    }

    /// Returns whether the differences are printed, rather than saved.
    pub fn prints_differences(&self) -> bool {
        self.output.is_none()
    }

    fn page_size(&self, old: &Chain) -> u64 {
        let smallest = old.writable_page_size();
        self.raw.page_size.unwrap_or(smallest)
    }

    /// Both states, and the diff, are of RAM at the same addresses, as far as images say.
    fn check_regions(&self, old: &Chain, new: &New) -> Result<(), Failure> {
        let (old, new) = (input::regions(old), new.regions());
        if let (Some(old), Some(new)) = (old, new)
            && !input::same_regions(old, new)
        {
            let (old, new) = (text_of(old), text_of(new));
            return Err(Failure::OtherRegions { old, new });
        }
        self.extras.check_regions(old.or(new))
    }

    /// Returns whether the command line declares a raw first image of the new state to be a diff.
    /// `None` if that image is not raw, or if there is none.
    fn new_is_diff(&self, new: &[ImageFile]) -> Result<Option<bool>, Failure> {
        let is_raw = |file: &&ImageFile| file.format(self.formats.format) == Format::RAW;
        let raw = new.first().filter(is_raw);
        match (raw, self.raw_full, self.raw_diff) {
            (None, false, false) => Ok(None),
            (None, ..) => Err(Failure::NoRawNewState),
            (Some(file), false, false) => {
                let path = file.path.clone();
                Err(Failure::RawNewState { path })
            }
            (Some(_), _, is_diff) => Ok(Some(is_diff)),
        }
    }

    /// The files of the old state, and of the new one: none where that is RAM.
    fn states<'f>(
        &'f self,
        files: &'f [ImageFile],
    ) -> Result<(&'f [ImageFile], &'f [ImageFile]), Failure> {
        let ram = self.ram.is_some();
        match (ram, self.process.is_given(), &self.to[..]) {
            (true, false, []) | (false, true, []) => Ok((files, &[])),
            (false, false, to @ [_, ..]) => Ok((files, to)),
            (false, false, []) if files.len() > 1 => Ok(files.split_at(files.len() - 1)),
            _ => Err(Failure::NoNewState),
        }
    }

    /// The new state's images: on top of the old ones if it is one diff.
    fn new_chain(
        &self,
        session: &Session,
        old: &[ImageFile],
        new: &[ImageFile],
        is_diff: Option<bool>,
    ) -> anyhow::Result<Chain> {
        let on_top = match (new, is_diff) {
            (_, Some(is_diff)) => is_diff,
            ([one], None) => one.open(self.formats.format)?.is_diff(),
            (_, None) => false,
        };
        let files = match on_top {
            true => [old, new].concat(),
            false => new.to_vec(),
        };
        input::full_chain(session, &files, self.formats, &self.raw)
    }

    fn changed(&self, session: &Session, old: &Chain, new: &New) -> anyhow::Result<Difference> {
        let page_size = self.page_size(old);
        let progress = &mut session.progress("comparing");
        let (new, size) = (&new.reader(), old.ram_size());
        let compared = find_difference(old, new, size, page_size, progress);
        compared.context("the two states cannot be compared")
    }

    fn tell(&self, found: &Difference) -> anyhow::Result<ExitStatus> {
        let found = Printed::of(&found.changed);
        if self.json {
            print::json(&found)?;
        } else if found.pages == 0 {
            print::line("the same")?;
        } else {
            let (pages, runs) = (
                count(found.pages, "page"),
                count(found.runs.len() as u64, "run"),
            );
            let bytes = size(found.bytes);
            print::line(&format!("{pages} differ: {bytes} in {runs}"))?;
        }
        Ok(ExitStatus::of_check(found.pages == 0))
    }

    /// Stages the diff, and reads everything that it records except its pages.
    fn stage(
        &self,
        session: &Session,
        output: &Output,
        old: &Chain,
        new: &New,
    ) -> anyhow::Result<MemoryWriter> {
        if let New::Ram(ram) = new {
            ram.check_output(&output.path)?;
        }
        let mut seal = new.seal();
        if let Some(parent) = old.id() {
            if new.id() == Some(parent) {
                return Err(Failure::SameState { id: parent }.into());
            }
            seal = seal.parent(parent);
        } else {
            seal = seal.on_raw_image();
            session.warn(
                "the old state is raw and has no id: \
                 it cannot be checked later whether the diff follows it",
            );
        }
        if let Some(regions) = input::regions(old) {
            seal = seal.regions(regions.iter().cloned());
        }
        if let (New::Images(chain), true) = (new, self.layout.has_footer()) {
            input::warn_of_old_metadata(session, chain);
        }
        let seal = self.extras.add_to(seal, old.ram_size())?;
        let options = session
            .options("saving")
            .layout(self.layout)
            .seal(kept_seal(self.layout, seal))
            // All images that it needs are inputs, and none is the output. That may be a copy.
            .allow_replacing_parent(true)
            .skip_zeros(!self.keep_zeros)
            .ram_start(0);
        save::stage(
            session,
            output,
            options,
            old.ram_size(),
            self.page_size(old),
        )
    }

    fn save(
        &self,
        session: &Session,
        mut writer: MemoryWriter,
        old: &Chain,
        new: New,
        changed: &Difference,
    ) -> anyhow::Result<ExitStatus> {
        let reader = new.reader();
        // A page may differ because the guest gave it back: reading it would allocate it again.
        let written = changed.write_to(&mut writer, &Touched::new(&reader, new.size()));
        drop(reader);
        written.map_err(|error| new.explain(error))?;
        old.check_unchanged()?;
        new.check()?;
        // A stopped process resumes.
        drop(new);
        save::commit_as(session, writer, true)?;
        Ok(ExitStatus::Success)
    }
}
