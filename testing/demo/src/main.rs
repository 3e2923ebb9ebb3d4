//! Snapshots a running guest, restores the chain into a new one, and proves that it continues
//! correctly.
//!
//! The restored RAM must equal the original's byte for byte. Then both guests continue, check their
//! ledgers, and must reach the digest that [`guests::oracle`] computes without any guest.
//!
//! Run it by `cargo xtask demo`.

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod live;
mod picture;
mod report;
mod restore;
mod snapshots;
mod verify;

#[cfg(test)]
mod tests;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use guests::guest::Guest;
use guests::kind::Kind;
use guests::ledger::Layout;
use guests::oracle;
use harness::interrupt::Interrupt;
use indicatif::{BinaryBytes, HumanCount};
use xshell::Shell;

use picture::Picture;
use report::{Progress, Snapshot, say};
use restore::Files;
use snapshots::Snapshots;
use verify::Proof;

/// Snapshot a running guest, restore it into a new one, and prove that it continues correctly
///
/// A guest keeps a ledger with checksums in its RAM. A full snapshot is taken while it runs, then a
/// diff each round. The chain is restored into a new guest, whose RAM must equal the original's
/// byte for byte; then both continue, check their ledgers, and must reach the digest of a ledger
/// that is computed without a guest. Exit code 0 means that all of this held.
#[derive(Parser)]
#[command(name = "cargo xtask demo", bin_name = "cargo xtask demo")]
struct Demo {
    /// Snapshot a KVM guest with two vCPUs while it runs, by stop-and-copy, pre-copy and
    /// copy-on-write, and compare its pauses and its work rate
    #[arg(long, conflicts_with_all = ["rounds", "steps", "guest"])]
    live: bool,
    /// The guest's RAM, in binary units: 256M, 4G, 1.5GiB [default: 256M; 4G with --live, or less
    /// if the machine has less memory]
    #[arg(long, value_parser = ram_size)]
    ram: Option<u64>,
    /// The number of diffs to take after the full snapshot
    #[arg(long, default_value_t = 8)]
    rounds: u64,
    /// The number of steps in each round; a step rewrites a page
    #[arg(long, default_value_t = 20_000, value_parser = clap::value_parser!(u64).range(1..=1 << 32))]
    steps: u64,
    /// The kind of guest [default: the best that this machine has]
    #[arg(long, value_enum)]
    guest: Option<Kind>,
    /// The directory for the snapshots: choose the file system to write to [default: target/demo]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Keep the snapshot files
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let demo = Demo::parse();
    harness::run(|sh| demo.run(sh))
}

impl Demo {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        let interrupt = Interrupt::catch()?;
        let out = sh.current_dir().join("target").join("demo");
        let dir = self.dir.as_deref().unwrap_or(&out);
        for dir in [dir, &out] {
            fs::create_dir_all(dir).with_context(|| format!("can't make {}", dir.display()))?;
        }
        let snapshots = tempfile::Builder::new()
            .prefix("snapshots-")
            .tempdir_in(dir)
            .with_context(|| {
                format!("can't make a directory for snapshots in {}", dir.display())
            })?;
        let progress = Progress::new(interrupt);
        let story = self.story(snapshots.path(), &progress);
        progress.phase("removing the snapshots", 0);
        let (kept, removed) = if self.keep {
            (Some(snapshots.keep()), Ok(()))
        } else {
            (None, snapshots.close())
        };
        progress.finish();
        // An interruption takes precedence over the result of the work that it stopped.
        progress.interrupted()?;
        let story = story?;

        story.show(&out)?;
        if let Some(kept) = kept {
            say(format_args!("snapshots: {}", kept.display()))?;
        }
        removed.context("can't remove the snapshots")?;
        story.close()
    }

    /// Runs the demo that was asked for.
    fn story(&self, dir: &Path, progress: &Progress) -> anyhow::Result<Box<dyn Outcome>> {
        if self.live {
            return live_story(self.ram, dir, progress);
        }
        let ram = self.ram.unwrap_or(RAM);
        let plan = Plan {
            kind: self.announce(ram)?,
            layout: Layout::of(ram),
            rounds: self.rounds,
            steps: self.steps,
            dir,
        };
        Ok(Box::new(plan.carry_out(progress, |_| Ok(()))?))
    }

    /// Prints the kind of guest that runs, and the reason.
    fn announce(&self, ram: u64) -> anyhow::Result<Kind> {
        let ram = BinaryBytes(ram);
        if let Some(kind) = self.guest {
            say(format_args!("guest: {kind}, {ram} of RAM (as requested)"))?;
            return Ok(kind);
        }
        let (kind, why_not) = Kind::best()?;
        let why = match why_not.as_slice() {
            [] => "the best available on this machine".to_owned(),
            reasons => format!("others are not available: {}", reasons.join("; ")),
        };
        say(format_args!("guest: {kind}, {ram} of RAM ({why})"))?;
        Ok(kind)
    }
}

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
fn live_story(
    ram: Option<u64>,
    dir: &Path,
    progress: &Progress,
) -> anyhow::Result<Box<dyn Outcome>> {
    Ok(Box::new(live::run(ram, dir, progress)?))
}

#[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
fn live_story(_: Option<u64>, _: &Path, _: &Progress) -> anyhow::Result<Box<dyn Outcome>> {
    bail!("--live requires KVM and userfaultfd: Linux on x86-64")
}

/// The size of a guest's RAM as given on the command line.
fn ram_size(text: &str) -> Result<u64, String> {
    let config = parse_size::Config::new().with_binary();
    let size = config
        .parse_size(text)
        .map_err(|error| format!("{error}: write 256M or 4G"))?;
    // The largest page of a machine that this runs on.
    const MULTIPLE: u64 = 64 << 10;
    if size < Layout::MIN_RAM {
        return Err(format!(
            "the ledger needs at least {}",
            BinaryBytes(Layout::MIN_RAM)
        ));
    }
    if !size.is_multiple_of(MULTIPLE) {
        return Err(format!(
            "{size} bytes are not a multiple of {}",
            BinaryBytes(MULTIPLE)
        ));
    }
    if size > Layout::MAX_RAM {
        return Err(format!(
            "the demo's machine has at most {}",
            BinaryBytes(Layout::MAX_RAM)
        ));
    }
    Ok(size)
}

/// The RAM of a guest whose snapshots are a chain.
const RAM: u64 = 256 << 20;

/// The number of steps between updates of the progress bar and checks for an interrupt.
const SPELL: u64 = 1 << 12;

/// The parameters of a demo.
struct Plan<'a> {
    kind: Kind,
    layout: Layout,
    rounds: u64,
    steps: u64,
    dir: &'a Path,
}

/// The results of a demo.
struct Story {
    table: Vec<Snapshot>,
    picture: Picture,
    proof: Proof,
    pages: u64,
    ram: u64,
}

impl Plan<'_> {
    /// Runs the whole demo. `tamper` may corrupt the files before they are restored; the tests
    /// check that the verification then fails.
    fn carry_out(
        &self,
        progress: &Progress,
        tamper: impl FnOnce(&mut Files) -> anyhow::Result<()>,
    ) -> anyhow::Result<Story> {
        let mut original = self.kind.create(self.layout)?;
        original.boot()?;
        // Before the first snapshot, enough work to have written a good part of the RAM.
        self.work(
            &mut *original,
            self.steps.max(self.layout.pages / 2),
            progress,
            "the guest boots and works",
        )?;
        let tracker = original.track()?;
        let page_size = tracker.dirty().page_size();

        let mut snapshots = Snapshots::new(
            tracker,
            self.dir,
            Picture::new(self.layout.ram, original.gap()),
            progress,
        );
        snapshots.full(&mut *original, self.steps.div_ceil(16))?;
        for round in 1..=self.rounds {
            self.work(
                &mut *original,
                self.steps,
                progress,
                &format!("round {round} of {}", self.rounds),
            )?;
            snapshots.diff(&mut *original, round)?;
        }
        snapshots.settle()?;
        tamper(&mut snapshots.files)?;

        let mut restored = self.kind.create(self.layout)?;
        snapshots
            .files
            .restore(&mut *restored, page_size, progress)?;
        let different =
            verify::compare(&original.ram(), &restored.ram(), self.layout.ram, progress)?;
        let mut proof = verify::go_on(&mut *original, &mut *restored, self.layout, progress)?;
        proof.mismatches.splice(0..0, different);
        Ok(Story {
            table: snapshots.table,
            picture: snapshots.picture,
            proof,
            pages: self.layout.pages,
            ram: self.layout.ram,
        })
    }

    /// Runs the guest for `steps` steps.
    fn work(
        &self,
        guest: &mut dyn Guest,
        steps: u64,
        progress: &Progress,
        phase: &str,
    ) -> anyhow::Result<()> {
        let start = guest.steps();
        progress.phase(phase, steps);
        while guest.steps() < start + steps {
            guest.work_until((guest.steps() + SPELL).min(start + steps))?;
            progress.at(guest.steps() - start)?;
        }
        Ok(())
    }
}

/// The results of a demo, as they are shown.
trait Outcome {
    /// Prints the results, and writes charts to `out`.
    fn show(&self, out: &Path) -> anyhow::Result<()>;

    /// Prints the closing line, or returns an error for the comparisons that failed.
    fn close(self: Box<Self>) -> anyhow::Result<()>;
}

impl Outcome for Story {
    fn show(&self, out: &Path) -> anyhow::Result<()> {
        say(report::table(&self.table))?;
        say(report::LEGEND)?;
        say(self.picture.text())?;
        let svg = out.join("dirty-pages.svg");
        let saved = self.picture.save(&svg);
        saved.with_context(|| format!("can't write {}", svg.display()))?;
        Ok(say(format_args!("chart (SVG): {}", svg.display()))?)
    }

    fn close(self: Box<Self>) -> anyhow::Result<()> {
        let Proof {
            mismatches,
            steps,
            digest,
        } = self.proof;
        if !mismatches.is_empty() {
            bail!("not verified: {}", mismatches.join("; "));
        }
        say(format_args!(
            "verified: {} of RAM restored from {} files equal the original's, byte for byte; after {} more steps both guests find all {} pages of their ledgers intact and reach the digest {digest:#018x}, as does the ledger computed without a guest",
            BinaryBytes(self.ram),
            self.table.len(),
            HumanCount(steps),
            HumanCount(self.pages),
        ))?;
        Ok(())
    }
}
