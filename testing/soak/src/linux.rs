//! `cargo xtask soak`.

mod chain;
mod child;
mod embedded;
mod guest_loop;
mod ledger;
mod live_guest;
mod plan;
mod save;
mod saved_guest;
mod served_guest;
mod settings;
mod shadow;
mod shape;
mod stats;

use std::fs;
use std::io::IsTerminal;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::str::FromStr;
use std::sync::atomic::Ordering;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use clap::{Parser, ValueEnum};
use guests::kind::Kind;
use harness::interrupt::Interrupt;
use harness::namespace::keep_private;
use harness::process::this_program;
use harness::record::Record;
use harness::runs_here;
use random::Random;
use test_machine::Need;
use xshell::Shell;

use guest_loop::{Life, Limit};
use plan::Means;
use settings::{Mutant, Settings};
use stats::{Held, Tally};

/// Save guests repeatedly while faults are injected, and compare everything that was saved
///
/// Several guests run at a time: KVM's virtual machines, and threads of this process whose writes
/// userfaultfd or mprotect tracks. Each save is chosen at random: full or a diff, of a stopped or a
/// running guest, in any layout, page size, engine and durability. A third of the saves has an
/// injected fault: it is cancelled, cannot read or write, is blocked by another file, or is killed.
/// After each save, the images are verified, the RAM is restored from them in one of six ways, and
/// compared with a copy that was taken while the guest was stopped. After a failure the next save
/// is a diff: no mark may be lost. Of every fourth guest, live snapshots are taken by all methods,
/// a third of which is cancelled at some step. Every eighth is a VMM of another process whose RAM
/// is served from a chain: it touches and discards pages with several threads, or is killed. Once a
/// minute, while no guest runs, descriptors, threads and mappings are counted.
///
/// The first difference ends the run, keeps the files, and prints the seed, the guest and the
/// round. The same seed makes the same choices. The progress of the threads depends on the machine.
/// Disk: at most 12 files of 16 MiB for each guest.
#[derive(Parser)]
#[command(name = "cargo xtask soak", bin_name = "cargo xtask soak")]
struct Soak {
    /// The duration in minutes, such as 60 or 0.5
    #[arg(long, default_value_t = 60.0)]
    minutes: f64,
    /// The number of rounds of each guest, instead of a duration
    #[arg(long, conflicts_with = "minutes", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: Option<u64>,
    /// The seed of all random choices [default: a random one, which is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// The directory for the images: choose the file system to write to [default: target/soak]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The number of guests that run concurrently
    #[arg(long, default_value_t = 6, value_parser = clap::value_parser!(u64).range(1..=64))]
    guests: u64,
    /// Run only this life of a guest, as a failure prints it; requires its --seed
    #[arg(long, value_name = "GUEST.LIFE", requires = "seed")]
    only: Option<One>,
    /// Save with this mutant, which must be detected
    #[arg(long, value_enum, alias = "plant", value_name = "NAME")]
    mutant: Option<Mutant>,
    #[command(flatten)]
    record: Record,
    /// The parameters of a save by another process
    #[arg(long, hide = true)]
    child: Option<PathBuf>,
}

/// One life of one guest.
#[derive(Clone, Copy, Debug)]
struct One {
    guest: u64,
    life: u64,
}

impl FromStr for One {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers = text.split_once('.');
        let numbers =
            numbers.and_then(|(guest, life)| Some((guest.parse().ok()?, life.parse().ok()?)));
        let (guest, life) = numbers.ok_or("two numbers, as in 3.17")?;
        Ok(Self { guest, life })
    }
}

/// The time for which guests run before held resources are counted.
const SHIFT: Duration = Duration::from_secs(60);

/// A setting by which glibc returns freed allocations from this size on to the kernel. By default,
/// it keeps more and more of the large ones, which would hide leaks.
const MAPPED_FROM: (&str, &str) = ("MALLOC_MMAP_THRESHOLD_", "262144");

pub(crate) fn main() -> ExitCode {
    // The process of a VMM whose RAM is served.
    page_client::run();
    let soak = Soak::parse();
    harness::run(|sh| soak.run(sh))
}

impl Soak {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if let Some(order) = &self.child {
            return child::save(order);
        }
        let (name, from) = MAPPED_FROM;
        if std::env::var_os(name).is_none() {
            let mut again = Command::new(this_program()?);
            again.args(std::env::args_os().skip(1)).env(name, from);
            return Err(again.exec()).context("can't start again");
        }
        let interrupt = Interrupt::catch()?;
        let root = Need::Root.is_met();
        if root {
            keep_private()?;
        }
        let dir = self.dir.clone();
        let dir = dir.unwrap_or_else(|| sh.current_dir().join("target/soak"));
        fs::create_dir_all(&dir).with_context(|| format!("can't make {}", dir.display()))?;
        let files = tempfile::Builder::new().prefix("soak-").tempdir_in(&dir)?;
        let settings = Settings {
            seed: self.seed.unwrap_or_else(|| Random::new().below(u64::MAX)),
            dir: std::path::absolute(files.path())?,
            kinds: kinds()?,
            means: Means { root, child: true },
            program: Some(this_program()?.to_owned()),
            mutant: self.mutant,
            tally: Tally::default(),
            interrupt,
        };
        println!("seed {}", settings.seed);
        let soaked = self.soak(&settings);
        println!("faults: {}", settings.tally.faults);
        println!("restores: {}", settings.tally.restores);
        let said = settings.tally.to_string();
        if let Err(error) = soaked {
            println!("{said}");
            println!("the files: {}", files.keep().display());
            return Err(error);
        }
        // What was cut short is said, and not kept.
        settings
            .interrupt
            .check()
            .inspect_err(|_| println!("{said}"))?;
        let long = match self.rounds {
            Some(rounds) => format!("{rounds} rounds of each guest"),
            None => format!("{} minutes", self.minutes),
        };
        let how = format!("seed {}, {long}", settings.seed);
        self.record.conclude(sh, "cargo xtask soak", &said, &how)
    }

    /// Guests come and go for as long as was asked for, in shifts of a minute, or in two of so many
    /// rounds.
    fn soak(&self, settings: &Settings) -> anyhow::Result<()> {
        let minutes = self.minutes;
        ensure!((0.0..=1e6).contains(&minutes), "{minutes} minutes");
        let start = Instant::now();
        let end = start + Duration::from_secs_f64(60.0 * minutes);
        if let Some(One { guest, life }) = self.only {
            let limit = self.rounds.map_or(Limit::Until(end), Limit::Rounds);
            return live(settings, guest, life, limit, &mut 0)
                .inspect_err(|error| settings.tally.failed(error));
        }
        let mut lives = vec![0; self.guests as usize];
        let mut first = None;
        let mut shift = |limit| {
            work(settings, &mut lives, limit, start)?;
            let held = match first {
                None => *first.insert(Held::now()?),
                Some(first) => Held::check(first)?,
            };
            println!(
                "{:>5} s: {}; {held}",
                start.elapsed().as_secs(),
                settings.tally
            );
            anyhow::Ok(())
        };
        // The first shift is short: what is held after it is what later ones are compared with.
        if let Some(rounds) = self.rounds {
            let short = rounds.div_ceil(3);
            for rounds in [short, rounds - short] {
                if rounds > 0 && settings.interrupt.check().is_ok() {
                    shift(Limit::Rounds(rounds))?;
                }
            }
            return Ok(());
        }
        let mut long = SHIFT.min((end - start) / 3);
        while Instant::now() < end && settings.interrupt.check().is_ok() {
            shift(Limit::Until(end.min(Instant::now() + long)))?;
            long = SHIFT;
        }
        Ok(())
    }
}

/// Returns the kinds of guests that this machine supports.
fn kinds() -> anyhow::Result<Vec<Kind>> {
    let ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    let mut kinds = Vec::new();
    let supported = Kind::value_variants().iter().rev();
    for kind in supported.filter(|kind| kind.is_supported()) {
        let runs = match kind.need() {
            Some(need) => runs_here(need, &format!("soak with {kind}"), "", ci)?,
            None => true,
        };
        if runs {
            kinds.push(*kind);
        }
    }
    Ok(kinds)
}

/// Lives a life of a guest.
fn live(
    settings: &Settings,
    guest: u64,
    life: u64,
    limit: Limit,
    rounds: &mut u64,
) -> anyhow::Result<()> {
    if live_guest::is_live(guest) {
        return live_guest::live(settings, guest, life, limit, rounds);
    }
    match served_guest::is_served(guest) {
        true => served_guest::live(settings, guest, life, limit, rounds),
        false => Life::live(settings, guest, life, limit, rounds),
    }
}

/// A limit that no round reaches.
const PATIENCE: Duration = Duration::from_secs(300);

/// Runs every guest, one life after another, until the limit or the first failure.
fn work(
    settings: &Settings,
    lives: &mut [u64],
    limit: Limit,
    start: Instant,
) -> anyhow::Result<()> {
    let failure = Mutex::new(None);
    let failure = &failure;
    let failed = || failure.lock().unwrap_or_else(PoisonError::into_inner);
    let quiet = !std::io::stdout().is_terminal();
    thread::scope(|scope| {
        let mut guests = Vec::new();
        for (guest, life) in lives.iter_mut().enumerate() {
            guests.push(scope.spawn(move || {
                let mut rounds = 0;
                while !limit.is_over(rounds)
                    && settings.interrupt.check().is_ok()
                    && failed().is_none()
                {
                    let lived = live(settings, guest as u64, *life, limit, &mut rounds);
                    if let Err(error) = lived {
                        settings.tally.failed(&error);
                        failed().get_or_insert(error);
                    }
                    *life += 1;
                }
            }));
        }
        let mut said = Instant::now();
        // Without this, a hang would last and not be reported.
        let rounds = || settings.tally.rounds.load(Ordering::Relaxed);
        let mut last = (rounds(), Instant::now());
        while guests.iter().any(|guest| !guest.is_finished()) {
            thread::sleep(Duration::from_millis(20));
            if rounds() > last.0 {
                last = (rounds(), Instant::now());
            }
            if last.1.elapsed() > PATIENCE {
                let hang = guests.iter().map(|guest| !guest.is_finished());
                let hang: Vec<_> = hang.enumerate().filter(|(_, hangs)| *hangs).collect();
                eprintln!("error: guests hang: {hang:?} (seed {})", settings.seed);
                // With a core, where those are kept.
                std::process::abort();
            }
            if !quiet && said.elapsed() > Duration::from_secs(10) {
                println!("{:>5} s: {}", start.elapsed().as_secs(), settings.tally);
                said = Instant::now();
            }
        }
        guests.into_iter().try_for_each(|guest| {
            guest
                .join()
                .map_err(|_| anyhow!("a guest's thread panicked"))
        })
    })?;
    let error = failed().take();
    error.map_or(Ok(()), Err)
}
