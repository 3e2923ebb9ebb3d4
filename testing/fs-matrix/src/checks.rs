//! The checks: the same on every mount, on Linux, in the guest, and on macOS.

mod atomicity;
mod bytes;
mod durability;
mod engines;
mod faults;
mod images;
mod kills;
#[cfg(target_os = "linux")]
mod nfs;
mod space;

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::{Duration, Instant};

use anyhow::Context;
use file_systems::SlowCheck;

use super::finding::{Family, Finding, Line, Outcome};
use super::fixture::Fixture;

/// One named property.
pub(crate) struct Check {
    pub family: Family,
    pub name: &'static str,
    run: fn(&Fixture) -> anyhow::Result<Outcome>,
}

impl Check {
    const fn new(
        family: Family,
        name: &'static str,
        run: fn(&Fixture) -> anyhow::Result<Outcome>,
    ) -> Self {
        Self { family, name, run }
    }

    /// Runs in an empty directory. A check that can't be carried through has found something
    /// broken.
    pub(crate) fn run(&self, fixture: &Fixture) -> Finding {
        let start = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| (self.run)(fixture)))
            .unwrap_or_else(|_| Err(anyhow::anyhow!("the check panicked")));
        let outcome = outcome.unwrap_or_else(|error| {
            Outcome::broken("the check runs to its end", format!("{error:#}"))
        });
        self.finding(outcome, start.elapsed())
    }

    /// Returns the finding that the check was not run, as `--quick` asks.
    fn skipped(&self) -> Finding {
        let outcome =
            Outcome::not_run("it takes a minute on this file system: run without --quick");
        self.finding(outcome, Duration::ZERO)
    }

    fn finding(&self, outcome: Outcome, time: Duration) -> Finding {
        Finding {
            family: self.family,
            check: self.name.into(),
            expected: outcome.expected,
            seen: outcome.seen,
            verdict: outcome.verdict,
            milliseconds: time.as_millis() as u64,
        }
    }
}

/// The checks of every mount, in the order in which they run.
pub(crate) fn everywhere() -> impl Iterator<Item = &'static Check> {
    [
        bytes::CHECKS,
        engines::CHECKS,
        images::CHECKS,
        space::CHECKS,
        atomicity::CHECKS,
        kills::CHECKS,
        durability::CHECKS,
        faults::CHECKS,
    ]
    .into_iter()
    .flatten()
}

/// The checks of a mount whose server can be stopped.
pub(crate) fn with_server() -> &'static [Check] {
    #[cfg(target_os = "linux")]
    return nfs::CHECKS;
    #[cfg(not(target_os = "linux"))]
    &[]
}

/// The check that writes a file over 4 GiB, all of it where files have no holes.
pub(crate) const LARGE_FILE: &str = "file over 4 GiB";

/// The check that fills a small file system.
pub(crate) const DISK_FULL: &str = "disk full in the middle";

/// Returns the name of a check that takes a minute on some file systems in an emulated guest.
pub(crate) fn slow(check: SlowCheck) -> &'static str {
    match check {
        SlowCheck::LargeFile => LARGE_FILE,
        SlowCheck::DiskFull => DISK_FULL,
    }
}

/// Runs all checks of the fixture, or those with a name in `only`, and sends what they find. Those
/// with a name in `skip` are reported as not run.
pub(crate) fn run_all(
    fixture: &mut Fixture,
    only: &[String],
    skip: &[String],
    mut out: impl Write,
) -> anyhow::Result<()> {
    let base = fixture.dir.clone();
    let servers = with_server().iter().filter(|_| fixture.has_server());
    let wanted: Vec<_> = everywhere()
        .chain(servers)
        .filter(|check| only.is_empty() || only.iter().any(|name| name == check.name))
        .collect();
    for (n, check) in wanted.into_iter().enumerate() {
        Line::Checking(check.name.into()).send(&mut out)?;
        if skip.iter().any(|name| name == check.name) {
            Line::Found(check.skipped()).send(&mut out)?;
            continue;
        }
        fixture.dir = base.join(format!("check-{n}"));
        fs::create_dir(&fixture.dir)
            .with_context(|| format!("can't make the directory {}", fixture.dir.display()))?;
        let finding = check.run(fixture);
        // What a failed check left may not go; the next one has a directory of its own.
        let _ = fs::remove_dir_all(&fixture.dir);
        Line::Found(finding).send(&mut out)?;
    }
    fixture.dir = base;
    Ok(())
}
