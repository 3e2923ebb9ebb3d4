//! Which lines of the macOS code were executed.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use xshell::{PushEnv, Shell, cmd};

const PROFDATA: &str = "llvm-profdata-22";
pub(crate) const COV: &str = "llvm-cov-22";

/// The code that only macOS executes otherwise.
const SOURCE: &str = "crates/hvf-backend/src/macos";

/// The percentage of lines that must be executed.
const GOAL: usize = 90;

/// The counters of one run.
pub(crate) struct Coverage {
    dir: PathBuf,
}

impl Coverage {
    /// Forgets the counters of earlier runs.
    pub(crate) fn begin(sh: &Shell, target_dir: &Path) -> anyhow::Result<Self> {
        let dir = target_dir.join("counters");
        sh.remove_path(&dir)?;
        let dir = sh.create_dir(&dir)?;
        Ok(Self { dir })
    }

    /// Makes each program write its counters to a file of its own.
    pub(crate) fn push_env<'sh>(&self, sh: &'sh Shell) -> PushEnv<'sh> {
        sh.push_env("LLVM_PROFILE_FILE", self.dir.join("%p-%m.profraw"))
    }

    /// Prints the lines that none of the `programs` executed. Fails if they are too many.
    pub(crate) fn report(&self, sh: &Shell, programs: &BTreeSet<PathBuf>) -> anyhow::Result<()> {
        let files = sh.read_dir(&self.dir)?;
        ensure!(!files.is_empty(), "no program has written its counters");
        let data = self.dir.join("all.profdata");
        cmd!(sh, "{PROFDATA} merge --sparse -o {data} {files...}")
            .quiet()
            .run()?;
        let objects = programs.iter().map(|program| {
            let mut option = std::ffi::OsString::from("--object=");
            option.push(program);
            option
        });
        let export = cmd!(sh, "{COV} export --format=lcov --instr-profile {data}");
        let report = export.args(objects).quiet().read()?;
        let lines = Lines::parse(&report, &sh.current_dir().join(SOURCE))?;
        print!("{}", lines.summary());
        let (executed, all) = lines.count();
        ensure!(all > 0, "{COV} reports no line of {SOURCE}");
        ensure!(
            executed * 100 >= all * GOAL,
            "less than {GOAL} % of the lines of {SOURCE} were executed"
        );
        Ok(())
    }
}

/// The lines with code of each file, and whether they were executed.
#[derive(Debug, PartialEq, Eq)]
struct Lines(BTreeMap<PathBuf, BTreeMap<u32, bool>>);

impl Lines {
    /// Reads the files under `root` from a report in the format of lcov.
    fn parse(report: &str, root: &Path) -> anyhow::Result<Self> {
        let mut files = BTreeMap::<_, BTreeMap<_, _>>::new();
        let mut file = None;
        for line in report.lines() {
            if let Some(path) = line.strip_prefix("SF:") {
                file = Path::new(path).strip_prefix(root).ok();
            } else if let (Some(file), Some(data)) = (file, line.strip_prefix("DA:")) {
                let (number, count) = data.split_once(',').context("a line and its count")?;
                let executed = count.parse::<u64>()? > 0;
                let lines = files.entry(file.to_owned()).or_default();
                *lines.entry(number.parse()?).or_default() |= executed;
            }
        }
        Ok(Self(files))
    }

    /// Returns how many lines were executed, and how many there are.
    fn count(&self) -> (usize, usize) {
        let lines = || self.0.values().flat_map(BTreeMap::values);
        (
            lines().filter(|executed| **executed).count(),
            lines().count(),
        )
    }

    fn summary(&self) -> String {
        let (executed, all) = self.count();
        let mut text = format!("executed: {executed} of {all} lines of {SOURCE}\n");
        for (file, lines) in &self.0 {
            let missed: Vec<_> = lines.iter().filter(|(_, executed)| !**executed).collect();
            if missed.is_empty() {
                continue;
            }
            let numbers = missed.iter().map(|(number, _)| number.to_string());
            let numbers = numbers.collect::<Vec<_>>().join(" ");
            let _ = writeln!(text, "  not in {}: {numbers}", file.display());
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_counts_if_any_program_executed_it() {
        let report = "SF:/w/src/macos/a.rs\nDA:3,0\nDA:4,1\nend_of_record\n\
                      SF:/w/src/other.rs\nDA:1,0\nend_of_record\n\
                      SF:/w/src/macos/a.rs\nDA:3,7\nDA:5,0\nend_of_record\n";
        let lines = Lines::parse(report, Path::new("/w/src/macos")).expect("a report");
        assert_eq!(lines.count(), (2, 3));
        let summary = lines.summary();
        assert!(summary.contains("2 of 3 lines"), "{summary}");
        assert!(summary.ends_with("not in a.rs: 5\n"), "{summary}");
    }

    #[test]
    fn a_damaged_report_is_an_error() {
        let parse = |report| Lines::parse(report, Path::new("/w"));
        parse("SF:/w/a.rs\nDA:3\n").expect_err("no count");
        parse("SF:/w/a.rs\nDA:x,1\n").expect_err("no number");
        let lines = parse("DA:x,1\n").expect("a line of no file");
        assert_eq!(lines.count(), (0, 0));
    }
}
