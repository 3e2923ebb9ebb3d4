//! `ramsnap map`: a picture of the pages that images hold.

mod cells;
mod drawing;
mod terminal;

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::Context;
use atomic_file::AtomicWriter;
use clap::Args;
use image_format::Storage;
use serde::Serialize;
use sparse_file::extents;

use crate::args::{Formats, FromDir, ImageFile};
use crate::exit_status::ExitStatus;
use crate::failure::Failure;
use crate::print::JsonPath;
use crate::session::Session;
use crate::{device, input, memory_reserve, print, save};

/// Show which pages images hold: present, zero or clean
///
/// One image fills lines from the start of the RAM to its end; several have a line each. In the
/// terminal, a cell stands for many pages, and its height for the share of them that is present.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap map full.mem\n  \
    ramsnap map full.mem d1.mem d2.mem -o chain.svg")]
pub struct Map {
    /// Images
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// Draw to this file, a .svg or .png
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Replace the output if it exists
    #[arg(long, requires = "output")]
    force: bool,
    /// The width in columns; by default that of the terminal
    #[arg(long, value_name = "COLUMNS", conflicts_with_all = ["output", "json"], value_parser = clap::value_parser!(u16).range(1..))]
    width: Option<u16>,
    /// The runs of pages, as JSON: a list of objects, sizes and offsets in bytes. A path that is
    /// not UTF-8 is an object: text, and bytes_hex
    #[arg(long, conflicts_with = "output")]
    json: bool,
}

impl Map {
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
        if let Some(path) = &self.output {
            memory_reserve::check_new(path)?;
            self.draw(session, path)?;
            return Ok(ExitStatus::Success);
        }
        let maps = self.maps()?;
        if self.json {
            print::json(&maps)?;
        } else {
            print::line(&terminal::text(&maps, self.width.map(usize::from)))?;
        }
        Ok(ExitStatus::Success)
    }

    /// Returns whether the map is printed, rather than drawn to a file.
    pub fn prints_map(&self) -> bool {
        self.output.is_none()
    }

    fn maps(&self) -> anyhow::Result<Vec<PageMap>> {
        let maps = self.from.open(0, &self.files, |files| {
            let maps = files.iter().map(|file| PageMap::of(file, self.formats));
            maps.collect::<anyhow::Result<Vec<_>>>()
        })?;
        match maps.iter().find(|map| map.ram_bytes != maps[0].ram_bytes) {
            None => Ok(maps),
            Some(other) => {
                let (old, new) = (maps[0].ram_bytes, other.ram_bytes);
                Err(Failure::OtherGuest { old, new }.into())
            }
        }
    }

    fn draw(&self, session: &Session, path: &Path) -> anyhow::Result<()> {
        let extension = path.extension().and_then(|extension| extension.to_str());
        let draw = match extension {
            Some("svg") => drawing::svg,
            Some("png") => drawing::png,
            _ => {
                let path = path.to_owned();
                return Err(Failure::UnsupportedImageExtension { path }.into());
            }
        };
        save::check_is_no_input(path, &input::paths(&self.files))?;
        if !self.force && path.symlink_metadata().is_ok() {
            let path = path.to_owned();
            return Err(Failure::OutputExists { path }.into());
        }
        let picture = drawing::fit(&self.maps()?);
        let bytes = draw(&picture).with_context(|| format!("cannot draw {path:?}"))?;
        // The picture shows only where pages are, not their contents.
        let options = AtomicWriter::options()
            .mode(0o644)
            .preserve(save::preserve())
            .no_clobber(!self.force);
        session.hold();
        let mut writer = options.open(path)?;
        save::warn_of_lost(session, path, writer.not_preserved());
        let written = writer.write_all(&bytes);
        written.with_context(|| format!("cannot write the picture {path:?}"))?;
        save::put_in_place(session, writer, || {
            Ok(session.report(&format!("{}: {}", print::path(path), picture.title()))?)
        })
    }
}

/// The pages that an image holds.
#[derive(Debug, Serialize)]
struct PageMap {
    file: JsonPath,
    ram_bytes: u64,
    /// The smallest possible length of a run, in bytes.
    page_bytes: u64,
    runs: Vec<Run>,
}

/// A run of pages of one state. Pages outside of all runs are clean.
#[derive(Debug, Serialize)]
struct Run {
    offset: u64,
    bytes: u64,
    state: State,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Present,
    Zero,
    /// A hole of a raw image: zero or clean.
    Hole,
}

impl PageMap {
    fn of(file: &ImageFile, formats: Formats) -> anyhow::Result<Self> {
        let image = file.open(formats.format)?;
        let path = image.path();
        let (page_bytes, runs) = match image.footer() {
            Some(footer) => {
                let run = |run: &image_format::Run| match run.stored {
                    Storage::At(_) => Run::new(run.range(), State::Present),
                    Storage::Zeros => Run::new(run.range(), State::Zero),
                };
                (footer.page_size, footer.runs.iter().map(run).collect())
            }
            None => (4096, holes(path, image.ram_size())?),
        };
        Ok(Self {
            file: path.to_owned().into(),
            ram_bytes: image.ram_size(),
            page_bytes,
            runs,
        })
    }
}

impl Run {
    fn new(range: Range<u64>, state: State) -> Self {
        Self {
            offset: range.start,
            bytes: range.end - range.start,
            state,
        }
    }
}

fn holes(path: &Path, ram_bytes: u64) -> anyhow::Result<Vec<Run>> {
    if device::is_at(path) {
        return Ok(vec![Run::new(0..ram_bytes, State::Present)]);
    }
    let list = || {
        let run = |extent: sparse_file::Extent| match extent.kind {
            sparse_file::ExtentKind::Data => Run::new(extent.range, State::Present),
            sparse_file::ExtentKind::Hole => Run::new(extent.range, State::Hole),
        };
        extents(&File::open(path)?)?
            .map(|extent| extent.map(run))
            .collect::<std::io::Result<_>>()
    };
    list().with_context(|| format!("cannot list the extents of {path:?}"))
}
