//! What is said of the states.

use std::time::Duration;

use anyhow::bail;
use file_systems::FileSystem;
use harness::record::Record;
use indicatif::HumanCount;
use xshell::Shell;

use super::disk::promises;
use super::job::Done;
use super::mutants;

pub(super) struct Report {
    pub done: Vec<Done>,
    pub file_systems: Vec<&'static FileSystem>,
    pub time: Duration,
}

/// The states of several jobs.
#[derive(Default)]
struct Sum {
    states: usize,
    lost: usize,
    torn: usize,
    left: usize,
}

impl Sum {
    fn of<'d>(done: impl Iterator<Item = &'d Done>) -> Self {
        done.fold(Self::default(), |sum, done| Self {
            states: sum.states + done.states,
            lost: sum.lost + done.lost,
            torn: sum.torn + done.torn,
            left: sum.left + done.left,
        })
    }

    fn text(&self) -> String {
        let (states, lost, torn) = (HumanCount(self.states as u64), self.lost, self.torn);
        let left = match self.left {
            0 => String::new(),
            left => format!(", {left} with leftover files"),
        };
        format!("{states} states, {lost} lost, {torn} torn{left}")
    }
}

/// Said when a job is done.
pub(super) fn line(done: &Done) {
    let what = format!("{} on {}", done.scenario, done.fs.name);
    if done.mutant {
        let found = done.first.as_ref().map_or_else(
            || format!("not detected in {} states", done.states),
            |(number, violation)| format!("detected in state {number}: {violation}"),
        );
        println!("{what}: {found}");
        return;
    }
    let of = Sum::of(std::iter::once(done)).text();
    println!(
        "{what}: {of} ({} writes, {} flushes; recorded in {:.1} s, checked in {:.1} s)",
        done.entries - done.flushes,
        done.flushes,
        done.recording.as_secs_f64(),
        done.checking.as_secs_f64(),
    );
    if let Some((number, violation)) = &done.first {
        println!("  state {number}: {violation}");
        if promises(done.fs) {
            println!(
                "  repeat with: cargo xtask crash --only {} --fs {} --state {number}",
                done.scenario, done.fs.name
            );
        }
    }
}

impl Report {
    /// Prints the sums, and fails where a state or a mutant says so.
    pub(super) fn conclude(&self, sh: &Shell, record: Record, seed: u64) -> anyhow::Result<()> {
        println!();
        let missed = self.mutants();
        let scenarios = || self.done.iter().filter(|done| !done.mutant);
        for fs in &self.file_systems {
            let sum = Sum::of(scenarios().filter(|done| done.fs == *fs));
            if sum.states == 0 {
                continue;
            }
            match promises(fs) {
                true => println!("{}: {}", fs.name, sum.text()),
                false => println!(
                    "{}: {} (no journal: nothing is promised there, and these states are not counted below)",
                    fs.name,
                    sum.text()
                ),
            }
        }
        let sum = Sum::of(scenarios().filter(|done| promises(done.fs)));
        let how = format!("seed {seed}, {} s", self.time.as_secs());
        println!("in {} s", self.time.as_secs());
        record.conclude(sh, "cargo xtask crash", &sum.text(), &how)?;
        if sum.lost + sum.torn + sum.left > 0 {
            bail!("a loss of power violates an invariant");
        }
        if !missed.is_empty() {
            bail!("mutants not detected: {}", missed.join(", "));
        }
        Ok(())
    }

    /// Returns the mutants that no state detected.
    fn mutants(&self) -> Vec<&'static str> {
        let mut missed = Vec::new();
        for mutant in mutants::ALL {
            let tried = || {
                let mutants = self.done.iter().filter(|done| done.mutant);
                mutants.filter(|done| done.scenario == mutant.name)
            };
            if tried().next().is_none() {
                continue;
            }
            let mut on: Vec<_> = tried().filter(|done| done.violations() > 0).collect();
            on.sort_by_key(|done| done.fs.name);
            let on: Vec<_> = on.iter().map(|done| done.fs.name).collect();
            if on.is_empty() {
                missed.push(mutant.name);
            } else {
                println!("mutant {}: detected on {}", mutant.name, on.join(", "));
            }
        }
        missed
    }
}
