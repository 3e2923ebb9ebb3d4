//! The steps of `cargo xtask prove` that a change calls for.

use anyhow::anyhow;
use xshell::{Shell, cmd};

use super::suite::Step;

/// A change to one of these may change what any step does.
const EVERYTHING: [&str; 3] = ["Cargo.toml", "Cargo.lock", ".cargo"];

/// A change to one of these may change what a step does with any crate.
const TASKS: [&str; 3] = ["xtask", "testing/mutants", "testing/sanitizers"];

/// Steps, and what they are limited to.
#[derive(Debug)]
pub(super) struct Selection {
    /// The revision that was compared with.
    pub since: String,
    pub steps: Vec<&'static Step>,
    /// The crates that changed; empty where all are to be looked at, as after a change to a task.
    pub crates: Vec<String>,
}

/// Selects those of `steps` that are about what changed since `rev`, in commits and in the work
/// tree.
pub(super) fn select(
    sh: &Shell,
    steps: &'static [Step],
    rev: Option<&str>,
) -> anyhow::Result<Selection> {
    let since = match rev {
        Some(rev) => rev.to_owned(),
        None => default_revision(sh),
    };
    let commit = format!("{since}^{{commit}}");
    let commit = cmd!(sh, "git rev-parse --verify --end-of-options {commit}");
    let commit =
        commit.quiet().ignore_stderr().read().map_err(|_| {
            anyhow!("{since:?} is not a revision; to name steps, leave --changed out")
        })?;
    // Paths end in a zero byte, unquoted. A moved file is one that is gone and a new one.
    let changed = cmd!(sh, "git diff --name-only --no-renames -z {commit} --");
    let changed = changed.quiet().read()?;
    let new = cmd!(sh, "git ls-files --others --exclude-standard -z");
    let new = new.quiet().read()?;
    let paths = changed.split('\0').chain(new.split('\0'));
    let paths: Vec<_> = paths.filter(|path| !path.is_empty()).collect();
    let (steps, crates) = for_paths(steps, &paths);
    Ok(Selection {
        since,
        steps,
        crates,
    })
}

fn default_revision(sh: &Shell) -> String {
    let upstream = "@{upstream}";
    let base = cmd!(sh, "git merge-base HEAD {upstream}");
    let upstream = base.quiet().ignore_stderr().read();
    upstream.unwrap_or_else(|_| "HEAD~1".into())
}

/// Returns whether `step` is about the file at `path`.
pub(super) fn is_about(step: &Step, path: &str) -> bool {
    step.paths.iter().any(|place| is_within(path, place))
}

fn is_within(path: &str, place: &str) -> bool {
    let rest = path.strip_prefix(place);
    rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

fn for_paths(all: &'static [Step], paths: &[&str]) -> (Vec<&'static Step>, Vec<String>) {
    let everywhere = |path: &&str| EVERYTHING.iter().any(|place| is_within(path, place));
    if paths.iter().any(everywhere) {
        return (all.iter().collect(), Vec::new());
    }
    let wanted = |step: &&Step| paths.iter().any(|path| is_about(step, path));
    let steps = all.iter().filter(wanted).collect();
    let task = |path: &&str| TASKS.iter().any(|place| is_within(path, place));
    if paths.iter().any(task) {
        return (steps, Vec::new());
    }
    let mut crates: Vec<_> = paths
        .iter()
        .filter_map(|path| path.strip_prefix("crates/")?.split('/').next())
        .map(str::to_owned)
        .collect();
    crates.sort();
    crates.dedup();
    (steps, crates)
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use rstest::rstest;

    use super::super::prove::SUITE;
    use super::*;

    #[rstest]
    #[case::one_crate(&["crates/image-format/src/read.rs"], &["tests", "packages", "macos", "demo", "crash", "faults", "soak", "fs-matrix", "fuzzing", "sanitize", "load"])]
    #[case::a_model(&["crates/hvf-backend/src/tracker/vcpus.rs"], &["tests", "packages", "interleavings", "macos", "fake-hvf", "syndromes", "demo", "sanitize", "mutants", "load"])]
    #[case::a_program(&["testing/soak/src/main.rs"], &["tests", "macos", "soak", "load"])]
    #[case::the_scenarios(&["testing/scenarios/src/lib.rs"], &["tests", "macos", "crash", "faults", "fs-matrix", "load"])]
    #[case::a_page(&["docs/reliability.md"], &[])]
    #[case::the_readme(&["README.md"], &["fresh"])]
    fn a_path_selects_the_steps_about_it(#[case] paths: &[&str], #[case] expected: &[&str]) {
        let (steps, _) = for_paths(SUITE.steps, paths);
        let names: Vec<_> = steps.iter().map(|step| step.name).collect();
        assert_eq!(names, expected);
    }

    #[test]
    fn a_changed_dependency_selects_every_step_for_all_crates() {
        let (steps, crates) = for_paths(
            SUITE.steps,
            &["crates/sparse-file/src/lib.rs", "Cargo.lock"],
        );
        assert_eq!(steps.len(), SUITE.steps.len());
        assert!(crates.is_empty());
    }

    #[test]
    fn a_changed_task_looks_at_all_crates() {
        let (steps, crates) = for_paths(
            SUITE.steps,
            &["crates/ramsnap/src/main.rs", "testing/mutants/Cargo.toml"],
        );
        assert!(steps.iter().any(|step| step.name == "mutants"));
        assert!(crates.is_empty());
    }

    #[test]
    fn changed_crates_are_named_once() {
        let (_, crates) = for_paths(
            SUITE.steps,
            &["crates/b/src/x.rs", "crates/a/Cargo.toml", "crates/b/y"],
        );
        assert_eq!(crates, ["a", "b"]);
    }

    #[test]
    fn a_longer_name_is_not_within_a_shorter_one() {
        assert!(!is_within("testing/soak-report/src/lib.rs", "testing/soak"));
    }

    #[test]
    fn every_crate_is_tested_sanitized_or_more_when_it_changes() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for dir in std::fs::read_dir(root.join("crates")).expect("crates") {
            let name = dir.expect("a crate").file_name();
            let file = format!("crates/{}/src/lib.rs", name.display());
            let (steps, crates) = for_paths(SUITE.steps, &[&file]);
            assert!(steps.len() >= 3, "{file}");
            assert_eq!(crates, [name.to_str().expect("a name")]);
        }
    }

    #[test]
    fn every_path_of_a_step_exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for step in SUITE.steps {
            assert!(!step.paths.is_empty(), "{}", step.name);
            for path in step.paths {
                assert!(root.join(path).exists(), "{path} of {}", step.name);
            }
        }
    }
}
