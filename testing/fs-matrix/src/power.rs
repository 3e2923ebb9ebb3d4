//! Loss of power: QEMU is killed in a commit loop, what its disks had not flushed is dropped, and
//! the disks are mounted again.
//!
//! One guest commits to all block file systems at once and acknowledges each commit. It is killed
//! by SIGKILL at a random moment, so its page cache is gone; then each disk loses a random part of
//! the writes that no flush had followed, as one with a volatile cache would. The next guest mounts
//! what is left, says what the destination is, and commits on until it is killed in turn.

mod cut;
pub(crate) mod in_guest;
mod state;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use harness::interrupt::Interrupt;
use indicatif::ProgressBar;
use linux_guest::escaped;
use random::Random;

use super::finding::{Family, Finding, Line, Outcome};
use super::guest::{self, Disk, Kit};
use super::kind::Kind;
use state::{Cache, Said, State, promises, take};

/// The check's name.
pub(crate) const CHECK: &str = "power lost in a loop of commits";

/// What is not on a disk loses everything, as it should.
pub(crate) fn applies(kind: Kind) -> bool {
    disk_size(kind).is_some()
}

fn disk_size(kind: Kind) -> Option<u64> {
    let disk = kind.disk().filter(|disk| disk.guest.is_some());
    disk.map(|disk| disk.min_size)
}

/// A driver that promises nothing and has not come so far as a commit for this long, while others
/// commit, has crashed; and once the console says that something has.
const STUCK: Duration = Duration::from_secs(40);
const STUCK_AFTER_OOPS: Duration = Duration::from_secs(4);

/// Cuts the power `cuts` times; a finding for each of `kinds`.
pub(crate) struct PowerLoss<'a> {
    pub kit: &'a Kit,
    pub interrupt: &'a Interrupt,
    pub cuts: u32,
    pub keep: bool,
    /// Options for the guest: a mutant.
    pub options: Vec<String>,
}

/// Booting, recovering, and making file systems, each of which may take a while on a busy machine,
/// beside the others' commits.
const PATIENCE: Duration = Duration::from_secs(300);

impl PowerLoss<'_> {
    pub(crate) fn run(
        &self,
        kinds: &[Kind],
        bar: &ProgressBar,
    ) -> anyhow::Result<Vec<(Kind, Finding)>> {
        let start = Instant::now();
        let mut states = Vec::new();
        for kind in kinds.iter().copied() {
            let size = disk_size(kind).context("a kind that is on a disk")?;
            let path = self.path(kind, "survived");
            states.push(State {
                kind,
                image: Disk::new(path, size, self.keep)?,
                said: Said::default(),
                recreate: true,
                flushed: 0,
                dropped: 0,
            });
        }
        let mut random = Random::new();
        bar.set_length(u64::from(self.cuts) + 1);
        for round in 0..=self.cuts {
            bar.set_message(format!("cut {round} of {}", self.cuts));
            let delay = Duration::from_millis(random.below(500));
            // The guest after the last cut only looks.
            self.round_heard_out(&mut states, round, delay, bar)
                .with_context(|| format!("cut {round}"))?;
            bar.inc(1);
        }
        let milliseconds = start.elapsed().as_millis() as u64;
        let finding = |state: &State| (state.kind, self.finding(state, milliseconds));
        Ok(states.iter().map(finding).collect())
    }

    /// A crash explains the silence of drivers that promise nothing; one that does gets its time
    /// all the same.
    fn patience_with(&self, waiting: &[Kind]) -> Duration {
        if waiting.iter().copied().any(promises) {
            PATIENCE
        } else if self.kit.console("power").has_crashed() {
            STUCK_AFTER_OOPS
        } else {
            STUCK
        }
    }

    fn path(&self, kind: Kind, what: &str) -> PathBuf {
        let name = format!("power-{}-{what}.img", kind.name);
        self.kit.run_dir().join(name)
    }

    /// The guests have copies of the disks: where one gave up, the next looks at the same.
    fn round_heard_out(
        &self,
        states: &mut [State],
        round: u32,
        delay: Duration,
        bar: &ProgressBar,
    ) -> anyhow::Result<()> {
        let said: Vec<_> = states.iter().map(|state| state.said.clone()).collect();
        let say = |text: &str| bar.suspend(|| eprintln!("power: {text}"));
        self.kit.console("power").heard_out(say, || {
            for (state, said) in states.iter_mut().zip(&said) {
                state.said.clone_from(said);
            }
            self.round(states, round, delay)
        })
    }

    /// One guest, from its boot to its death `delay` after every disk has had a commit.
    fn round(&self, states: &mut [State], round: u32, delay: Duration) -> anyhow::Result<()> {
        let mut drives = Vec::new();
        let mut logs = Vec::new();
        for state in states.iter() {
            let (run, log) = (self.path(state.kind, "run"), self.path(state.kind, "log"));
            copy_sparse(&state.image.path, &run)?;
            // As large as it may get; a hole until written.
            let log = Disk::new(log, 4 << 30, self.keep)?;
            drives.extend(logged_drive(state.kind, &run, &log.path));
            logs.push((log, Disk::existing(run, self.keep)));
        }
        let mut arguments = vec!["power".to_owned()];
        arguments.extend(
            states
                .iter()
                .map(|state| format!("--kind={}", state.kind.name)),
        );
        arguments.extend(self.options.iter().cloned());
        let recreated = states.iter().filter(|state| state.recreate);
        arguments.extend(recreated.map(|state| format!("--new={}", state.kind.name)));
        let mut qemu = guest::boot_with(self.kit, "power", drives, &arguments, self.interrupt)?;
        let cache_before = Cache::of_cut(round.saturating_sub(1));
        let mut waiting: Vec<Kind> = states.iter().map(|state| state.kind).collect();
        let mut looked: Vec<Kind> = states
            .iter()
            .filter(|state| state.recreate)
            .map(|state| state.kind)
            .collect();
        let mut cut_at: Option<Instant> = None;
        let mut progress = Instant::now();
        loop {
            let within = match cut_at {
                None => PATIENCE,
                Some(at) => at.saturating_duration_since(Instant::now()),
            };
            let others = waiting.len() < states.len();
            if cut_at.is_none() && others && progress.elapsed() > self.patience_with(&waiting) {
                break;
            }
            let line = match Line::next(&qemu, within) {
                Ok(line) => line,
                Err(_) if cut_at.is_some_and(|at| Instant::now() >= at) => break,
                Err(error) => {
                    let tail = self.kit.console("power").tail();
                    return Err(error.context(format!("the console's last lines: {tail}")));
                }
            };
            let Some(line) = line else {
                bail!("the guest ended: {}", self.kit.console("power").tail())
            };
            if let Line::Recovered(name, ..) = &line {
                looked.extend(
                    states
                        .iter()
                        .map(|state| state.kind)
                        .filter(|kind| kind.name == name),
                );
            }
            if let Some(kind) = take(states, line, cache_before)? {
                if waiting.contains(&kind) {
                    progress = Instant::now();
                }
                waiting.retain(|waiting| *waiting != kind);
                if waiting.is_empty() && cut_at.is_none() {
                    cut_at = Some(Instant::now() + delay);
                }
            }
            if cut_at.is_some_and(|at| Instant::now() >= at) {
                break;
            }
        }
        qemu.kill();
        // What it had acknowledged before it died counts, seen here only now or not.
        // Half a line acknowledges nothing.
        while let Ok(Some(line)) = Line::next(&qemu, PATIENCE) {
            take(states, line, cache_before)?;
        }
        for state in states.iter_mut() {
            state.recreate = waiting.contains(&state.kind);
            if !looked.contains(&state.kind) {
                let tally = state.said.after.entry(cache_before).or_default();
                let what = "the driver does not return from the mount".into();
                *tally.lost.entry(what).or_default() += 1;
            }
        }
        for (state, (log, _run)) in states.iter_mut().zip(&logs) {
            let cut = cut::cut_power(&state.image.path, &log.path, Cache::of_cut(round))?;
            state.dropped += cut.dropped + cut.torn;
            state.flushed += cut.flushed;
        }
        Ok(())
    }

    fn finding(&self, state: &State, milliseconds: u64) -> Finding {
        let expected =
            "the destination is complete, old or new, and every acknowledged commit is present";
        let mut seen = format!("{} cuts in {} commits", self.cuts, state.said.commits);
        if state.flushed == 0 {
            seen += "; the driver never flushes the disk";
        }
        let mut lost = 0;
        for (cache, tally) in &state.said.after {
            seen += &match cache {
                Cache::Volatile => format!("; {} unflushed writes lost or torn", state.dropped),
                Cache::None => "; all writes kept".into(),
            };
            seen += &format!(
                ": {} times the last acknowledged, {} times the next, {} times neither",
                tally.old,
                tally.new,
                tally.lost()
            );
            for (what, times) in &tally.lost {
                seen += &format!(" ({times} x {what})");
            }
            lost += tally.lost();
        }
        let cuts: u32 = state
            .said
            .after
            .values()
            .map(|tally| tally.old + tally.new)
            .sum();
        let right = lost == 0 && cuts == self.cuts;
        let outcome = if promises(state.kind) {
            Outcome::promise(right, expected, seen)
        } else {
            Outcome::property(right, expected, seen)
        };
        Finding {
            family: Family::Power,
            check: CHECK.into(),
            expected: outcome.expected,
            seen: outcome.seen,
            verdict: outcome.verdict,
            milliseconds,
        }
    }
}

/// A disk with a volatile cache, everything it is given logged.
fn logged_drive(kind: Kind, image: &Path, log: &Path) -> [String; 8] {
    let name = kind.name;
    let file = |node: String, path: &Path| {
        let path = escaped(path);
        format!("driver=file,node-name={node},filename={path},cache.no-flush=on")
    };
    [
        "-blockdev".into(),
        file(format!("{name}-image"), image),
        "-blockdev".into(),
        file(format!("{name}-log"), log),
        "-blockdev".into(),
        // Counts each entry when it is written: the log's writer will be killed.
        format!(
            "driver=blklogwrites,node-name={name},file={name}-image,log={name}-log,log-super-update-interval=1"
        ),
        "-device".into(),
        format!("virtio-blk-pci,drive={name},write-cache=on,discard=off"),
    ]
}

fn copy_sparse(from: &Path, to: &Path) -> anyhow::Result<()> {
    let status = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto"])
        .arg(from)
        .arg(to)
        .status()?;
    if !status.success() {
        bail!("can't copy {}", from.display());
    }
    Ok(())
}
