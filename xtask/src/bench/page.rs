//! The comparison as pages and as charts.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use figures::chart::{Bars, Group};
use figures::report::{Case, Part, Report};

/// The peer that charts compare with.
const PEER: &str = "squib-snapshot";
const LIMIT: &str = "raw limit";

/// Writes the page of a part, and its charts, to `dir`.
pub(super) fn save(part: Part, report: &Report, dir: &Path) -> anyhow::Result<()> {
    let (name, head) = match part {
        Part::Writing => ("benchmarks.md", WRITING),
        Part::Live => ("benchmarks-live.md", LIVE),
        Part::Serving => ("benchmarks-serving.md", SERVING),
    };
    let mut page = format!("<!-- Written by `cargo xtask bench --part {part}`. -->\n{head}");
    page += &machine(report);
    if !report.cases.is_empty() {
        page += &cases(report);
    }
    if part == Part::Writing {
        for group in ["full", "diff"] {
            let chart = chart(report, group).svg()?;
            fs::write(dir.join(format!("benchmarks-{group}.svg")), chart)?;
        }
        page += "\n![full dumps](benchmarks-full.svg)\n\n![diffs](benchmarks-diff.svg)\n";
    }
    page += &figures(report);
    let path = dir.join(name);
    fs::write(&path, page)?;
    println!("wrote {}", path.display());
    Ok(())
}

fn chart(report: &Report, group: &str) -> Bars {
    let cases = || report.cases.iter().filter(|case| case.group == group);
    let mut series: Vec<String> = Vec::new();
    for contender in cases().flat_map(|case| &case.contenders) {
        if contender.name != PEER && !series.contains(&contender.name) {
            series.push(contender.name.clone());
        }
    }
    let bars = |case: &Case| {
        let of = |name: &str| case.contenders.iter().find(|other| other.name == name);
        let peer = of(PEER).map_or(f64::NAN, |peer| peer.median());
        let bar = |name: &String| of(name).map(|it| peer / it.median()).into_iter().collect();
        Group {
            name: lines(&case.name),
            bars: series.iter().map(bar).collect(),
        }
    };
    Bars {
        axis: format!("times as fast as {PEER}"),
        most: 10.0,
        groups: cases().map(bars).collect(),
        series,
    }
}

/// Splits a name into two lines at its first comma.
fn lines(name: &str) -> String {
    name.replacen(", ", "\n", 1)
}

fn machine(report: &Report) -> String {
    let mut page = String::new();
    for (what, value) in &report.machine {
        _ = writeln!(page, "- {what}: {value}");
    }
    page
}

fn cases(report: &Report) -> String {
    let mut page = format!("- medians of {} rounds\n\n", report.rounds);
    page += "| case | ramsnap | times as fast as | goal |\n|---|---:|---|---|\n";
    for case in &report.cases {
        let ours = case
            .contenders
            .first()
            .map_or(f64::NAN, |ours| ours.median());
        let others = case.contenders.iter().skip(1);
        let ratios = others.filter_map(|other| {
            let ratio = case.ratio(&other.name)?;
            Some(format!("{} {}", figure(ratio), other.name))
        });
        let ratios: Vec<String> = ratios.collect();
        let goals: Vec<String> = case.goals.iter().map(|goal| verdict(case, goal)).collect();
        _ = writeln!(
            page,
            "| {} | {} | {} | {} |",
            case.name,
            time(ours),
            ratios.join(", "),
            goals.join(", ")
        );
    }
    page
}

fn figures(report: &Report) -> String {
    let mut page = String::from("\n| measurement | result | limit |\n|---|---|---|\n");
    for (what, value, limit) in &report.figures {
        _ = writeln!(page, "| {what} | {value} | {limit} |");
    }
    page
}

fn verdict(case: &Case, (name, goal): &(String, f64)) -> String {
    let result = match case.ratio(name) {
        Some(ratio) if ratio >= *goal => "met".into(),
        // No contender is faster than the disk.
        _ if name == PEER && case.ratio(LIMIT).is_some() => {
            let limit =
                case.ratio(PEER).unwrap_or(f64::NAN) / case.ratio(LIMIT).unwrap_or(f64::NAN);
            format!("**not met** (raw limit: {})", figure(limit))
        }
        _ => "**not met**".to_owned(),
    };
    format!("{} {name}: {result}", figure(*goal))
}

fn figure(ratio: f64) -> String {
    match ratio {
        100.0.. => format!("{ratio:.0}"),
        10.0.. => format!("{ratio:.1}"),
        _ => format!("{ratio:.2}"),
    }
}

fn time(seconds: f64) -> String {
    match seconds {
        1.0.. => format!("{seconds:.2} s"),
        1e-3.. => format!("{:.1} ms", seconds * 1e3),
        _ => format!("{:.1} us", seconds * 1e6),
    }
}

const WRITING: &str = "\
# Benchmarks

[Live snapshots](benchmarks-live.md) and the [page server](benchmarks-serving.md) have pages of
their own.

Each case is the same work, done by several programs in turns:

- ramsnap, with its defaults unless the case states otherwise;
- squib-snapshot 0.2.0;
- vm-memory's own dump into a buffered file;
- the raw limit: a bare io_uring writer with direct I/O, which writes the same bytes to the same
  offsets and checks nothing;
- fio, if it is installed, which writes the same number of random bytes.

Every result is made durable and renamed. A ratio above 1 means that ramsnap is faster. Full dumps
are of 1 GiB in pages of 16 KiB. The pages of a diff are at their offsets in a sparse file (raw
layout), unless the case names another layout.

";

const LIVE: &str = "\
# Benchmarks of live snapshots

A KVM guest rewrites a tenth of its RAM in each second, and snapshots of it are taken in turns:
stop-and-copy, copy-on-write, stop-and-copy again, pre-copy. The pause includes saving the state of
the vCPU. The speed of the guest is the number of pages that it writes in a second, in relation to
the same guest that nothing tracks. The dump at rest is the stop-and-copy before and after each
write in the background, because the speed of a disk changes within minutes.

";

const SERVING: &str = "\
# Benchmarks of the page server

The VMM is another process, which maps its RAM, passes a userfaultfd, and touches pages. Each case is
compared with a bare program in the same run:

- `pread and UFFDIO_COPY`: a fault handler that reads a page from the file, copies it into the RAM
  and checks nothing;
- `raw limit`: a program that reads the file with direct I/O;
- `on demand`: the same server without a recorded working set.

";
