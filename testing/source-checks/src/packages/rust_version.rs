//! The oldest compiler of the published crates, and that of their dependencies.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use xshell::{Shell, cmd};

use super::is_published;

/// The systems on which the crates are built. Dependencies of others do not count.
const TARGETS: [&str; 2] = ["x86_64-unknown-linux-gnu", "aarch64-apple-darwin"];

/// The lint that finds items of the standard library that the oldest compiler lacks.
const LINT: &str = "incompatible_msrv";

/// What `cargo metadata` prints.
#[derive(Deserialize)]
struct Graph {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    source: Option<String>,
    rust_version: Option<String>,
    manifest_path: String,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Edge>,
}

#[derive(Deserialize)]
struct Edge {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    kind: Option<String>,
}

/// Fails if a dependency of a published crate requires a newer compiler than the crate, if the lint
/// for the standard library is off, or if the README names another version.
pub(crate) fn check_rust_versions(sh: &Shell) -> anyhow::Result<()> {
    let mut problems = BTreeSet::new();
    for target in TARGETS {
        let metadata = cmd!(
            sh,
            "cargo metadata --format-version 1 --locked --all-features --filter-platform {target}"
        );
        let graph: Graph = serde_json::from_str(&metadata.quiet().read()?)?;
        problems.extend(graph.problems()?);
    }
    let manifest = sh.read_file("Cargo.toml")?;
    let version = workspace_version(&manifest).context("Cargo.toml has no rust-version")?;
    if !manifest.contains(&format!("\n{LINT} = "))
        || manifest.contains(&format!("{LINT} = \"allow"))
    {
        problems.insert(format!("Cargo.toml does not turn the lint {LINT} on"));
    }
    if !sh
        .read_file("README.md")?
        .contains(&format!("Rust {version} or newer"))
    {
        problems.insert(format!(
            "README.md does not say \"Rust {version} or newer\""
        ));
    }
    for problem in &problems {
        println!("{problem}");
    }
    let count = problems.len();
    ensure!(count == 0, "{count} problems of `rust-version`");
    Ok(())
}

/// Returns the `rust-version` of the published crates.
fn workspace_version(manifest: &str) -> Option<&str> {
    let line = manifest
        .lines()
        .find(|line| line.starts_with("rust-version = "))?;
    line.split('"').nth(1)
}

impl Graph {
    /// Returns the dependencies of published crates that require a newer compiler than the crate.
    fn problems(&self) -> anyhow::Result<Vec<String>> {
        let packages: BTreeMap<_, _> = self.packages.iter().map(|it| (&*it.id, it)).collect();
        let nodes: BTreeMap<_, _> = self.resolve.nodes.iter().map(|it| (&*it.id, it)).collect();
        let mut problems = Vec::new();
        let ours = self.packages.iter();
        for package in ours.filter(|it| is_published(it.source.as_deref(), &it.manifest_path)) {
            let Some(oldest) = package.rust_version.as_deref() else {
                problems.push(format!("{}: Cargo.toml has no rust-version", package.name));
                continue;
            };
            let (mut linked, mut left) = (BTreeSet::new(), vec![&*package.id]);
            while let Some(id) = left.pop() {
                if !linked.insert(id) {
                    continue;
                }
                let node = nodes.get(id).with_context(|| format!("no node of {id}"))?;
                let edges = node.deps.iter().filter(|edge| edge.is_linked());
                left.extend(edges.map(|edge| &*edge.pkg));
            }
            for dependency in linked.iter().filter_map(|id| packages.get(id)) {
                let Some(required) = dependency.rust_version.as_deref() else {
                    continue;
                };
                if numbers(required)? > numbers(oldest)? {
                    let (name, version) = (&dependency.name, &dependency.version);
                    problems.push(format!(
                        "{}: {name} {version} requires Rust {required}, but rust-version is {oldest}: select an \
                         older version of it, or raise rust-version",
                        package.name
                    ));
                }
            }
        }
        Ok(problems)
    }
}

impl Edge {
    /// Returns whether a build of the crate needs the dependency.
    fn is_linked(&self) -> bool {
        self.dep_kinds
            .iter()
            .any(|it| it.kind.as_deref() != Some("dev"))
    }
}

/// Returns the numbers of a version; missing ones are zero.
fn numbers(version: &str) -> anyhow::Result<[u32; 3]> {
    let mut numbers = [0; 3];
    for (number, text) in numbers.iter_mut().zip(version.split('.')) {
        *number = text
            .parse()
            .with_context(|| format!("not a version: {version}"))?;
    }
    Ok(numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A crate with `rust-version` 1.88 that depends on another one in this way.
    fn graph(kind: Option<&str>, required: Option<&str>) -> Graph {
        let kinds = serde_json::json!([{ "kind": kind }]);
        serde_json::from_value(serde_json::json!({
            "packages": [
                {
                    "id": "a", "name": "a", "version": "0.1.0", "source": null,
                    "rust_version": "1.88", "manifest_path": "/w/crates/a/Cargo.toml",
                },
                {
                    "id": "b", "name": "b", "version": "2.0.0", "source": "registry",
                    "rust_version": required, "manifest_path": "/r/b/Cargo.toml",
                },
            ],
            "resolve": { "nodes": [
                { "id": "a", "deps": [{ "pkg": "b", "dep_kinds": kinds }] },
                { "id": "b", "deps": [] },
            ] },
        }))
        .expect("a graph")
    }

    #[test]
    fn a_dependency_that_needs_a_newer_compiler_is_a_problem() {
        for kind in [None, Some("build")] {
            let problems = graph(kind, Some("1.88.1")).problems().unwrap();
            assert_eq!(problems.len(), 1);
            assert!(problems[0].starts_with("a: b 2.0.0 requires Rust 1.88.1"));
        }
        for required in [None, Some("1.88"), Some("1.88.0"), Some("1.9")] {
            assert!(graph(None, required).problems().unwrap().is_empty());
        }
        assert!(
            graph(Some("dev"), Some("1.95"))
                .problems()
                .unwrap()
                .is_empty()
        );
    }

    #[test]
    fn a_published_crate_without_a_version_is_a_problem() {
        let mut graph = graph(None, None);
        graph.packages[0].rust_version = None;
        assert_eq!(graph.problems().unwrap().len(), 1);
    }

    #[test]
    fn the_version_is_that_of_the_workspace() {
        let manifest = "[workspace.package]\nrust-version = \"1.88\"\n";
        assert_eq!(workspace_version(manifest), Some("1.88"));
        assert_eq!(workspace_version(""), None);
    }
}
