//! Compares the contenders in turns, so that a busy moment affects all of them, and prints the
//! ratios of their medians. It is a separate harness, since criterion does not interleave
//! benchmarks. `cargo xtask bench` runs it.
//!
//! With `--test` everything runs once and is small.

#![allow(
    unreachable_pub,
    reason = "modules that benchmarks share have public items"
)]

mod bare;
mod bitmap;
#[path = "../cases/mod.rs"]
mod cases;
mod chains;
mod growth;
mod images;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod live;
#[cfg(target_os = "linux")]
mod serve;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use benches::{fio, place, place_in};
use cases::ram::{Content, Ram};
use cases::{
    Case, Contender, Dirty, LIMIT, OURS, Pattern, SQUIB, contender, diff, full, raw, recycled,
};
use clap::Parser;
use figures::report::{self, Part, Report};
use memory_writer::MemoryWriter;
use page_reader::PageReader;

/// Compare with the peers and the limit
#[derive(Parser)]
struct Arguments {
    /// The directory to write to, which selects the file system [default: target/, or
    /// RAMSNAP_BENCH_DIR]
    #[arg(long)]
    dir: Option<PathBuf>,
    /// Number of runs of each contender, at least 5
    #[arg(long, default_value_t = 7)]
    rounds: usize,
    /// Write the results to this file
    #[arg(long)]
    json: Option<PathBuf>,
    /// Run only this part: writing, live or serving [default: all]
    #[arg(long)]
    part: Option<Part>,
    /// Run only the cases whose name contains this
    #[arg(long, default_value = "")]
    only: String,
    /// Run everything once and small
    #[arg(long)]
    test: bool,
    /// Passed by cargo
    #[arg(long, hide = true)]
    bench: bool,
}

fn main() -> anyhow::Result<()> {
    // The VMM of the benchmarks of the page server is this program, in a process of its own.
    #[cfg(target_os = "linux")]
    page_client::run();
    let arguments = Arguments::parse();
    let (place, file_system) = match &arguments.dir {
        Some(dir) => place_in(dir)?,
        None => place()?,
    };
    let mut comparison = Comparison {
        place: place.path(),
        gib: if arguments.test { 1 << 24 } else { 1 << 30 },
        rounds: if arguments.test {
            1
        } else {
            arguments.rounds.max(5)
        },
        only: &arguments.only,
        smoke_test: arguments.test,
        report: Report::default(),
    };
    comparison.report.rounds = comparison.rounds;
    comparison.report.machine = machine(&file_system);
    for part in Part::ALL {
        if arguments.part.is_none_or(|only| only == part) {
            comparison.part(part);
        }
    }
    if let Some(path) = &arguments.json {
        let json = serde_json::to_string_pretty(&comparison.report)?;
        fs::write(path, json).with_context(|| format!("failed to write {}", path.display()))?;
    }
    Ok(())
}

fn machine(file_system: &str) -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map_or("unknown", |line| line.trim_start_matches([' ', '\t', ':']));
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let kernel = read("/proc/sys/kernel/osrelease");
    vec![
        ("processor".into(), format!("{model}, {cores} cores")),
        ("kernel".into(), format!("Linux {}", kernel.trim())),
        ("file system".into(), file_system.into()),
    ]
}

struct Comparison<'a> {
    place: &'a Path,
    gib: u64,
    rounds: usize,
    only: &'a str,
    /// Whether everything runs once and is small: the times are then meaningless.
    smoke_test: bool,
    report: Report,
}

impl Comparison<'_> {
    fn part(&mut self, part: Part) {
        match part {
            Part::Writing => {
                self.full();
                self.diff();
                self.images();
                self.chains();
                self.start();
                self.bitmap();
                self.memory();
                self.growth();
            }
            #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
            Part::Live => self.live(),
            #[cfg(target_os = "linux")]
            Part::Serving => self.serve(),
            #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
            _ => println!("not run here: the part {part}"),
        }
    }

    fn wants(&self, name: &str) -> bool {
        name.contains(self.only)
    }

    fn full(&mut self) {
        let gib = self.gib;
        let ram = |content| Ram::new(gib, content);
        let skip_zeros = || MemoryWriter::options().skip_zeros(true);
        let skip_untouched = || {
            MemoryWriter::options()
                .skip_zeros(true)
                .skip_untouched(true)
        };
        // Little memory exists at a time, as in a VMM: finding untouched pages takes a walk of all
        // of it. The other contenders touch all of their RAM by reading it, so they have a RAM of
        // their own.
        {
            let (alone, read) = (ram(Content::Untouched(95)), ram(Content::Untouched(95)));
            let name = "full 1 GiB, 95 % never touched, not read";
            // The limit knows in advance which pages were touched, and writes only those.
            let touched: Vec<_> = alone.reader().populated(0..gib).collect();
            let mut case = skipping(&read, name, skip_untouched);
            case.contenders[0] = skipping(&alone, name, skip_untouched).contenders.remove(0);
            case.contenders.push(contender(LIMIT, |dest| {
                raw::fresh(dest, gib, &touched, &alone.reader());
            }));
            self.run(&case, &[(SQUIB, 25.0)]);
        }
        {
            let (half, zero) = (ram(Content::Zero(50)), ram(Content::Zero(95)));
            let name = "full 1 GiB, half zero, zeros skipped";
            self.run(&skipping(&half, name, skip_zeros), &[]);
            let name = "full 1 GiB, 95 % zero, zeros skipped";
            self.run(&skipping(&zero, name, skip_zeros), &[(SQUIB, 7.0)]);
        }
        let random = ram(Content::Random);
        let mut case = full(&random, "full 1 GiB, random bytes", MemoryWriter::options);
        if fio::is_installed() {
            case.contenders.push(Contender {
                name: fio::NAME,
                run: Box::new(|dest| fio::write(dest, gib).unwrap()),
            });
        }
        self.run(&case, &[(SQUIB, 2.5), (LIMIT, 0.95)]);
        self.throughput(&case.name);
        let case = recycled(&random, "full 1 GiB, random bytes, over the previous");
        self.run(&case, &[(SQUIB, 3.5), (LIMIT, 0.9)]);
    }

    fn diff(&mut self) {
        let ram = Ram::new(self.gib, Content::Random);
        let (four, sixteen) = (4 << 10, 16 << 10);
        for (page, pattern, what, goal) in [
            (sixteen, Pattern::Clustered, "16 KiB clustered", 1.7),
            (sixteen, Pattern::Random, "16 KiB random", 1.5),
            (four, Pattern::Random, "4 KiB random", 0.0),
        ] {
            let dirty = Dirty::new(ram.size, page, 100, pattern);
            let case = diff(&ram, &dirty, &format!("diff 1 % of 1 GiB, {what}"));
            let goals = [(SQUIB, goal), (LIMIT, 0.85)];
            self.run(&case, if goal > 0.0 { &goals } else { &[] });
        }
        drop(ram);
        if !self.wants("diff 1 % of 8 GiB, 4 KiB clustered") {
            return;
        }
        let ram = Ram::new(8 * self.gib, Content::Random);
        let dirty = Dirty::new(ram.size, four, 100, Pattern::Clustered);
        let case = diff(&ram, &dirty, "diff 1 % of 8 GiB, 4 KiB clustered");
        self.run(&case, &[(SQUIB, 1.8), (LIMIT, 0.85)]);
    }

    /// Runs the contenders in turns, `rounds` times, after one run that is not counted.
    fn run(&mut self, case: &Case<'_>, goals: &[(&str, f64)]) {
        if !self.wants(&case.name) {
            return;
        }
        let mut seconds = vec![Vec::new(); case.contenders.len()];
        for round in 0..=self.rounds {
            for (number, contender) in case.contenders.iter().enumerate() {
                let dest = case.destination(self.place, number);
                let took = (contender.run)(&dest);
                if round > 0 {
                    seconds[number].push(took.as_secs_f64());
                }
            }
        }
        for number in 0..case.contenders.len() {
            let _ = fs::remove_dir_all(self.place.join(number.to_string()));
        }
        let names = case.contenders.iter().map(|contender| contender.name);
        let found = report::Case {
            name: case.name.clone(),
            group: case.group.into(),
            bytes: case.bytes,
            contenders: named(names, seconds),
            goals: named_goals(goals),
        };
        self.record(found);
    }

    /// Adds the throughput of the contenders that write to the disk directly, for a case that ran.
    fn throughput(&mut self, name: &str) {
        let Some(case) = self.report.cases.iter().find(|case| case.name == name) else {
            return;
        };
        let direct = |name| case.contenders.iter().find(|other| other.name == name);
        let mut parts: Vec<String> = [OURS, LIMIT, fio::NAME]
            .into_iter()
            .filter_map(direct)
            .map(|one| {
                let speed = case.bytes as f64 / one.median() / f64::from(1 << 20);
                format!("{speed:.0} {}", one.name)
            })
            .collect();
        if !fio::is_installed() {
            parts.push("fio is not installed here (Debian: fio)".into());
        }
        let what = format!("MiB/s of {name}");
        self.figure(&what, parts.join(", "), "");
    }

    fn record(&mut self, case: report::Case) {
        if self.smoke_test {
            println!("ran: {}", case.name);
            return;
        }
        let ours = case.contenders[0].median() * 1e3;
        print!("{:45} {ours:9.3} ms", case.name);
        for other in &case.contenders[1..] {
            let ratio = other.median() * 1e3 / ours;
            print!("   {ratio:.2} x {}", other.name);
        }
        println!();
        self.report.cases.push(case);
    }

    fn figure(&mut self, name: &str, value: String, limit: &str) {
        if self.smoke_test {
            println!("ran: {name}");
            return;
        }
        println!("{name:45} {value}");
        self.report.figures.push((name.into(), value, limit.into()));
    }
}

fn named<'a>(
    names: impl Iterator<Item = &'a str>,
    seconds: Vec<Vec<f64>>,
) -> Vec<report::Contender> {
    names
        .zip(seconds)
        .map(|(name, seconds)| report::Contender {
            name: name.into(),
            seconds,
        })
        .collect()
}

fn named_goals(goals: &[(&str, f64)]) -> Vec<(String, f64)> {
    goals
        .iter()
        .map(|(name, goal)| ((*name).into(), *goal))
        .collect()
}

/// Returns the case of a full dump without the limit, which does not skip pages.
fn skipping<'a>(
    ram: &'a Ram,
    name: &str,
    options: fn() -> memory_writer::MemoryWriterOptions,
) -> Case<'a> {
    let mut case = full(ram, name, options);
    case.contenders.retain(|contender| contender.name != LIMIT);
    case
}
