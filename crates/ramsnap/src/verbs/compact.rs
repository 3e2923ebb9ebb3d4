//! `ramsnap compact`: shorter chains in a directory.

mod left;
mod policy;

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use memory_image::Chain;
use serde::Serialize;

use crate::args::{Formats, ImageFile, RawImages};
use crate::catalog::Catalog;
use crate::chain_lock::{ChainLock, Sharing};
use crate::exit_status::ExitStatus;
use crate::failure::ImagesFailure;
use crate::in_place::{Merging, Neighbors};
use crate::numbers::{duration, size as bytes_of};
use crate::print::{self, JsonPath, count, size};
use crate::session::Session;
use crate::verbs::merge::layout_of_first;
use crate::{in_place, input, memory_reserve, save, words};
use left::Left;
use policy::{Chains, Link};

/// Merge the oldest diffs of each chain in a directory into its full image, and remove them
///
/// Each chain keeps its newest states: as many files as --keep, those younger than --older-than, or
/// as many as fit into --max-size. With several of these options, the chain is made as short as any
/// of them demands. The full image becomes the state of the last merged diff, as by `ramsnap
/// commit`: at every instant, also after a crash, the states that are kept can be read. A state
/// that several diffs were taken after is kept, and so are raw images and diffs without a full
/// image. A warning names the diffs that are not merged for such a reason.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    ramsnap compact /var/lib/snapshots --keep 7\n  \
    ramsnap compact . --older-than 30d --dry-run\n  \
    ramsnap compact . --max-size 10GiB")]
pub struct Compact {
    /// The directory
    #[arg(value_name = "DIR")]
    dir: PathBuf,
    /// Keep at most so many files of each chain: the full image and the newest diffs
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    keep: Option<u64>,
    /// Merge diffs that were written so long ago (30d, 12h)
    #[arg(long, value_name = "AGE", value_parser = duration)]
    older_than: Option<Duration>,
    /// Merge diffs until the files of a chain have no more bytes than this, if that is possible
    #[arg(long, value_name = "SIZE", value_parser = bytes_of)]
    max_size: Option<u64>,
    /// List the files that would be merged, and change nothing
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Do not compare the files with their checksums first
    #[arg(long)]
    no_verify: bool,
    /// As JSON: an object, sizes in bytes. A path that is not UTF-8 is an object: text, and
    /// bytes_hex
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    dry_run: bool,
    chains: Vec<Compacted>,
    /// Diffs that no policy merges.
    not_merged: Vec<Left>,
}

/// A chain that was made shorter, or would be.
#[derive(Debug, Serialize)]
struct Compacted {
    /// The full image.
    file: JsonPath,
    merged: Vec<JsonPath>,
    /// The files of the chain that stay, without the full image.
    kept: u64,
    /// The bytes of the full image and the merged diffs.
    bytes_before: u64,
    /// The bytes of the full image now.
    bytes_after: Option<u64>,
}

impl Compact {
    pub fn run(&self, session: &Session) -> anyhow::Result<ExitStatus> {
        if self.keep.is_none() && self.older_than.is_none() && self.max_size.is_none() {
            return Err(ImagesFailure::NoPolicy.into());
        }
        memory_reserve::check_new(&self.dir)?;
        // The directory itself, and those that links in it lead to.
        let mut files = Catalog::paths(&self.dir)?;
        files.push(self.dir.join("images"));
        let _lock = ChainLock::take(session, &files, Sharing::Exclusive)?;
        let mut neighbors = Neighbors::default();
        let chains = Chains::of(&neighbors.visible_in(&self.dir)?);
        for left in &chains.left {
            session.warn(&left.to_string());
        }
        let mut report = Report {
            dry_run: self.dry_run,
            chains: Vec::new(),
            not_merged: chains.left,
        };
        let mut failed = None;
        for chain in chains.chains {
            match self.make_shorter(session, &mut neighbors, &chain) {
                Ok(compacted) => report.chains.extend(compacted),
                Err(error) => {
                    // A failure does not prevent the other chains from being merged.
                    if let Some(other) = failed.replace(error) {
                        words::print_error(&other);
                    }
                    if session.is_cancelled() {
                        break;
                    }
                }
            }
        }
        let reported = match self.json {
            true => Session::report_as_asked(&print::json_text(&report)?),
            false if failed.is_some() && report.chains.is_empty() => Ok(()),
            false => session.report(&report.text()),
        };
        match (failed, reported) {
            (None, reported) => Ok(reported.map(|()| ExitStatus::Success)?),
            (Some(error), Ok(())) => Err(error),
            (Some(error), Err(unreported)) => {
                words::print_error(&error);
                Err(unreported.into())
            }
        }
    }

    /// Merges as many diffs as demanded. Returns `None` if there is nothing to merge.
    fn make_shorter(
        &self,
        session: &Session,
        neighbors: &mut Neighbors,
        chain: &[Link],
    ) -> anyhow::Result<Option<Compacted>> {
        match self.to_merge(session, chain)? {
            0 => Ok(None),
            merged => self.compact(session, neighbors, chain, merged).map(Some),
        }
    }

    /// Returns the number of diffs to merge into the full image.
    fn to_merge(&self, session: &Session, chain: &[Link]) -> anyhow::Result<usize> {
        let by_count = self.keep.map_or(0, |keep| policy::by_count(chain, keep));
        let by_age = self.older_than.map_or(0, |age| policy::by_age(chain, age));
        let by_size = match self.max_size {
            None => 0,
            Some(most) => policy::by_size(chain, most, |merged| {
                let chain = open(session, &chain[..=merged])?;
                Ok(chain.stored_runs().map(|run| run.end - run.start).sum())
            })?,
        };
        Ok(by_count.max(by_age).max(by_size))
    }

    fn compact(
        &self,
        session: &Session,
        neighbors: &mut Neighbors,
        links: &[Link],
        merged: usize,
    ) -> anyhow::Result<Compacted> {
        let paths = |links: &[Link]| links.iter().map(|link| link.path.clone().into()).collect();
        let mut compacted = Compacted {
            file: links[0].path.clone().into(),
            merged: paths(&links[1..=merged]),
            kept: (links.len() - 1 - merged) as u64,
            bytes_before: links[..=merged].iter().map(|link| link.bytes).sum(),
            bytes_after: None,
        };
        if self.dry_run {
            return Ok(compacted);
        }
        session.check("nothing more was merged")?;
        let chain = open(session, &links[..=merged])?;
        neighbors.check_not_needed(&chain, true)?;
        let ids: Vec<_> = chain.ids().collect();
        let replaced = self.replace(session, chain);
        neighbors.read_again(&ids);
        replaced?;
        compacted.bytes_after = links[0].path.metadata().ok().map(|it| it.len());
        Ok(compacted)
    }

    /// Puts the merged image in the place of the first file, and removes the others.
    fn replace(&self, session: &Session, chain: Chain) -> anyhow::Result<()> {
        let merging = Merging {
            layout: layout_of_first(&chain),
            skip_zeros: false,
            verify: !self.no_verify,
        };
        let staged = in_place::stage(session, &chain, merging)?;
        session.check("nothing more was merged")?;
        save::put_in_place(session, staged, || Ok(()))?;
        in_place::remove_merged(session, chain)?;
        Ok(())
    }
}

fn open(session: &Session, links: &[Link]) -> anyhow::Result<Chain> {
    let files: Vec<_> = links
        .iter()
        .map(|link| ImageFile::at(link.path.clone()))
        .collect();
    input::full_chain(session, &files, Formats::default(), &RawImages::default())
}

impl Report {
    fn text(&self) -> String {
        let done = match self.dry_run {
            true => "would be merged into it",
            false => "merged into it",
        };
        let line = |chain: &Compacted| {
            let (file, diffs) = (
                print::path(&chain.file),
                count(chain.merged.len() as u64, "diff"),
            );
            let names = chain
                .merged
                .iter()
                .map(|path| name(path))
                .collect::<Vec<_>>();
            let after = chain
                .bytes_after
                .map(|after| format!(", {} became {}", size(chain.bytes_before), size(after)));
            format!(
                "{file}: {diffs} {done}: {}{}; {} left after it",
                names.join(", "),
                after.unwrap_or_default(),
                count(chain.kept, "diff")
            )
        };
        match self.chains.is_empty() {
            true => "nothing to merge".to_owned(),
            false => self.chains.iter().map(line).collect::<Vec<_>>().join("\n"),
        }
    }
}

fn name(path: &Path) -> String {
    print::path(path.file_name().unwrap_or_default().as_ref())
}
