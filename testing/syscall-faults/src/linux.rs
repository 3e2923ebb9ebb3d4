//! `cargo xtask faults`.

mod calls;
mod case;
mod cases;
mod child;
mod injected_fault;
mod job;
mod mutants;
mod oracle;
mod outcome;
mod report;
mod ring;
mod serve;
mod traced_call;
mod tracee;
mod tracer;
mod vmm;

use std::hash::{BuildHasher, RandomState};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Parser;
use harness::interrupt::Interrupt;
use harness::namespace::keep_private;
use harness::record::Record;
use harness::runs_here;
use scenarios::child::Child as Writer;
use test_machine::{Need, TinyTmpfs};
use xshell::Shell;

use case::Case;
use child::Child;
use injected_fault::InjectedFault;
use job::{Settings, again};
use report::Report;
use vmm::Vmm;

/// Make each system call of each scenario fail, in every way in which it can fail
///
/// Runs the scenarios of `cargo xtask crash`, and some more, in a traced child process. Then runs
/// them once more for each call and each error that the call can return. The call fails, is done
/// with its result replaced by an error, or is done in part; or the process is killed there; or a
/// second call fails while the writer cleans up after the first failure. Other runs fill the file
/// system or reach a limit at any byte. After each run, the files must be complete and as the
/// returned error states, no mark may be lost, and no resource or file may be left. At the end,
/// mutants of the library show that the check detects errors. Exit code 0 means that no fault
/// caused a violation, and that each mutant was detected.
///
/// On Linux on x86-64.
#[derive(Parser)]
#[command(name = "cargo xtask faults", bin_name = "cargo xtask faults")]
#[command(args_conflicts_with_subcommands = true)]
struct Faults {
    /// Only these scenarios, comma-separated, and no mutants
    #[arg(long, value_delimiter = ',', value_name = "SCENARIO", value_parser = known)]
    only: Vec<String>,
    /// Only this fault, as it was printed; requires one --only
    #[arg(long, value_name = "FAULT")]
    fault: Option<InjectedFault>,
    /// The maximum number of faults of each scenario, chosen by --seed
    #[arg(long, value_name = "NUMBER", value_parser = clap::value_parser!(u32).range(1..))]
    sample: Option<u32>,
    /// The seed of the choice of faults [default: a random one, which is printed]
    #[arg(long)]
    seed: Option<u64>,
    /// Omit scenarios whose threads make different calls in each run
    #[arg(long)]
    repeatable: bool,
    /// The directory to work in, on any file system [default: a tmpfs for root]
    #[arg(long, value_name = "DIRECTORY")]
    dir: Option<PathBuf>,
    /// List the scenarios, the mutants and the errors of each call, and run nothing
    #[arg(long)]
    list: bool,
    #[command(flatten)]
    record: Record,
    #[command(subcommand)]
    part: Option<Part>,
}

/// The subcommands that this program runs in its own children.
#[derive(clap::Subcommand)]
enum Part {
    #[command(hide = true)]
    Child(Child),
    #[command(hide = true)]
    Writer(Writer),
    #[command(hide = true)]
    Vmm(Vmm),
}

pub(crate) fn main() -> ExitCode {
    let faults = Faults::parse();
    harness::run(|sh| faults.run(sh))
}

fn known(name: &str) -> Result<String, String> {
    match cases::named(name) {
        Some(_) => Ok(name.into()),
        None => Err("--list lists the scenarios".into()),
    }
}

impl Faults {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        match &self.part {
            Some(Part::Child(child)) => return child.run(cases::named),
            Some(Part::Writer(writer)) => return writer.run(),
            Some(Part::Vmm(vmm)) => return vmm.run(),
            None => {}
        }
        if self.list {
            list();
            return Ok(());
        }
        let interrupt = Interrupt::catch()?;
        let ci = sh.var_os("CI").is_some_and(|ci| ci == "true");
        if !runs_here(Need::Ptrace, "faults", "", ci)? {
            return Ok(());
        }
        let mounts = runs_here(Need::Root, "full disks", "", ci)?;
        if mounts {
            keep_private()?;
        }
        let memory = match &self.dir {
            None if mounts => {
                Some(TinyTmpfs::new(1 << 30).context("failed to mount a tmpfs for the files")?)
            }
            _ => None,
        };
        let chosen = self.dir.clone().unwrap_or_else(std::env::temp_dir);
        let room = tempfile::tempdir_in(memory.as_ref().map_or(&*chosen, TinyTmpfs::path))?;
        let settings = Settings {
            room: room.path(),
            seed: self.seed.unwrap_or_else(|| RandomState::new().hash_one(0)),
            sample: self.sample.map(|sample| sample as usize),
            mounts,
            interrupt: &interrupt,
        };
        let named: Vec<_> = self
            .only
            .iter()
            .filter_map(|name| cases::named(name))
            .collect();
        if let Some(fault) = &self.fault {
            let [case] = named.as_slice() else {
                bail!("--fault takes one scenario: --only SCENARIO");
            };
            println!(
                "no violation; the result: {}",
                again(case, fault, &settings)?
            );
            return Ok(());
        }
        if settings.sample.is_some() {
            println!("seed {}", settings.seed);
        }
        self.all(sh, &named, &settings)
    }

    fn all(&self, sh: &Shell, named: &[&'static Case], settings: &Settings) -> anyhow::Result<()> {
        let start = Instant::now();
        let mut report = Report {
            done: Vec::new(),
            mutants: Vec::new(),
            time: start.elapsed(),
        };
        let wanted = |_: &&Case| named.is_empty();
        let control = std::iter::once(&mutants::CONTROL);
        let all = cases::ALL.iter().chain(control).filter(wanted);
        let may_run = |case: &&Case| !(self.repeatable && case.threads);
        for case in named.iter().copied().chain(all).filter(may_run) {
            let done = job::run(case, settings, false)?;
            report::line(&done);
            report.done.push(done);
        }
        // They make few calls, so all of them are tested.
        let whole = Settings {
            sample: None,
            ..*settings
        };
        for case in mutants::ALL.iter().filter(wanted) {
            let done = job::run(case, &whole, true)?;
            report::mutant_line(&done);
            report.mutants.push(done);
        }
        report.time = start.elapsed();
        let chosen = match settings.sample {
            None => "all".into(),
            Some(sample) => format!("at most {sample} of each scenario, seed {}", settings.seed),
        };
        report.conclude(sh, self.record, &chosen)
    }
}

fn list() {
    for (title, all) in [("scenarios", cases::ALL), ("mutants", mutants::ALL)] {
        println!("{title}:");
        for case in all {
            println!("  {:22} {}", case.scenario.name, case.scenario.about);
        }
    }
    println!("calls, with the errors injected before they are done and after:");
    for kind in calls::KINDS {
        println!("  {:22} {:?} {:?}", kind.name, kind.errors, kind.lost);
    }
    println!("left out:");
    for (name, _, why) in calls::LEFT_OUT {
        println!("  {name:18} {why}");
    }
}
