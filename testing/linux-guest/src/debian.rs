//! Debian packages downloaded and unpacked, not installed.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use harness::packages::patiently;
use xshell::{Shell, cmd};

/// Downloads `packages` and their dependencies to `packages` in `dir`, with package lists and a
/// source list of its own. The configuration of this machine is not changed. A package may be in
/// the components contrib and non-free.
pub fn download(sh: &Shell, dir: &Path, packages: &[&str]) -> anyhow::Result<()> {
    let (sources, lists) = (dir.join("sources"), dir.join("lists"));
    let archives = dir.join("packages");
    for dir in [&sources, &lists.join("partial"), &archives.join("partial")] {
        fs::create_dir_all(dir)?;
    }
    let mut found = false;
    for file in configured_sources() {
        let (Ok(text), Some(name)) = (fs::read_to_string(&file), file.file_name()) else {
            continue;
        };
        let text = with_components(&text);
        found |= !text.is_empty();
        fs::write(sources.join(name), text)?;
    }
    if !found {
        bail!("no Debian package source is configured in /etc/apt");
    }
    let options = [
        format!("Dir::Etc::sourceparts={}", sources.display()),
        "Dir::Etc::sourcelist=/dev/null".into(),
        format!("Dir::State::lists={}", lists.display()),
        format!("Dir::Cache={}", dir.join("cache").display()),
        format!("Dir::Cache::archives={}", archives.display()),
        // Only lists and archives of our own are written.
        "Debug::NoLocking=1".into(),
        "APT::Update::Error-Mode=any".into(),
        // apt's own user may not be able to enter this directory.
        "APT::Sandbox::User=root".into(),
    ];
    let options = options.iter().flat_map(|option| ["-o", option]);
    let options: &Vec<_> = &options.collect();
    patiently(|| {
        cmd!(sh, "apt-get {options...} --quiet --quiet update")
            .quiet()
            .run()
            .context("can't get the package lists")?;
        cmd!(
            sh,
            "apt-get {options...} --quiet --quiet --yes --no-install-recommends --download-only --reinstall install {packages...}"
        )
        .quiet()
        .ignore_stdout()
        .run()
        .context("can't download the packages")
    })
}

fn configured_sources() -> Vec<PathBuf> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let parts = fs::read_dir("/etc/apt/sources.list.d");
    let parts = parts.into_iter().flatten().flatten();
    files.extend(parts.map(|entry| entry.path()));
    files
}

/// The sources of Debian itself, with the components contrib and non-free. Others are left out.
fn with_components(text: &str) -> String {
    let one_line = |line: &str| line.trim_start().starts_with("deb ");
    if text.lines().any(one_line) {
        let debian = text
            .lines()
            .filter(|line| one_line(line) && line.contains("/debian"));
        return debian
            .map(|line| format!("{line} contrib non-free\n"))
            .collect();
    }
    let stanzas = text.split("\n\n").filter(|stanza| {
        stanza
            .lines()
            .any(|line| line.starts_with("URIs:") && line.contains("/debian"))
    });
    stanzas
        .map(|stanza| {
            let lines = stanza
                .lines()
                .map(|line| match line.strip_prefix("Components:") {
                    Some(components) => format!("Components:{components} contrib non-free\n"),
                    None => format!("{line}\n"),
                });
            lines.collect::<String>() + "\n"
        })
        .collect()
}

/// Unpacks one downloaded package over what is in `to`.
pub fn unpack_package(sh: &Shell, package: &Path, to: &Path) -> anyhow::Result<()> {
    let contents = cmd!(sh, "dpkg-deb --fsys-tarfile {package}");
    let contents = contents.quiet().output()?.stdout;
    cmd!(
        sh,
        "tar --extract --keep-directory-symlink --directory {to}"
    )
    .quiet()
    .stdin(contents)
    .run()
    .with_context(|| format!("can't unpack {}", package.display()))
}

/// The name of the one entry that `dir` has.
pub fn only_entry(dir: &Path) -> anyhow::Result<String> {
    only_entry_with(dir, "")
}

/// The name of the one entry of `dir` that begins with `prefix`.
pub fn only_entry_with(dir: &Path, prefix: &str) -> anyhow::Result<String> {
    let entries = fs::read_dir(dir).with_context(|| format!("can't list {}", dir.display()))?;
    let mut names = entries
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .filter(|name| name.starts_with(prefix));
    match (names.next(), names.next()) {
        (Some(name), None) => Ok(name),
        _ => bail!("{} should have one entry {prefix}*", dir.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sources_of_debian_get_the_components() {
        let stanzas = "Types: deb\nURIs: http://mirror/debian\nSuites: bookworm\nComponents: main\n\nTypes: deb\nURIs: https://other/node\nSuites: x\nComponents: main\n";
        let with = with_components(stanzas);
        assert!(
            with.contains("Components: main contrib non-free\n"),
            "{with}"
        );
        assert!(!with.contains("node"), "{with}");
        let lines =
            "# a comment\ndeb http://mirror/debian bookworm main\ndeb http://other/ x main\n";
        assert_eq!(
            with_components(lines),
            "deb http://mirror/debian bookworm main contrib non-free\n"
        );
    }
}
