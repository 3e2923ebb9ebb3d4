//! `cargo xtask crash`.

mod disk;
mod job;
mod mutants;
mod record;
mod replay;
mod report;
mod saved_recording;
mod states;

use std::collections::VecDeque;
use std::hash::{BuildHasher, RandomState};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::Instant;

use anyhow::{Context, bail, ensure};
use clap::Parser;
use file_systems::{CrashStates, FileSystem};
use harness::file_systems::parser;
use harness::interrupt::Interrupt;
use harness::namespace::keep_private;
use harness::packages::{Install, Package};
use harness::record::Record;
use harness::runs_here;
use scenarios::Scenario;
use scenarios::child::Child;
use test_machine::{Need, TinyTmpfs};
use xshell::Shell;

use job::{Done, Job, Settings};
use replay::Replay;
use report::Report;
use saved_recording::SavedRecording;

/// Returns the arguments of this program.
fn packages() -> Vec<Package> {
    let mut packages = vec![Package::new("qemu-system-common", "qemu-storage-daemon")];
    packages.extend(harness::file_systems::packages(
        FileSystem::in_crash_states(),
    ));
    packages
}

/// Check the files that a loss of power at any moment leaves on real file systems
///
/// Runs scenarios of this workspace on mounted file systems while every write and flush of their
/// disks is logged. Then builds disks from the log as a loss of power may leave them: every prefix,
/// and prefixes in which writes that no flush followed are dropped or torn. Each is mounted,
/// recovered and checked. At the end, commits that lack a step show that the check detects errors.
/// Exit code 0 means that no state has lost or torn bytes, and that each of these commits was
/// detected.
///
/// On Linux, as root. The recording of a scenario with a state that fails stays under target/crash.
#[derive(Parser)]
#[command(name = "cargo xtask crash", bin_name = "cargo xtask crash")]
#[command(args_conflicts_with_subcommands = true)]
struct Crash {
    /// Only these scenarios, comma-separated, and no mutants
    #[arg(long, value_delimiter = ',', value_name = "SCENARIO", value_parser = known)]
    only: Vec<String>,
    /// Only these file systems, comma-separated
    #[arg(long, value_delimiter = ',', value_name = "FS")]
    #[arg(value_parser = parser(FileSystem::in_crash_states()))]
    fs: Vec<&'static FileSystem>,
    /// The maximum number of states of each scenario on each file system
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u32).range(1..))]
    states: u32,
    /// Check only the state with this number of a kept recording; requires one --only and one --fs
    #[arg(long, value_name = "NUMBER")]
    state: Option<usize>,
    /// The seed of the choice of states [default: a random one, which is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Keep all recordings
    #[arg(long)]
    keep: bool,
    /// Only these mutants, comma-separated: commits that lack a step
    #[arg(long, value_delimiter = ',', value_name = "MUTANT", value_parser = known_mutant)]
    mutant: Vec<String>,
    /// List the scenarios, the mutants and the file systems, and run nothing
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    install: Install,
    #[command(flatten)]
    record: Record,
    #[command(subcommand)]
    part: Option<Part>,
}

/// What this program does as a child of itself.
#[derive(clap::Subcommand)]
enum Part {
    #[command(hide = true)]
    Writer(Child),
}

pub(crate) fn main() -> ExitCode {
    let crash = Crash::parse();
    harness::run(|sh| crash.run(sh))
}

/// Returns whether the mutants are looked for on `fs`. They must be found on one such file system
/// at least: the others hide some mistakes.
fn reveals(fs: &FileSystem) -> bool {
    fs.crash_states == Some(CrashStates::ScenariosAndMutants)
}

/// Scenarios at a time: recording waits for the kernel most of the time, and checking for its
/// mounts.
const WORKERS: usize = 12;

fn known(name: &str) -> Result<String, String> {
    match scenario(name) {
        Some(_) => Ok(name.into()),
        None => Err("--list lists the scenarios".into()),
    }
}

fn known_mutant(name: &str) -> Result<String, String> {
    match mutants::ALL.iter().any(|mutant| mutant.name == name) {
        true => Ok(name.into()),
        false => Err("--list lists the mutants".into()),
    }
}

/// Mutants are scenarios too, if asked for: ones that fail.
fn scenario(name: &str) -> Option<&'static Scenario> {
    let mutants = mutants::ALL.iter().chain([&mutants::CONTROL]);
    scenarios::ALL
        .iter()
        .chain(mutants)
        .find(|scenario| scenario.name == name)
}

impl Crash {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if let Some(Part::Writer(writer)) = &self.part {
            return writer.run();
        }
        if self.list {
            list();
            return Ok(());
        }
        let ci = sh.var_os("CI").is_some_and(|ci| ci == "true");
        self.install.ensure(sh, &packages(), "crash")?;
        if !runs_here(Need::LoggedDisk, "crash", TAKES, ci)? {
            return Ok(());
        }
        let mut file_systems = Vec::new();
        for fs in FileSystem::in_crash_states() {
            let wanted = self.fs.is_empty() || self.fs.contains(&fs);
            if wanted && runs_here(Need::Mount(fs), fs.name, TAKES, ci)? {
                file_systems.push(fs);
            }
        }
        if !file_systems.iter().any(|fs| reveals(fs)) {
            let on = FileSystem::in_crash_states().filter(|fs| reveals(fs));
            let on: Vec<_> = on.map(|fs| fs.name).collect();
            let on = on.join(", ");
            ensure!(self.mutant.is_empty(), "mutants are tested only on {on}");
        }
        let interrupt = Interrupt::catch()?;
        keep_private()?;
        // Goes with this process, however it ends.
        let room = TinyTmpfs::new(8 << 30).context("failed to mount a tmpfs for the disks")?;
        let home = sh.current_dir().join("target/crash");
        if let Some(number) = self.state {
            return self.again(number, &home, room.path());
        }
        let settings = Settings {
            seed: self.seed.unwrap_or_else(|| RandomState::new().hash_one(0)),
            limit: self.states as usize,
            keep: self.keep,
            home: &home,
            interrupt: &interrupt,
        };
        println!("seed {}", settings.seed);
        let start = Instant::now();
        let done = work(self.jobs(&file_systems), &settings, room.path())?;
        Report {
            done,
            file_systems,
            time: start.elapsed(),
        }
        .conclude(sh, self.record, settings.seed)
    }

    fn jobs(&self, file_systems: &[&'static FileSystem]) -> VecDeque<Job> {
        let mut jobs = VecDeque::new();
        let mut add = |fs, scenario, mutant| {
            jobs.push_back(Job {
                fs,
                scenario,
                mutant,
            });
        };
        let all = self.only.is_empty() && self.mutant.is_empty();
        let named = self.only.iter().filter_map(|name| scenario(name));
        for scenario in named.chain(scenarios::ALL.iter().filter(|_| all)) {
            for fs in file_systems {
                add(*fs, scenario, false);
            }
        }
        for fs in file_systems.iter().filter(|fs| reveals(fs)) {
            let wanted = |name| all || self.mutant.iter().any(|mutant| mutant == name);
            let mutants = mutants::ALL.iter().filter(|mutant| wanted(mutant.name));
            mutants.for_each(|mutant| add(*fs, mutant, true));
            if all || !self.mutant.is_empty() {
                add(*fs, &mutants::CONTROL, false);
            }
        }
        jobs
    }

    /// Looks at one state of a recording that was kept.
    fn again(&self, number: usize, home: &Path, room: &Path) -> anyhow::Result<()> {
        let ([name], [fs]) = (self.only.as_slice(), self.fs.as_slice()) else {
            bail!("--state takes one scenario and one file system: --only SCENARIO --fs FS");
        };
        let scenario = scenario(name).context("unknown scenario")?;
        let (recording, states) = SavedRecording::new(home, fs, name).load()?;
        let state = states.get(number);
        let state = state.with_context(|| {
            format!("there is no such state: there are {} states", states.len())
        })?;
        println!("{}", recording.log.describe(state));
        let replay = Replay::new(fs, scenario, &recording, room)?;
        let tidying = job::tidying(number);
        if let Err(violation) = replay.look(state, tidying)? {
            bail!("{violation}");
        }
        println!("nothing lost, nothing torn");
        Ok(())
    }
}

/// What the needs of this task take.
const TAKES: &str = " (that takes root, loop devices, FUSE and the tools)";

/// Does the jobs, several at a time, each in a directory of its own. The first that can't be done
/// ends all.
fn work(jobs: VecDeque<Job>, settings: &Settings, room: &Path) -> anyhow::Result<Vec<Done>> {
    let jobs = Mutex::new(jobs.into_iter().enumerate());
    let done = Mutex::new(Ok(Vec::new()));
    let next = || locked(&jobs).next();
    let worker = || {
        while let Some((number, job)) = next() {
            let result = job.run(settings, &room.join(number.to_string()));
            let mut done = locked(&done);
            match (&mut *done, result) {
                (Ok(done), Ok(this)) => {
                    this.iter().for_each(report::line);
                    done.extend(this);
                }
                (Ok(_), Err(error)) => {
                    let of = format!("{} on {}", job.scenario.name, job.fs.name);
                    *done = Err(error.context(of));
                    settings.interrupt.ask();
                }
                (Err(_), _) => return,
            }
        }
    };
    thread::scope(|scope| (0..WORKERS).for_each(|_| drop(scope.spawn(worker))));
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn list() {
    for (title, all) in [("scenarios", scenarios::ALL), ("mutants", mutants::ALL)] {
        println!("{title}:");
        for scenario in all {
            println!("  {:18} {}", scenario.name, scenario.about);
        }
    }
    println!("file systems:");
    for fs in FileSystem::in_crash_states() {
        println!("  {}", fs.name);
    }
}
