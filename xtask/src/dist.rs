//! `cargo xtask dist`: the tool as a release archive.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use serde_json::Value;
use xshell::{Shell, cmd};

/// The completion scripts, by shell and file name.
const COMPLETIONS: [(&str, &str); 4] = [
    ("bash", "ramsnap.bash"),
    ("elvish", "ramsnap.elv"),
    ("fish", "ramsnap.fish"),
    ("zsh", "_ramsnap"),
];
/// Files of the workspace in the archive, by their names there.
const PAGES: [(&str, &str); 6] = [
    ("CHANGELOG.md", "CHANGELOG.md"),
    ("LICENSE-APACHE", "LICENSE-APACHE"),
    ("LICENSE-MIT", "LICENSE-MIT"),
    ("crates/ramsnap/README.md", "README.md"),
    ("docs/command-line.md", "doc/command-line.md"),
    (
        "docs/command-line.schema.json",
        "doc/command-line.schema.json",
    ),
];
/// Files that each package must have.
const PACKAGED: [&str; 4] = [
    "man/man1/*.1",
    "completions/ramsnap.bash",
    "completions/ramsnap.fish",
    "completions/_ramsnap",
];
/// The directory in `target/dist` that the metadata of deb and rpm packages names.
const FILES: &str = "files";

/// Build the tool for a release: an archive with its manual pages and completion scripts
///
/// The archive and its checksum are put in target/dist. The same commit and toolchain make the same
/// archive. Then `cargo deb` and `cargo generate-rpm` can make packages, by the commands that are
/// printed.
#[derive(clap::Args)]
pub(crate) struct Dist {
    /// The target, such as aarch64-unknown-linux-gnu; it must run on this machine, which makes the
    /// manual pages
    #[arg(long, value_name = "TRIPLE")]
    target: Option<String>,
}

impl Dist {
    pub(crate) fn run(&self, sh: &Shell) -> anyhow::Result<()> {
        let metadata: Value = {
            let text = cmd!(sh, "cargo metadata --locked --format-version 1 --no-deps").read()?;
            serde_json::from_str(&text).context("the output of `cargo metadata` is not JSON")?
        };
        let dist = target_directory(&metadata)?.join("dist");
        let (commit, date) = commit(sh)?;
        let target = match &self.target {
            Some(target) => target.clone(),
            None => host(sh)?,
        };
        let build = {
            let _commit = sh.push_env("RAMSNAP_COMMIT", &commit);
            let given = self.target.iter().flat_map(|it| ["--target", it]);
            cmd!(
                sh,
                "cargo build --locked --profile dist --package ramsnap {given...}"
            )
            .run()
        };
        build?;
        let built = match &self.target {
            Some(target) => dist.with_file_name(target).join("dist/ramsnap"),
            None => dist.join("ramsnap"),
        };
        let files = dist.join(FILES);
        stage(sh, &built, &files)?;
        check_assets(sh, &metadata, &files)?;
        let version = package(&metadata)?["version"].as_str().unwrap_or_default();
        let name = format!("ramsnap-{version}-{target}");
        let archive = archive(sh, &dist, &files, &name, &date)?;
        let size = fs::metadata(&built)?.len();
        println!(
            "{}: commit {commit}, the program has {size} bytes",
            archive.display()
        );
        println!("packages: cargo deb --package ramsnap --profile dist --no-build");
        println!("          cargo generate-rpm --package crates/ramsnap --profile dist");
        Ok(())
    }
}

fn target_directory(metadata: &Value) -> anyhow::Result<PathBuf> {
    let dir = metadata["target_directory"].as_str();
    Ok(dir
        .context("`cargo metadata` names no target directory")?
        .into())
}

fn package(metadata: &Value) -> anyhow::Result<&Value> {
    let mut packages = metadata["packages"].as_array().into_iter().flatten();
    let package = packages.find(|package| package["name"] == "ramsnap");
    package.context("the workspace has no package `ramsnap`")
}

/// Returns the commit, marked if files differ from it, and its time in seconds since 1970.
fn commit(sh: &Shell) -> anyhow::Result<(String, String)> {
    let commit = cmd!(sh, "git rev-parse --short=12 HEAD").read()?;
    let date = cmd!(sh, "git log -1 --format=%ct").read()?;
    let changed = !cmd!(sh, "git status --porcelain --untracked-files=no")
        .read()?
        .is_empty();
    let mark = if changed { "-modified" } else { "" };
    Ok((format!("{commit}{mark}"), date))
}

fn host(sh: &Shell) -> anyhow::Result<String> {
    let version = cmd!(sh, "rustc -vV").read()?;
    let host = version.lines().find_map(|line| line.strip_prefix("host: "));
    Ok(host.context("rustc does not name its host")?.to_owned())
}

/// Collects the files of the archive.
fn stage(sh: &Shell, built: &Path, files: &Path) -> anyhow::Result<()> {
    sh.remove_path(files)?;
    for dir in ["completions", "doc"] {
        sh.create_dir(files.join(dir))?;
    }
    sh.copy_file(built, files.join("ramsnap"))?;
    let pages = files.join("man/man1");
    cmd!(sh, "{built} --quiet man {pages}").run()?;
    for (shell, name) in COMPLETIONS {
        let script = cmd!(sh, "{built} completions {shell}").read()?;
        sh.write_file(files.join("completions").join(name), script + "\n")?;
    }
    for (from, to) in PAGES {
        sh.copy_file(from, files.join(to))?;
    }
    Ok(())
}

/// Fails if the metadata of a package names a file that is not there, or lacks one that is.
fn check_assets(sh: &Shell, metadata: &Value, files: &Path) -> anyhow::Result<()> {
    let package = &package(metadata)?["metadata"];
    let pages = sh.read_dir(files.join("man/man1"))?;
    ensure!(pages.len() > 10, "there are {} manual pages", pages.len());
    for kind in ["deb", "generate-rpm"] {
        let assets = sources(&package[kind]["assets"]);
        let own: Vec<_> = assets
            .iter()
            .filter_map(|path| Some(path.split_once("target/dist/files/")?.1))
            .collect();
        for path in &own {
            let path = files.join(path.trim_end_matches("*.1"));
            ensure!(
                path.exists(),
                "the metadata of {kind} names {path:?}, which does not exist"
            );
        }
        for name in PACKAGED {
            ensure!(own.contains(&name), "the metadata of {kind} lacks {name}");
        }
    }
    Ok(())
}

/// Returns the sources of assets: `[from, to, mode]` of deb, and `{ source, ... }` of rpm.
fn sources(assets: &Value) -> Vec<String> {
    let assets = assets.as_array().into_iter().flatten();
    let source = |asset: &Value| {
        let source = asset.get(0).or_else(|| asset.get("source"))?;
        Some(source.as_str()?.to_owned())
    };
    assets.filter_map(source).collect()
}

/// Packs the files, with nothing of this machine: their order, owner and times are fixed.
fn archive(
    sh: &Shell,
    dist: &Path,
    files: &Path,
    name: &str,
    date: &str,
) -> anyhow::Result<PathBuf> {
    let archive = format!("{name}.tar.gz");
    let _dir = sh.push_dir(dist);
    let rename = format!("s,^\\.,{name},");
    let mtime = format!("@{date}");
    cmd!(
        sh,
        "tar --create --use-compress-program 'gzip -9n' --file {archive} --directory {files}
         --sort=name --mtime={mtime} --owner=0 --group=0 --numeric-owner
         --mode=u+rwX,go+rX,go-w --transform {rename} ."
    )
    .run()?;
    let sum = cmd!(sh, "sha256sum {archive}").read()?;
    sh.write_file(format!("{archive}.sha256"), sum + "\n")?;
    Ok(dist.join(archive))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn assets_of_both_kinds_have_a_source() {
        let deb = serde_json::json!([["target/release/ramsnap", "usr/bin/", "755"]]);
        let rpm = serde_json::json!([{ "source": "target/dist/ramsnap", "dest": "/usr/bin/" }]);
        assert_eq!(sources(&deb), ["target/release/ramsnap"]);
        assert_eq!(sources(&rpm), ["target/dist/ramsnap"]);
        assert_eq!(sources(&Value::Null), [""; 0]);
    }

    /// The files that are made are those that the metadata of packages names.
    #[test]
    fn packages_have_the_manual_pages_and_scripts() {
        let sh = Shell::new().unwrap();
        sh.change_dir(harness::workspace().unwrap());
        let text = cmd!(
            sh,
            "cargo metadata --locked --offline --format-version 1 --no-deps"
        );
        let metadata: Value = serde_json::from_str(&text.quiet().read().unwrap()).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let names = PAGES.iter().map(|(_, name)| (*name).to_owned());
        let scripts = COMPLETIONS.map(|(_, name)| format!("completions/{name}"));
        let pages = (0..20).map(|number| format!("man/man1/{number}.1"));
        for name in names.chain(scripts).chain(pages) {
            sh.write_file(dir.path().join(name), "").unwrap();
        }
        check_assets(&sh, &metadata, dir.path()).unwrap();
        sh.remove_path(dir.path().join("completions/_ramsnap"))
            .unwrap();
        let error = check_assets(&sh, &metadata, dir.path()).unwrap_err();
        assert!(error.to_string().contains("_ramsnap"), "{error}");
    }
}
