//! The workflows of hosted machines are valid YAML, and every command in them exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use file_systems::FileSystem;
use serde_json::Value;
use yaml_rust2::{Yaml, YamlLoader};

/// Crates whose tests need KVM, userfaultfd or a hypervisor, which hosted machines with macOS lack.
const NOT_PORTABLE: [&str; 3] = ["ramsnap-hvf-backend", "ramsnap-kvm-backend", "ramsnap-uffd"];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Returns the file name and the content of each workflow.
fn workflows() -> Vec<(String, Yaml)> {
    let files = fs::read_dir(root().join(".github/workflows")).expect("workflows");
    let read = |file: fs::DirEntry| {
        let text = fs::read_to_string(file.path()).expect("text");
        let mut documents = YamlLoader::load_from_str(&text).expect("valid YAML");
        assert_eq!(documents.len(), 1, "{file:?}");
        (file.file_name().display().to_string(), documents.remove(0))
    };
    files.map(|file| read(file.expect("a file"))).collect()
}

/// Returns the values of a key of all jobs' steps.
fn of_steps(workflow: &Yaml, key: &str) -> Vec<String> {
    let jobs = workflow["jobs"].as_hash().expect("jobs").values();
    let steps = jobs.flat_map(|job| job["steps"].as_vec().expect("steps").clone());
    let values = steps.filter_map(|step| step[key].as_str().map(str::to_owned));
    values.collect()
}

/// Returns the words of each command, without what runs it as root.
fn commands(workflow: &Yaml) -> Vec<Vec<String>> {
    let mut commands = Vec::new();
    for run in of_steps(workflow, "run") {
        let words = run.replace("sudo -E env \"PATH=$PATH\"", "");
        commands.push(words.split_whitespace().map(str::to_owned).collect());
    }
    commands
}

/// Returns the published crates of the workspace.
fn published() -> BTreeSet<String> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--offline"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let packages = metadata["packages"].as_array().expect("packages").iter();
    // An empty list means that the crate is published nowhere.
    let published = packages.filter(|package| package["publish"].is_null());
    let names = published.map(|package| package["name"].as_str().expect("a name").to_owned());
    names.collect()
}

#[test]
fn a_workflow_has_jobs_on_a_system_with_steps() {
    for (name, workflow) in workflows() {
        assert!(workflow["name"].as_str().is_some(), "{name}");
        assert!(!workflow["on"].is_badvalue(), "{name}");
        for (job, content) in workflow["jobs"].as_hash().expect("jobs") {
            assert!(content["runs-on"].as_str().is_some(), "{name}: {job:?}");
            assert!(
                content["timeout-minutes"].as_i64().is_some(),
                "{name}: {job:?}"
            );
            for step in content["steps"].as_vec().expect("steps") {
                let kinds = ["run", "uses"].map(|kind| step[kind].as_str().is_some());
                assert_eq!(
                    kinds.iter().filter(|is| **is).count(),
                    1,
                    "{name}: {step:?}"
                );
            }
        }
        for action in of_steps(&workflow, "uses") {
            assert!(action.contains('@'), "{name}: {action} has no version");
        }
    }
}

#[test]
fn every_command_of_a_workflow_exists() {
    let help = Command::new(env!("CARGO_BIN_EXE_xtask"))
        .arg("--help")
        .output();
    let help = String::from_utf8(help.expect("it runs").stdout).expect("text");
    let is_task = |task: &str| {
        let mut lines = help.lines();
        lines.any(|line| line.split_whitespace().next() == Some(task))
    };
    let mut tasks = 0;
    for (name, workflow) in workflows() {
        for words in commands(&workflow) {
            let words: Vec<&str> = words.iter().map(String::as_str).collect();
            match words.as_slice() {
                ["rustup", "update", "stable"] | ["cargo", "test", ..] => {}
                ["cargo", "xtask", task, ..] if is_task(task) => tasks += 1,
                unknown => panic!("{name}: {unknown:?}"),
            }
        }
    }
    assert!(tasks > 0, "no task was found");
}

#[test]
fn the_portable_crates_are_all_tested_on_macos() {
    let macos = workflows()
        .into_iter()
        .find(|(name, _)| name == "macos.yml");
    let (_, macos) = macos.expect("the workflow for macOS");
    let commands = commands(&macos);
    let test = commands.iter().find(|words| words[1] == "test");
    let words = test.expect("a test command");
    let tested = words
        .iter()
        .zip(&words[1..])
        .filter(|(flag, _)| *flag == "-p");
    let tested: BTreeSet<_> = tested.map(|(_, name)| name.clone()).collect();
    let mut portable = published();
    for name in NOT_PORTABLE {
        assert!(portable.remove(name), "{name} is no crate");
    }
    assert_eq!(tested, portable);
}

#[test]
fn every_file_system_of_macos_is_checked() {
    let mut checked = BTreeSet::new();
    for (_, workflow) in workflows() {
        for words in commands(&workflow) {
            if let Some(at) = words.iter().position(|word| word == "--only") {
                checked.extend(words[at + 1].split(',').map(str::to_owned));
            }
        }
    }
    let all = FileSystem::in_matrix().filter(|fs| fs.macos.is_some());
    let all: BTreeSet<_> = all.map(|fs| fs.name.to_owned()).collect();
    assert_eq!(checked, all);
}
