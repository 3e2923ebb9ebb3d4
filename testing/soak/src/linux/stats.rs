//! Counts the work done so far, and the resources of this process.

use std::collections::BTreeMap;
use std::fmt;
use std::fs;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use indicatif::HumanCount;

use super::shadow::{Difference, PageViolation};

/// Counted by all guests.
#[derive(Default)]
pub(super) struct Tally {
    pub rounds: AtomicU64,
    pub saves: AtomicU64,
    pub faults: Counts,
    pub restores: Counts,
    compared: AtomicU64,
    lost: AtomicU64,
    torn: AtomicU64,
}

/// How often what happened.
#[derive(Default)]
pub(super) struct Counts(Mutex<BTreeMap<&'static str, u64>>);

impl Counts {
    pub(super) fn add(&self, what: &'static str) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *counts.entry(what).or_default() += 1;
    }

    fn sum(&self) -> u64 {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        counts.values().sum()
    }
}

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let counts: Vec<_> = counts
            .iter()
            .map(|(what, count)| format!("{what} {}", HumanCount(*count)))
            .collect();
        f.write_str(&counts.join(", "))
    }
}

impl Tally {
    pub(super) fn compared(&self, bytes: u64) {
        self.compared.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Whether any guest's life ended by what this looks for.
    pub(super) fn found(&self) -> bool {
        let some = |count: &AtomicU64| count.load(Ordering::Relaxed) > 0;
        some(&self.lost) || some(&self.torn)
    }

    /// Counts the difference that ended a life, if it is one.
    pub(super) fn failed(&self, error: &anyhow::Error) {
        if let Some(Difference { what, .. }) = error.downcast_ref() {
            let count = match what {
                PageViolation::Lost => &self.lost,
                PageViolation::Torn => &self.torn,
            };
            count.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// The closing line.
impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let count = |count: &AtomicU64| HumanCount(count.load(Ordering::Relaxed));
        write!(
            f,
            "{} rounds, {} saves, {} faults injected, {} restores compared ({:.1} GiB), {} lost, {} torn",
            count(&self.rounds),
            count(&self.saves),
            HumanCount(self.faults.sum()),
            HumanCount(self.restores.sum()),
            self.compared.load(Ordering::Relaxed) as f64 / f64::from(1 << 30),
            count(&self.lost),
            count(&self.torn),
        )
    }
}

/// What this process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Held {
    pub descriptors: usize,
    pub threads: usize,
    pub mappings: usize,
    /// In memory, in MiB.
    pub resident: u64,
}

/// What glibc may keep more of than at the first count: stacks of threads that ended, and its
/// arenas.
const MORE_MAPPINGS: usize = 256;
/// In MiB.
const MORE_RESIDENT: u64 = 64;

impl Held {
    pub(super) fn now() -> anyhow::Result<Self> {
        let entries = |path| anyhow::Ok(fs::read_dir(path)?.count());
        let status = fs::read_to_string("/proc/self/status")?;
        let resident = status.lines().find_map(|line| {
            let kibibytes = line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?;
            kibibytes.parse::<u64>().ok()
        });
        Ok(Self {
            descriptors: entries("/proc/self/fd")?,
            threads: entries("/proc/self/task")?,
            mappings: fs::read_to_string("/proc/self/maps")?.lines().count(),
            resident: resident.context("/proc/self/status has a VmRSS")? >> 10,
        })
    }

    /// With no guest alive: fails where more is held than at `first`, when that was so too.
    pub(super) fn check(first: Self) -> anyhow::Result<Self> {
        // A thread that was joined may show for a moment.
        let deadline = Instant::now() + Duration::from_secs(60);
        let mut now = Self::now()?;
        while now.threads > first.threads && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(10));
            now = Self::now()?;
        }
        ensure!(
            now.descriptors <= first.descriptors
                && now.threads <= first.threads
                && now.mappings <= first.mappings + MORE_MAPPINGS
                && now.resident <= first.resident + MORE_RESIDENT,
            "something leaks: {now}; at first it was {first}"
        );
        Ok(now)
    }
}

impl fmt::Display for Held {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} descriptors, {} threads, {} mappings, {} MiB resident",
            self.descriptors, self.threads, self.mappings, self.resident
        )
    }
}
