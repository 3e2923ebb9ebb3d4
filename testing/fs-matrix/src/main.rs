//! Runs named checks of the library on file systems that are mounted for real, and reports what
//! holds.
//!
//! This machine's kernel mounts some of them, Debian's kernel in QEMU the others; where there is a
//! disk, the power is cut in a commit loop. Mutants of the library show that the checks can fail.
//!
//! Run it by `cargo xtask fs-matrix`, as root. In the guests this program itself runs the checks.

mod checks;
mod finding;
mod fixture;
#[cfg(target_os = "linux")]
mod guest;
mod kind;
mod mounts;
#[cfg(target_os = "linux")]
mod nfs;
mod options;
#[cfg(target_os = "linux")]
mod power;
#[cfg(target_os = "linux")]
mod proxy;
mod report;
mod run;
mod trace;
mod worker;

use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use clap::Parser;
use harness::interrupt::Interrupt;
use xshell::Shell;

use kind::{Kind, Place, place};
use options::{FsMatrix, Part};
use report::Report;
use run::{Job, Run};

fn main() -> ExitCode {
    let matrix = FsMatrix::parse();
    harness::run(|sh| matrix.run(sh))
}

impl FsMatrix {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        match self.part {
            Some(Part::Worker(worker)) => return worker.run(),
            Some(Part::Writer(writer)) => return writer.run(),
            #[cfg(target_os = "linux")]
            Some(Part::Guest(guest)) => return guest.run(),
            #[cfg(target_os = "linux")]
            Some(Part::Power(power)) => return power.run(),
            None => {}
        }
        if self.list {
            list();
            return Ok(());
        }
        let start = Instant::now();
        let interrupt = Interrupt::catch()?;
        let jobs = self.jobs()?;
        let here = |job: &Job| matches!(job, Job::Here(kind) if place(kind) == Place::Here);
        if jobs.iter().any(here) {
            self.install.ensure(sh, &mounts::packages(), "fs-matrix")?;
            #[cfg(target_os = "linux")]
            harness::namespace::keep_private()?;
        }
        let run = Run::new(
            &self,
            interrupt,
            #[cfg(target_os = "linux")]
            self.kit(sh, &jobs)?,
        );
        let mounts = run.all(jobs)?;
        let report = Report {
            mounts,
            seconds: start.elapsed().as_secs(),
        };
        self.conclude(&report)
    }

    fn jobs(&self) -> anyhow::Result<Vec<Job>> {
        let kinds: Vec<Kind> = match (self.only.as_slice(), self.mounts.as_slice()) {
            ([], []) => kind::here().collect(),
            (only, _) => only.to_vec(),
        };
        if let Some(kind) = kinds.iter().find(|kind| place(kind) == Place::Nowhere) {
            bail!("{kind} can't be mounted on this system");
        }
        if !kinds.is_empty() && !nix::unistd::geteuid().is_root() {
            bail!("mounting takes root: run as root, or check your own directories with --mount");
        }
        let users = self.mounts.iter().cloned();
        let mut jobs = Vec::new();
        #[cfg(target_os = "linux")]
        jobs.extend(self.power_loss(&kinds));
        jobs.extend(kinds.into_iter().map(Job::Here));
        jobs.extend(users.map(|(label, path)| Job::User(label, path)));
        Ok(jobs)
    }

    #[cfg(target_os = "linux")]
    fn power_loss(&self, kinds: &[Kind]) -> Option<Job> {
        let wanted = self.check.is_empty() || self.check.iter().any(|name| name == power::CHECK);
        let kinds: Vec<_> = kinds
            .iter()
            .copied()
            .filter(|kind| power::applies(kind))
            .collect();
        (wanted && self.cuts > 0 && !kinds.is_empty()).then_some(Job::PowerLoss(kinds))
    }

    /// What guests are made of, where a job needs one.
    #[cfg(target_os = "linux")]
    fn kit(&self, sh: &Shell, jobs: &[Job]) -> anyhow::Result<Option<guest::Kit>> {
        let in_guest = |job: &Job| match job {
            Job::Here(kind) => place(kind) == Place::Guest,
            Job::PowerLoss(_) => true,
            Job::User(..) => false,
        };
        if !jobs.iter().any(in_guest) {
            return Ok(None);
        }
        let missing = self.install.ensure(sh, guest::PACKAGES, "fs-matrix")?;
        if let Some(package) = missing.first() {
            bail!(
                "guests need {}, which is in the package {}",
                package.shows,
                package.name
            );
        }
        let dir = sh.current_dir().join("target/fs-matrix");
        let say = |what: &str| eprintln!("{what}");
        // The emulated CPUs of three guests would wait for each other on a machine with two.
        let cpus = if self.quick { 1 } else { 2 };
        guest::Kit::prepare(sh, &dir, cpus, self.install.allowed(), &say).map(Some)
    }

    /// Prints and saves, and fails where something is broken or was not checked.
    fn conclude(&self, report: &Report) -> anyhow::Result<()> {
        print!("{}", report.text());
        println!("\n{} mounts in {} s", report.mounts.len(), report.seconds);
        if let Some(path) = &self.json {
            report.save_json(path)?;
        }
        if let Some(path) = &self.markdown {
            report.save_markdown(path)?;
        }
        let unfinished = report.failed().count();
        match report.broken() {
            0 if unfinished == 0 => Ok(()),
            broken => bail!("{broken} broken, {unfinished} mounts not checked to the end"),
        }
    }
}

fn list() {
    println!("mounts:");
    for kind in kind::here() {
        let place = match place(kind) {
            Place::Guest => "by Debian's kernel in QEMU",
            _ => "by this machine's kernel",
        };
        println!("  {:10} {kind}, {place}", kind.name);
    }
    println!("checks:");
    for check in checks::everywhere() {
        println!("  {:11} {}", check.family.name(), check.name);
    }
    for check in checks::with_server() {
        println!("  {:11} {} (NFS)", check.family.name(), check.name);
    }
    #[cfg(target_os = "linux")]
    println!(
        "  {:11} {} (file systems on a disk)",
        finding::Family::Power.name(),
        power::CHECK
    );
}
