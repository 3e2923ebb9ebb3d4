//! The table, the list of what does not hold, and both as files.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::Context;
use comfy_table::{Table, presets};
use serde::Serialize;

use super::finding::{Family, Finding, Verdict};

/// What was found on one mount.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct MountReport {
    pub mount: String,
    /// Whose code ran.
    pub driver: String,
    pub findings: Vec<Finding>,
    /// Why not everything could be checked.
    pub failed: Option<String>,
}

impl MountReport {
    pub(crate) fn new(mount: impl Into<String>) -> Self {
        Self {
            mount: mount.into(),
            driver: String::new(),
            findings: Vec::new(),
            failed: None,
        }
    }

    fn of(&self, family: Family) -> impl Iterator<Item = &Finding> {
        self.findings
            .iter()
            .filter(move |finding| finding.family == family)
    }

    pub(crate) fn count(&self, verdict: Verdict) -> usize {
        self.findings
            .iter()
            .filter(|finding| finding.verdict == verdict)
            .count()
    }

    /// `14 ✓ 1 ≠`; nothing where nothing was checked.
    fn cell(&self, family: Family) -> String {
        let verdicts = [
            Verdict::Holds,
            Verdict::Differs,
            Verdict::Broken,
            Verdict::NotRun,
        ];
        let marks = verdicts.into_iter().filter_map(|verdict| {
            let count = self
                .of(family)
                .filter(|finding| finding.verdict == verdict)
                .count();
            (count > 0).then(|| format!("{count} {}", verdict.mark()))
        });
        marks.collect::<Vec<_>>().join(" ")
    }
}

/// All mounts, in the order of the table.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    pub mounts: Vec<MountReport>,
    pub seconds: u64,
}

const LEGEND: &str = "✓ holds   ≠ differs: the file system lacks it   ✗ broken: a promise of the library fails   – not run";

impl Report {
    fn marked(&self, verdict: Verdict) -> impl Iterator<Item = (&MountReport, &Finding)> {
        self.mounts.iter().flat_map(move |mount| {
            let marked = mount
                .findings
                .iter()
                .filter(move |finding| finding.verdict == verdict);
            marked.map(move |finding| (mount, finding))
        })
    }

    pub(crate) fn broken(&self) -> usize {
        self.marked(Verdict::Broken).count()
    }

    pub(crate) fn failed(&self) -> impl Iterator<Item = (&str, &str)> {
        self.mounts
            .iter()
            .filter_map(|mount| Some((mount.mount.as_str(), mount.failed.as_deref()?)))
    }

    /// For the terminal.
    pub(crate) fn text(&self) -> String {
        let mut table = Table::new();
        let header = ["mount"].into_iter().chain(Family::ALL.map(Family::name));
        table
            .load_style(presets::UTF8_FULL_CONDENSED)
            .set_header(header.collect::<Vec<_>>());
        for mount in &self.mounts {
            let cells = Family::ALL.map(|family| mount.cell(family));
            table.add_row([mount.mount.clone()].into_iter().chain(cells));
        }
        let mut text = format!("{table}\n{LEGEND}\n");
        for verdict in [Verdict::NotRun, Verdict::Differs, Verdict::Broken] {
            let mut title = format!("\n{verdict}:\n");
            for (mount, finding) in self.marked(verdict) {
                text += &std::mem::take(&mut title);
                let _ = writeln!(
                    text,
                    "  {} {}: {}\n      expected: {}\n      seen:     {}",
                    verdict.mark(),
                    mount.mount,
                    finding.check,
                    finding.expected,
                    finding.seen
                );
            }
        }
        for (mount, why) in self.failed() {
            let _ = writeln!(text, "\n{mount} was not checked to the end: {why}");
        }
        text
    }

    pub(crate) fn save_json(&self, path: &Path) -> anyhow::Result<()> {
        save(path, &(serde_json::to_string_pretty(self)? + "\n"))
    }

    pub(crate) fn save_markdown(&self, path: &Path) -> anyhow::Result<()> {
        save(path, &self.markdown())
    }

    fn markdown(&self) -> String {
        let mut page = String::from(INTRODUCTION);
        let families = Family::ALL.map(Family::name).join(" | ");
        let _ = writeln!(page, "| mount | {families} |");
        let _ = writeln!(page, "|---|{}", "---|".repeat(Family::ALL.len()));
        for mount in &self.mounts {
            let cells = Family::ALL.map(|family| mount.cell(family)).join(" | ");
            let _ = writeln!(page, "| {} | {cells} |", mount.mount);
        }
        let _ = writeln!(page, "\n{LEGEND}");
        page += "\n## Drivers\n\n| mount | driver |\n|---|---|\n";
        for mount in &self.mounts {
            let _ = writeln!(page, "| {} | {} |", mount.mount, mount.driver);
        }
        for (verdict, title) in [
            (Verdict::Broken, "Broken promises"),
            (Verdict::Differs, "Differences"),
            (Verdict::NotRun, "Checks that were not run"),
        ] {
            let _ = writeln!(page, "\n## {title}\n");
            if self.marked(verdict).next().is_none() {
                page += "Nothing.\n";
                continue;
            }
            page += "| mount | check | expected | seen |\n|---|---|---|---|\n";
            for (mount, finding) in self.marked(verdict) {
                let row = [
                    &mount.mount,
                    &finding.check,
                    &finding.expected,
                    &finding.seen,
                ];
                let row = row.map(|cell| cell.replace('|', "\\|").replace('\n', " "));
                let _ = writeln!(page, "| {} |", row.join(" | "));
            }
        }
        page += "\n## Where each check holds\n\n";
        for family in Family::ALL {
            let mut checks: Vec<&str> = Vec::new();
            for mount in &self.mounts {
                for finding in mount.of(family) {
                    if !checks.contains(&finding.check.as_str()) {
                        checks.push(&finding.check);
                    }
                }
            }
            for check in checks {
                let seen = |mount: &MountReport| {
                    mount
                        .of(family)
                        .any(|finding| finding.check == check && finding.verdict == Verdict::Holds)
                };
                let holding: Vec<_> = self
                    .mounts
                    .iter()
                    .filter(|mount| seen(mount))
                    .map(|mount| mount.mount.as_str())
                    .collect();
                let _ = writeln!(
                    page,
                    "- {}, {check}: {}",
                    family.name(),
                    match holding.as_slice() {
                        [] => "nowhere".into(),
                        all if all.len() == self.mounts.len() => "everywhere".into(),
                        some => some.join(", "),
                    }
                );
            }
        }
        page
    }
}

fn save(path: &Path, text: &str) -> anyhow::Result<()> {
    let dir = path.parent().unwrap_or(Path::new(""));
    fs::create_dir_all(dir)
        .and_then(|()| fs::write(path, text))
        .with_context(|| format!("can't write {}", path.display()))
}

const INTRODUCTION: &str = "# Results on each file system

Written by `cargo xtask fs-matrix --markdown docs/fs-matrix.md`, which mounts each file system and
runs the library on it. Do not edit it.

**APFS and HFS+ ran on Linux drivers**, not on Apple's. A check that differs there may hold on a
Mac. On macOS, the same command checks the system's own APFS, HFS+ and exFAT.

Power loss was tested in a guest for every file system on a disk, including ext4, XFS and btrfs:
QEMU is killed during a loop of commits. After every other kill, each write that no flush followed
is kept, dropped or torn, as a disk with a volatile cache may do.

";

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(check: &str, verdict: Verdict) -> Finding {
        Finding {
            family: Family::Space,
            check: check.into(),
            expected: "this".into(),
            seen: "that | or so".into(),
            verdict,
            milliseconds: 1,
        }
    }

    fn report() -> Report {
        let mut apfs = MountReport::new("APFS");
        apfs.driver = "some driver".into();
        apfs.findings = vec![
            finding("holes", Verdict::Holds),
            finding("punching", Verdict::Differs),
            finding("extents", Verdict::Broken),
        ];
        Report {
            mounts: vec![apfs],
            seconds: 1,
        }
    }

    #[test]
    fn failed_checks_are_listed_with_expected_and_seen() {
        let text = report().text();
        assert!(text.contains("1 ✓ 1 ≠ 1 ✗"), "{text}");
        for line in [
            "≠ APFS: punching",
            "✗ APFS: extents",
            "expected: this",
            "seen:     that | or so",
        ] {
            assert!(text.contains(line), "{line} is not in {text}");
        }
        assert!(!text.contains("APFS: holes"), "{text}");
    }

    #[test]
    fn the_page_names_the_drivers_and_keeps_its_tables_whole() {
        let page = report().markdown();
        assert!(
            page.contains("**APFS and HFS+ ran on Linux drivers**"),
            "{page}"
        );
        assert!(page.contains("| APFS | some driver |"), "{page}");
        assert!(
            page.contains("| APFS | extents | this | that \\| or so |"),
            "{page}"
        );
        assert!(page.contains("- space, holes: everywhere"), "{page}");
    }
}
