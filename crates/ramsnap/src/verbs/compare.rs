//! `ramsnap compare`: where two states of the RAM differ.

use std::ops::Range;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use memory_image::{Chain, NotFullError, compare};
use serde::Serialize;

use crate::args::{Formats, FromDir, ImageFile, RawImages};
use crate::exit_status::ExitStatus;
use crate::failure::{Failure, ImagesFailure};
use crate::input;
use crate::numbers::text_of;
use crate::print::{self, count, size};
use crate::session::Session;

/// The most runs that are printed by default.
const LISTED: usize = 20;

/// Show where two states differ: pages by guest-physical address, and metadata
///
/// Each state is a full image, or a chain, oldest first. Without --to, the last file is the other
/// state. The exit status is 1 if the states differ. `ramsnap diff` saves what differs, and
/// compares images with RAM.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap compare yesterday.mem today.mem\n  \
    ramsnap compare full.mem d1.mem --to full.mem --to d1.mem --to d2.mem --json\n  \
    ramsnap compare --chain snapshots d1.mem --to d2.mem")]
pub struct Compare {
    /// The images of one state, oldest first, and then, without --to, that of the other
    #[arg(required = true, value_name = "FILE", value_parser = ImageFile::parser())]
    files: Vec<ImageFile>,
    /// An image of the other state; repeat it for a chain, oldest first
    #[arg(long, value_name = "FILE", value_parser = ImageFile::parser())]
    to: Vec<ImageFile>,
    #[command(flatten)]
    from: FromDir,
    #[command(flatten)]
    formats: Formats,
    /// Print at most so many runs of pages
    #[arg(long, value_name = "N", default_value_t = LISTED, conflicts_with = "json")]
    most: usize,
    /// Do not compare the images with their checksums first
    #[arg(long)]
    no_verify: bool,
    /// As JSON: an object with all runs, sizes and offsets in bytes
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    raw: RawImages,
}

/// What differs.
#[derive(Debug, Serialize)]
struct Differences {
    same: bool,
    ram_bytes: u64,
    page_bytes: u64,
    pages: u64,
    bytes: u64,
    metadata_differs: bool,
    runs: Vec<Run>,
}

/// A run of pages that differ.
#[derive(Debug, Serialize)]
struct Run {
    guest_address: u64,
    offset: u64,
    bytes: u64,
}

impl Compare {
    /// Returns the files that are read.
    pub fn files(&self) -> Vec<PathBuf> {
        [&self.files[..], &self.to].map(input::paths).concat()
    }

    /// Finds the images of both chains.
    pub fn find_chain(&mut self) -> anyhow::Result<()> {
        if self.from.chain.is_none() {
            return Ok(());
        }
        if self.to.is_empty() && self.files.len() == 2 {
            self.to = self.files.split_off(1);
        }
        self.from.find(&mut self.files)?;
        self.from.find(&mut self.to)
    }

    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        let (one, other) = match &self.to[..] {
            [] if self.files.len() < 2 => return Err(ImagesFailure::NoOtherState.into()),
            [] => self.files.split_at(self.files.len() - 1),
            to => (&self.files[..], to),
        };
        let open = |files: &[ImageFile]| input::full_chain(session, files, self.formats, &self.raw);
        let one = self.from.open(0, one, open)?;
        let other = self.from.open(1, other, open);
        let other = other.map_err(|error| self.with_to(error))?;
        if !self.no_verify {
            // Damage is not a difference of the guests.
            let beside = other
                .images()
                .filter(|it| !one.paths().any(|path| path == it.path()));
            input::check_sums(session, one.images().chain(beside))?;
        }
        let found = differences(session, &one, &other)?;
        if self.json {
            print::json(&found)?;
        } else {
            print::line(&self.text(&found))?;
        }
        Ok(ExitStatus::of_check(found.same))
    }

    /// Returns the error of the other state, which without --to is one file.
    fn with_to(&self, error: anyhow::Error) -> anyhow::Error {
        match self.files.last() {
            Some(last) if self.to.is_empty() && error.is::<NotFullError>() => {
                let path = last.path.clone();
                ImagesFailure::OtherIsDiff { path }.into()
            }
            _ => error,
        }
    }

    fn text(&self, found: &Differences) -> String {
        let mut lines = Vec::new();
        if found.pages > 0 {
            let runs = count(found.runs.len() as u64, "run");
            let (pages, bytes) = (count(found.pages, "page"), size(found.bytes));
            let differ = if found.pages == 1 {
                "differs"
            } else {
                "differ"
            };
            lines.push(format!("{pages} {differ}: {bytes} in {runs}"));
        }
        for run in found.runs.iter().take(self.most) {
            let (start, bytes) = (run.guest_address, size(run.bytes));
            let end = start.saturating_add(run.bytes);
            lines.push(format!("  {start:#x}..{end:#x}, {bytes}"));
        }
        if found.runs.len() > self.most {
            let more = found.runs.len() - self.most;
            lines.push(format!("  and {more} more: --most or --json lists them"));
        }
        if found.metadata_differs {
            lines.push("the metadata differs".to_owned());
        }
        match lines.is_empty() {
            true => "the same".to_owned(),
            false => lines.join("\n"),
        }
    }
}

fn differences(session: &Session, one: &Chain, other: &Chain) -> anyhow::Result<Differences> {
    let (old, new) = (one.ram_size(), other.ram_size());
    if old != new {
        return Err(Failure::OtherGuest { old, new }.into());
    }
    let regions = [input::regions(one), input::regions(other)];
    if let [Some(old), Some(new)] = regions
        && !input::same_regions(old, new)
    {
        let (old, new) = (text_of(old), text_of(new));
        return Err(Failure::OtherRegions { old, new }.into());
    }
    let page_bytes = one.writable_page_size().min(other.writable_page_size());
    let progress = &mut session.progress("comparing");
    let compared = compare(one, other, old, page_bytes, progress);
    let changed = compared.context("the two states cannot be compared")?;
    let all = [0..old];
    let regions = regions.into_iter().flatten().find(|it| !it.is_empty());
    let regions = regions.unwrap_or(&all);
    let runs = changed.runs().flat_map(|run| at_addresses(regions, run));
    let runs: Vec<_> = runs.collect();
    let bytes = runs.iter().map(|run| run.bytes).sum();
    // A raw image has none, and says nothing about that of the state.
    let metadata = one.metadata().zip(other.metadata());
    let metadata_differs = metadata.is_some_and(|(one, other)| one != other);
    Ok(Differences {
        same: bytes == 0 && !metadata_differs,
        ram_bytes: old,
        page_bytes,
        pages: bytes / page_bytes,
        bytes,
        metadata_differs,
        runs,
    })
}

/// Returns the parts of a run of the RAM by their guest-physical addresses.
fn at_addresses(regions: &[Range<u64>], run: Range<u64>) -> Vec<Run> {
    let mut offset = 0;
    let mut parts = Vec::new();
    for region in regions {
        let end = offset + (region.end - region.start);
        let (from, to) = (run.start.max(offset), run.end.min(end));
        if from < to {
            parts.push(Run {
                guest_address: region.start + (from - offset),
                offset: from,
                bytes: to - from,
            });
        }
        offset = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_over_a_gap_has_an_address_on_each_side() {
        let parts = at_addresses(&[0..0x4000, 0x10_0000..0x10_4000], 0x3000..0x6000);
        let parts: Vec<_> = parts
            .iter()
            .map(|part| (part.guest_address, part.offset, part.bytes))
            .collect();
        assert_eq!(
            parts,
            [(0x3000, 0x3000, 0x1000), (0x10_0000, 0x4000, 0x2000)]
        );
    }
}
