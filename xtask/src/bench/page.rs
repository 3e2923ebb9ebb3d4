//! The comparison as a page and as charts.

use std::fmt::Write;
use std::fs;
use std::path::Path;

use figures::chart::{Bars, Group};
use figures::report::{Case, Report};

/// The peer that charts are drawn in times of.
const PEER: &str = "squib-snapshot";
const LIMIT: &str = "raw limit";

/// Writes `benchmarks.md` and its charts to `dir`.
pub(super) fn save(report: &Report, dir: &Path) -> anyhow::Result<()> {
    for group in ["full", "diff"] {
        let chart = chart(report, group).svg()?;
        fs::write(dir.join(format!("benchmarks-{group}.svg")), chart)?;
    }
    fs::write(dir.join("benchmarks.md"), page(report))?;
    println!("written: {}", dir.join("benchmarks.md").display());
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

/// A name in two lines, parted at its first comma.
fn lines(name: &str) -> String {
    name.replacen(", ", "\n", 1)
}

fn page(report: &Report) -> String {
    let mut page = String::from(HEAD);
    for (what, value) in &report.machine {
        _ = writeln!(page, "- {what}: {value}");
    }
    _ = writeln!(
        page,
        "- medians of {} rounds, the contenders by turns\n",
        report.rounds
    );
    page += "| case | ours | times as fast as | to reach |\n|---|---:|---|---|\n";
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
        let goals: Vec<String> = case.goals.iter().map(|goal| reached(case, goal)).collect();
        _ = writeln!(
            page,
            "| {} | {} | {} | {} |",
            case.name,
            time(ours),
            ratios.join(", "),
            goals.join(", ")
        );
    }
    page += "\n![full dumps](benchmarks-full.svg)\n\n![diffs](benchmarks-diff.svg)\n\n";
    page += "| what | measured | to keep |\n|---|---|---|\n";
    for (what, value, limit) in &report.figures {
        _ = writeln!(page, "| {what} | {value} | {limit} |");
    }
    page
}

fn reached(case: &Case, (name, goal): &(String, f64)) -> String {
    let verdict = match case.ratio(name) {
        Some(ratio) if ratio >= *goal => "reached".into(),
        // No contender is faster than the disk.
        _ if name == PEER && case.ratio(LIMIT).is_some() => {
            let limit =
                case.ratio(PEER).unwrap_or(f64::NAN) / case.ratio(LIMIT).unwrap_or(f64::NAN);
            format!("**missed** (the raw limit itself: {})", figure(limit))
        }
        _ => "**missed**".to_owned(),
    };
    format!("{} {name}: {verdict}", figure(*goal))
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

const HEAD: &str = "\
<!-- Made by `cargo xtask bench`. -->
# How fast it writes

Each case is the same work done by this library with its defaults (where not said otherwise), by
squib-snapshot 0.2.0, by vm-memory's own dump into a buffered file, and by a bare io_uring writer with
direct I/O that writes the same bytes to the same offsets and checks nothing (the raw limit), all made durable and renamed. A ratio above 1 means that ours is
faster. fio, where it is installed, writes as many random bytes as the limit does. Full dumps are of 1 GiB in pages of 16 KiB; a diff's pages stand at their offsets in a sparse file (raw layout).

";
