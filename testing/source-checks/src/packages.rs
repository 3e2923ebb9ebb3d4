//! What is published: the manifests and archives of the crates, and the oldest versions of their
//! dependencies.

mod features;
mod rust_version;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, ensure};
use serde::Deserialize;
use xshell::{Shell, cmd};

pub(crate) use features::check_feature_sets;
pub(crate) use rust_version::check_rust_versions;

/// What each archive holds beside the code.
const FILES: [&str; 3] = ["LICENSE-APACHE", "LICENSE-MIT", "README.md"];

/// The most keywords that the registry accepts.
const KEYWORDS: usize = 5;

/// What `cargo metadata` prints.
#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    version: String,
    source: Option<String>,
    description: Option<String>,
    license: Option<String>,
    repository: Option<String>,
    readme: Option<String>,
    keywords: Vec<String>,
    categories: Vec<String>,
    features: BTreeMap<String, Vec<String>>,
    metadata: Option<serde_json::Value>,
    dependencies: Vec<Dependency>,
    targets: Vec<Target>,
    manifest_path: String,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    source: Option<String>,
    req: String,
    kind: Option<String>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

impl Metadata {
    /// Reads the metadata of the workspace in the shell's directory, with `arguments`.
    fn read(sh: &Shell, arguments: &[&str]) -> anyhow::Result<Self> {
        let metadata = cmd!(sh, "cargo metadata --format-version 1 {arguments...}");
        Ok(serde_json::from_str(&metadata.quiet().read()?)?)
    }

    /// Returns the packages that are [published](is_published).
    fn published(&self) -> impl Iterator<Item = &Package> {
        let packages = self.packages.iter();
        packages.filter(|it| is_published(it.source.as_deref(), &it.manifest_path))
    }
}

/// Returns whether a package is published: it is one of the workspace, which has no source, and is
/// under `crates/`.
fn is_published(source: Option<&str>, manifest_path: &str) -> bool {
    let parent = Path::new(manifest_path).ancestors().nth(2);
    source.is_none() && parent.is_some_and(|parent| parent.ends_with("crates"))
}

/// Fails unless the manifest, the README and the archive of each published crate are complete.
pub(crate) fn check_archives(sh: &Shell) -> anyhow::Result<()> {
    let metadata = Metadata::read(sh, &["--locked", "--no-deps"])?;
    let mut problems = Vec::new();
    for package in metadata.published() {
        let manifest = &package.manifest_path;
        let list = cmd!(
            sh,
            "cargo package --locked --allow-dirty --list --manifest-path {manifest}"
        );
        let list = list.quiet().read()?;
        let files: Vec<_> = list.lines().collect();
        let readme = Path::new(manifest).with_file_name("README.md");
        let readme = fs::read_to_string(readme).unwrap_or_default();
        problems.extend(package.problems(&files, &readme));
    }
    for problem in &problems {
        println!("{problem}");
    }
    let count = problems.len();
    ensure!(count == 0, "{count} problems of packages: complete them");
    Ok(())
}

impl Package {
    /// Returns what is missing in the package, whose archive has `files`.
    fn problems(&self, files: &[&str], readme: &str) -> Vec<String> {
        let mut missing = Vec::new();
        let mut check = |complete: bool, what: &str| {
            if !complete {
                missing.push(format!("{}: {what}", self.name));
            }
        };
        check(self.description.is_some(), "Cargo.toml has no description");
        check(self.license.is_some(), "Cargo.toml has no license");
        check(self.repository.is_some(), "Cargo.toml has no repository");
        check(self.readme.is_some(), "Cargo.toml has no readme");
        let keywords = 1..=KEYWORDS;
        check(
            keywords.contains(&self.keywords.len()),
            "Cargo.toml does not have one to five keywords",
        );
        check(!self.categories.is_empty(), "Cargo.toml has no categories");
        let docs = self.metadata.as_ref().and_then(|all| all.get("docs"));
        check(
            docs.is_some_and(|docs| docs.get("rs").is_some()),
            "Cargo.toml has no [package.metadata.docs.rs]",
        );
        for file in FILES {
            check(files.contains(&file), &format!("the archive has no {file}"));
        }
        let library = |target: &Target| target.kind.iter().any(|kind| kind == "lib");
        if self.targets.iter().any(library) {
            let version: Vec<_> = self.version.split('.').take(2).collect();
            let version = format!("\"{}\"", version.join("."));
            // By its own name, or renamed to that of the library.
            let names = [format!("{} = ", self.name), format!("\"{}\"", self.name)];
            let usage = |line: &str| {
                line.contains(&version) && names.iter().any(|name| line.contains(name))
            };
            check(
                readme.lines().any(|line| line == "[dependencies]") && readme.lines().any(usage),
                &format!("README.md has no [dependencies] with version {version} of the crate"),
            );
        }
        missing
    }
}

/// Builds each published crate from its archive, as a registry would get it.
pub(crate) fn build_archives(sh: &Shell) -> anyhow::Result<()> {
    let metadata = Metadata::read(sh, &["--locked", "--no-deps"])?;
    let packages = metadata.published();
    let packages: Vec<_> = packages
        .flat_map(|package| ["--package", &package.name])
        .collect();
    Ok(cmd!(sh, "cargo package --locked --allow-dirty {packages...}").run()?)
}

/// A directory for the copy of the workspace that is resolved to the oldest versions.
const COPY: &str = "target/oldest-dependencies";

/// Builds the published crates with the oldest versions that their manifests accept of all direct
/// dependencies from the registry.
pub(crate) fn check_oldest_dependencies(sh: &Shell) -> anyhow::Result<()> {
    // A copy: its Cargo.lock changes.
    let copy = sh.current_dir().join(COPY);
    copy_workspace(sh, &copy)?;
    let target = copy.with_extension("target");
    let _dir = sh.push_dir(&copy);
    let metadata = Metadata::read(sh, &["--locked"])?;
    let mut direct = BTreeSet::new();
    for package in metadata.published() {
        let dependencies = package.dependencies.iter();
        let from_registry = dependencies.filter(|found| found.source.is_some());
        let linked = from_registry.filter(|found| found.kind.as_deref() != Some("dev"));
        direct.extend(linked.map(|found| (found.name.as_str(), oldest(&found.req))));
    }
    pin(sh, &metadata, direct)?;
    let packages = metadata.published();
    let packages: Vec<_> = packages
        .flat_map(|package| ["--package", &package.name])
        .collect();
    let check = cmd!(
        sh,
        "cargo check --locked --all-features --target-dir {target} {packages...}"
    );
    check
        .run()
        .context("a dependency lacks an item that a crate uses: raise its version in Cargo.toml")
}

/// Copies what is under version control, or may come under it, to `copy`.
fn copy_workspace(sh: &Shell, copy: &Path) -> anyhow::Result<()> {
    let _ = fs::remove_dir_all(copy);
    let files = cmd!(sh, "git ls-files -z --cached --others --exclude-standard");
    for file in files.quiet().read()?.split('\0') {
        let from = sh.current_dir().join(file);
        if file.is_empty() || !from.is_file() {
            continue;
        }
        let to = copy.join(file);
        fs::create_dir_all(to.parent().context("a file in a directory")?)?;
        fs::copy(&from, &to).with_context(|| format!("failed to copy {file}"))?;
    }
    Ok(())
}

/// Selects the `versions` of dependencies in Cargo.lock. One may have to wait for another, which
/// requires a newer one itself.
fn pin(
    sh: &Shell,
    metadata: &Metadata,
    mut versions: BTreeSet<(&str, String)>,
) -> anyhow::Result<()> {
    loop {
        let mut refused = BTreeSet::new();
        let mut errors = Vec::new();
        for (name, version) in &versions {
            let found = metadata.packages.iter();
            let mut found = found.filter(|found| found.name == *name && found.source.is_some());
            let present = found.find(|found| is_compatible(&found.version, version));
            let present = present.with_context(|| format!("Cargo.lock has no {name} {version}"))?;
            if present.version == *version {
                continue;
            }
            // The version is part of the name, because Cargo.lock may have several.
            let update = |name: &str| {
                let update = cmd!(sh, "cargo update {name} --precise {version}").quiet();
                update.ignore_status().output()
            };
            let mut output = update(name)?;
            if !output.status.success() {
                output = update(&format!("{name}@{}", present.version))?;
            }
            if !output.status.success() {
                let why = String::from_utf8_lossy(&output.stderr);
                errors.push(format!("{name} {version}: {}", why.trim_end()));
                refused.insert((*name, version.clone()));
            }
        }
        if refused.is_empty() {
            return Ok(());
        }
        ensure!(
            refused.len() < versions.len(),
            "these versions cannot be selected; raise them in Cargo.toml:\n{}",
            errors.join("\n")
        );
        versions = refused;
    }
}

/// Returns the oldest version that a requirement such as `^1.2` accepts.
fn oldest(requirement: &str) -> String {
    let mut numbers: Vec<_> = requirement.trim_start_matches('^').split('.').collect();
    numbers.resize(3, "0");
    numbers.join(".")
}

/// Returns whether two versions are compatible as Cargo defines it, and thus exclude each other.
fn is_compatible(one: &str, other: &str) -> bool {
    let leading = |version: &str| {
        let mut numbers = version.split('.').map(str::to_owned);
        let major = numbers.next();
        let minor = numbers.next().filter(|_| major.as_deref() == Some("0"));
        (major, minor)
    };
    leading(one) == leading(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package() -> Package {
        serde_json::from_value(serde_json::json!({
            "name": "some-crate",
            "version": "0.1.2",
            "source": null,
            "description": "Does something",
            "license": "MIT",
            "repository": "https://example.org",
            "readme": "README.md",
            "keywords": ["some"],
            "categories": ["filesystem"],
            "features": {},
            "metadata": { "docs": { "rs": { "all-features": true } } },
            "dependencies": [],
            "targets": [{ "kind": ["lib"] }],
            "manifest_path": "/w/crates/some-crate/Cargo.toml",
        }))
        .expect("a package")
    }

    const README: &str = "```toml\n[dependencies]\nsome-crate = \"0.1\"\n```\n";

    #[test]
    fn a_complete_package_has_no_problem() {
        assert_eq!(package().problems(&FILES, README), [""; 0]);
        let renamed = "[dependencies]\nsome = { package = \"some-crate\", version = \"0.1\" }\n";
        assert_eq!(package().problems(&FILES, renamed), [""; 0]);
    }

    #[test]
    fn each_missing_part_is_a_problem() {
        let problems = package().problems(&FILES[1..], README);
        assert_eq!(problems, ["some-crate: the archive has no LICENSE-APACHE"]);
        let mut package = package();
        package.metadata = None;
        package.keywords = vec!["some".into(); 6];
        package.version = "0.2.0".into();
        assert_eq!(package.problems(&FILES, README).len(), 3);
        package.targets.clear();
        assert_eq!(package.problems(&FILES, "").len(), 2);
    }

    #[test]
    fn only_crates_of_the_workspace_are_published() {
        assert!(is_published(None, "/w/crates/some/Cargo.toml"));
        assert!(!is_published(None, "/w/testing/some/Cargo.toml"));
        assert!(!is_published(None, "/w/crates/some/fuzz/Cargo.toml"));
        assert!(!is_published(Some("registry"), "/w/crates/some/Cargo.toml"));
    }

    #[test]
    fn the_oldest_version_has_three_numbers() {
        assert_eq!(oldest("^1"), "1.0.0");
        assert_eq!(oldest("^0.31.3"), "0.31.3");
    }

    #[test]
    fn compatible_versions_share_their_first_nonzero_number() {
        assert!(is_compatible("1.2.3", "1.0.0"));
        assert!(is_compatible("0.31.3", "0.31.0"));
        assert!(!is_compatible("0.31.3", "0.30.0"));
        assert!(!is_compatible("1.0.0", "2.0.0"));
    }
}
