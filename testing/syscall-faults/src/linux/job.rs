//! One scenario: carried out once as it is, and then once for each thing that can go wrong.

use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use harness::interrupt::Interrupt;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::sys::statvfs::statvfs;
use random::Random;
use scenarios::check::Tidying;
use scenarios::commits::RAM;
use scenarios::directory::names;
use test_machine::TinyTmpfs;

use super::case::Case;
use super::child::{Child, Report, WITHIN};
use super::injected_fault::{self, InjectedFault};
use super::oracle::{FaultViolation, Run};
use super::outcome::ReportedNext;
use super::traced_call::Call;
use super::tracer::{self, End, Trace};

/// How runs are chosen, and where they take place.
pub(super) struct Settings<'a> {
    pub room: &'a Path,
    pub seed: u64,
    /// At most so many faults of a scenario.
    pub sample: Option<usize>,
    /// Whether file systems of their own can be mounted.
    pub mounts: bool,
    pub interrupt: &'a Interrupt,
}

/// What came of a scenario.
pub(super) struct Done {
    pub case: &'static Case,
    pub calls: usize,
    /// Whether the completions of an io_uring could not be seen.
    pub blind: bool,
    /// Faults that happened.
    pub faults: Vec<InjectedFault>,
    /// Whose call did not come.
    pub not_met: usize,
    pub violations: Vec<(InjectedFault, FaultViolation)>,
    pub time: Duration,
}

enum Outcome {
    /// What it said.
    Right(String),
    NotMet,
    Wrong(FaultViolation),
}

/// All that can go wrong in a scenario; with `mutant`, up to the first violation.
pub(super) fn run(case: &'static Case, settings: &Settings, mutant: bool) -> anyhow::Result<Done> {
    let start = Instant::now();
    let (calls, blind) = record(case, settings)?;
    let faults = plan(case, &calls, settings);
    let next = AtomicUsize::new(0);
    let done = Mutex::new(Done {
        case,
        calls: calls.len(),
        blind,
        faults: Vec::new(),
        not_met: 0,
        violations: Vec::new(),
        time: Duration::ZERO,
    });
    let worker = || -> anyhow::Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            let Some(faults_in_turn) = faults.get(number) else {
                return Ok(());
            };
            for fault in faults_in_turn {
                settings.interrupt.check()?;
                let outcome = once(case, fault, number, settings);
                let outcome = outcome.with_context(|| fault.to_string())?;
                let mut done = done.lock().expect("no panic");
                match outcome {
                    Outcome::NotMet if matches!(fault, InjectedFault::Twice(..)) => break,
                    Outcome::NotMet => done.not_met += 1,
                    Outcome::Right(_) => done.faults.push(*fault),
                    Outcome::Wrong(violation) => {
                        done.faults.push(*fault);
                        done.violations.push((*fault, violation));
                        if mutant {
                            next.store(faults.len(), Ordering::Relaxed);
                        }
                    }
                }
            }
        }
    };
    let workers = thread::available_parallelism()?.get();
    thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        let results = workers
            .into_iter()
            .map(|worker| worker.join().expect("no panic"));
        results.collect::<anyhow::Result<Vec<()>>>()
    })
    .with_context(|| case.scenario.name)?;
    let mut done = done.into_inner().expect("no panic");
    done.time = start.elapsed();
    Ok(done)
}

/// One fault of a scenario, by itself, cleared up in each way. What the scenario ended with.
pub(super) fn again(
    case: &Case,
    fault: &InjectedFault,
    settings: &Settings,
) -> anyhow::Result<String> {
    let mut said = String::new();
    for number in 0..2 {
        match once(case, fault, number, settings)? {
            Outcome::Right(text) => said = text,
            Outcome::NotMet => bail!("the call was not made"),
            Outcome::Wrong(violation) => bail!("{violation}"),
        }
    }
    Ok(said)
}

/// The calls of a run in which nothing goes wrong.
fn record(case: &Case, settings: &Settings) -> anyhow::Result<(Vec<Call>, bool)> {
    let scratch = tempfile::tempdir_in(settings.room)?;
    let dir = scratch.path().join("dir");
    fs::create_dir(&dir)?;
    (case.scenario.prepare)(&dir).context("can't prepare")?;
    let (trace, report, stderr) = traced(case, None, &dir, scratch.path())?;
    let said = report.map(|report| report.said);
    ensure!(
        said.as_ref()
            .is_some_and(|said| said.next == ReportedNext::All),
        "{}: it fails without a fault: {said:?} {stderr}",
        case.scenario.name
    );
    Ok((trace.calls, trace.blind))
}

/// Lists of faults, each of which goes on until one's call does not come.
fn plan(case: &Case, calls: &[Call], settings: &Settings) -> Vec<Vec<InjectedFault>> {
    let is_its_own = |call: &&Call| case.threads && call.kind.name == "clone3";
    let calls: Vec<_> = calls
        .iter()
        .filter(|call| !is_its_own(call))
        .copied()
        .collect();
    let possible =
        |fault: &InjectedFault| settings.mounts || !matches!(fault, InjectedFault::Room(_));
    let space = injected_fault::space(RAM).into_iter().filter(possible);
    let alone = injected_fault::all_of(&calls).into_iter().chain(space);
    let mut faults: Vec<_> = alone.map(|fault| vec![fault]).collect();
    faults.extend(injected_fault::pairs_of(&calls));
    if let Some(sample) = settings.sample {
        faults = chosen(faults, sample, settings.seed);
    }
    faults
}

/// So many of `all`, in their order.
fn chosen<T>(all: Vec<T>, sample: usize, seed: u64) -> Vec<T> {
    let mut numbered: Vec<_> = all.into_iter().enumerate().collect();
    let mut random = Random::seeded(seed);
    let mut keyed: Vec<_> = numbered
        .drain(..)
        .map(|one| (random.number(), one))
        .collect();
    keyed.sort_by_key(|(key, _)| *key);
    keyed.truncate(sample);
    keyed.sort_by_key(|(_, (number, _))| *number);
    keyed.into_iter().map(|(_, (_, one))| one).collect()
}

fn once(
    case: &Case,
    fault: &InjectedFault,
    number: usize,
    settings: &Settings,
) -> anyhow::Result<Outcome> {
    /// Enough for what any scenario prepares.
    const DISK: u64 = 16 << 20;
    let scratch = tempfile::tempdir_in(settings.room)?;
    let small = match fault {
        InjectedFault::Room(_) => Some(TinyTmpfs::new(DISK).context("a tmpfs")?),
        _ => None,
    };
    let dir = small
        .as_ref()
        .map_or(scratch.path(), TinyTmpfs::path)
        .join("dir");
    fs::create_dir(&dir)?;
    (case.scenario.prepare)(&dir).context("can't prepare")?;
    let before = names(&dir, &[])?;
    let (trace, report, stderr) = traced(case, Some(fault), &dir, scratch.path())?;
    if fault.at().is_some() && !trace.met && trace.end == End::Exited(0) {
        return Ok(Outcome::NotMet);
    }
    let said = report.as_ref().map(|report| report.said.text.clone());
    let said = said.unwrap_or_else(|| format!("{:?}", trace.end));
    let run = Run {
        case,
        fault: Some(fault),
        dir: &dir,
        before: &before,
        trace: &trace,
        report,
        stderr,
        tidying: match number % 2 {
            0 => Tidying::Recover,
            _ => Tidying::NextWriter,
        },
    };
    Ok(match run.judge() {
        Ok(()) => Outcome::Right(said),
        Err(violation) => Outcome::Wrong(violation),
    })
}

/// Carries the scenario out in `dir`.
fn traced(
    case: &Case,
    fault: Option<&InjectedFault>,
    dir: &Path,
    scratch: &Path,
) -> anyhow::Result<(Trace, Option<Report>, String)> {
    let (report, stderr) = (scratch.join("report"), scratch.join("stderr"));
    let limit = match fault {
        Some(InjectedFault::Limit(bytes)) => Some(*bytes),
        _ => None,
    };
    let ballast = match fault {
        Some(InjectedFault::Room(bytes)) => Some(Ballast::leaving(*bytes, dir)?),
        _ => None,
    };
    let mut command = Child::new(case.scenario.name, dir, &report, limit).command()?;
    command.stderr(File::create(&stderr)?);
    let trace = tracer::trace(command, fault, case.lacks, WITHIN)?;
    drop(ballast);
    let stderr = fs::read_to_string(&stderr)?;
    // A panic makes some, too.
    ensure!(
        trace.unknown.is_empty(),
        "calls that no table lists: {:?}: {stderr}",
        trace.unknown
    );
    let report = match fs::read(&report) {
        Ok(text) => Some(serde_json::from_slice(&text)?),
        Err(error) if error.kind() == io::ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    Ok((trace, report, stderr))
}

/// A file that takes up room beside a directory.
struct Ballast(std::path::PathBuf);

impl Ballast {
    fn leaving(bytes: u64, dir: &Path) -> anyhow::Result<Self> {
        let path = dir.with_extension("ballast");
        let file = File::create_new(&path)?;
        let file_system = statvfs(dir)?;
        let free = file_system.blocks_available() * file_system.fragment_size();
        let taken = free.saturating_sub(bytes);
        if taken > 0 {
            fallocate(&file, FallocateFlags::empty(), 0, i64::try_from(taken)?)?;
        }
        Ok(Self(path))
    }
}

impl Drop for Ballast {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sample_is_in_order_and_another_with_another_seed() {
        let of = |seed| chosen((0..1000).collect::<Vec<_>>(), 20, seed);
        assert_eq!(of(1).len(), 20);
        assert!(of(1).is_sorted());
        assert_eq!(of(1), of(1));
        assert_ne!(of(1), of(2));
        assert_eq!(chosen(vec![1, 2, 3], 20, 1), [1, 2, 3]);
    }
}
