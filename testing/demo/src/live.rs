//! Snapshots of a running KVM guest with two vCPUs by each method, its work rate meanwhile, and a
//! restore of each image, which must continue from the point in time of the snapshot.

mod capture;
mod chart;
mod rate;
mod table;
#[cfg(test)]
mod tests;
mod verify;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use guests::kvm::smp::{self, EachVcpu, Running, Smp, VCPUS};
use guests::ledger::PAGE;
use indicatif::{BinaryBytes, HumanCount};
use live_snapshot::{Method, UffdTracker};

use super::report::{Progress, say};
use super::{Outcome, SPELL};
use capture::Capture;

/// The RAM of a guest if the machine has memory for it.
const RAM: u64 = 4 << 30;

/// The share of the RAM that the guest rewrites in a second.
const REWRITTEN: f64 = 0.1;

/// The share of a ledger's steps that do not write one of the few hot pages: 12 of 32.
const SCATTERED: f64 = 12.0 / 32.0;

/// The largest RAM of which a copy is made in each pause, to compare the images with.
const COPIED: u64 = 512 << 20;

/// The methods in their order. The first one sees the work rate of a guest whose pages were never
/// protected.
const METHODS: [Method; 3] = [Method::CopyOnWrite, Method::PreCopy, Method::StopAndCopy];

/// The parameters of a live demo.
struct Plan<'a> {
    ram: u64,
    /// The time before and after each snapshot in which the guest's work rate is measured.
    calm: Duration,
    dir: &'a Path,
}

/// The results of a live demo.
pub(super) struct Story {
    ram: u64,
    captures: Vec<Capture>,
    /// What the verification of the images found. Empty if they are right.
    mismatches: Vec<String>,
    /// The steps that the restored vCPUs did.
    steps: u64,
}

/// Runs the live demo with images in a directory `dir`.
pub(super) fn run(
    requested: Option<u64>,
    dir: &Path,
    progress: &Progress,
) -> anyhow::Result<Story> {
    let ram = ram(requested)?;
    say(format_args!(
        "guest: a KVM virtual machine with {VCPUS} vCPUs and {} of RAM, which rewrites about {:.0} % of it per second; writes tracked by userfaultfd",
        BinaryBytes(ram),
        REWRITTEN * 100.0,
    ))?;
    let plan = Plan {
        ram,
        calm: Duration::from_millis(if ram > COPIED { 1500 } else { 500 }),
        dir,
    };
    plan.carry_out(progress, |_| Ok(()))
}

/// Returns the size of the RAM: as requested, or the default unless the machine has less memory.
fn ram(requested: Option<u64>) -> anyhow::Result<u64> {
    if let Some(ram) = requested {
        return Ok(ram);
    }
    let free = fs::read_to_string("/proc/meminfo").context("can't read /proc/meminfo")?;
    let free = available(&free).context("/proc/meminfo has no line MemAvailable")?;
    let ram = fitting(free);
    if ram < RAM {
        say(format_args!(
            "{} of memory are available: the guest has less RAM than {}, because the demo needs twice as much",
            BinaryBytes(free),
            BinaryBytes(RAM),
        ))?;
    }
    Ok(ram)
}

/// Returns the available memory in bytes that /proc/meminfo states.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find(|line| line.starts_with("MemAvailable:"))?;
    let kib: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kib << 10)
}

/// Returns the RAM of a guest on a machine with so much memory: the restored guest and the ledger
/// that is computed without a guest need as much as the guest each.
fn fitting(free: u64) -> u64 {
    let mut ram = RAM;
    while ram > 64 << 20 && ram * 2 + (1 << 30) > free {
        ram /= 2;
    }
    ram
}

impl Plan<'_> {
    /// Runs the whole demo. `tamper` may corrupt the captures before they are restored.
    fn carry_out(
        &self,
        progress: &Progress,
        tamper: impl FnOnce(&mut [Capture]) -> anyhow::Result<()>,
    ) -> anyhow::Result<Story> {
        let mut captures = self.capture_all(progress)?;
        tamper(&mut captures)?;
        let mut verifier = verify::Verifier::new(self.ram);
        for capture in &captures {
            verifier.verify(capture, progress)?;
        }
        Ok(Story {
            ram: self.ram,
            captures,
            mismatches: verifier.mismatches,
            steps: verifier.steps,
        })
    }

    /// Takes a snapshot of one guest by each method.
    fn capture_all(&self, progress: &Progress) -> anyhow::Result<Vec<Capture>> {
        let machine = Arc::new(Smp::new(self.ram).context("failed to create a guest in KVM")?);
        machine.boot()?;
        // Reports missing permissions before the guest has worked for long.
        drop(UffdTracker::start(machine.ram())?);
        self.fill(&machine, progress)?;
        let pages = (self.ram / PAGE) as f64;
        let rate = pages * REWRITTEN / SCATTERED / VCPUS as f64;
        let running = Running::start(&machine, rate as u64)?;
        let captures: anyhow::Result<_> = METHODS
            .into_iter()
            .map(|method| self.capture(&machine, &running, method, progress))
            .collect();
        running.end()?;
        captures
    }

    /// Runs the guest until it has written each page of its RAM.
    fn fill(&self, machine: &Smp, progress: &Progress) -> anyhow::Result<()> {
        // Six of 32 steps write the next page of a sequence.
        let goal = smp::layout(self.ram).pages * 32 / 6;
        progress.phase("the guest boots and fills its RAM", goal);
        let mut done = 0;
        while done < goal {
            done = (done + 4 * SPELL).min(goal);
            let steps: EachVcpu<u64> = [done; VCPUS];
            machine.work_until(steps)?;
            progress.at(done)?;
        }
        Ok(())
    }
}

impl Outcome for Story {
    fn show(&self, out: &Path) -> anyhow::Result<()> {
        say(table::table(&self.captures))?;
        say(table::LEGEND)?;
        say(chart::text(&self.captures))?;
        let svg = out.join("live.svg");
        let saved = chart::save(&self.captures, self.ram, &svg);
        saved.with_context(|| format!("can't write {}", svg.display()))?;
        Ok(say(format_args!("chart (SVG): {}", svg.display()))?)
    }

    fn close(self: Box<Self>) -> anyhow::Result<()> {
        if !self.mismatches.is_empty() {
            bail!("not verified: {}", self.mismatches.join("; "));
        }
        let compared = match self.captures.iter().all(|capture| capture.copy.is_some()) {
            true => "equal the RAM in the pause, byte for byte",
            false => "have the steps of the pause",
        };
        say(format_args!(
            "verified: the images of {} methods, each restored into a new guest with {} of RAM, {compared}; the restored vCPUs continue from there for {} steps, find all pages of their ledgers intact, and reach the digests of the ledgers computed without a guest",
            self.captures.len(),
            BinaryBytes(self.ram),
            HumanCount(self.steps),
        ))?;
        Ok(())
    }
}
