//! Debian packages that a task needs: missing and outdated ones are installed or reported.

mod package;
mod plan;
mod problem;
mod version;

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use xshell::{Shell, cmd};

pub use package::Package;
use plan::{Lists, Machine, Step};
use problem::{Problem, State};

/// The option that limits what a task may install.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Install {
    /// Install nothing: skip what requires missing packages, or fail if nothing can run without
    /// them
    #[arg(long)]
    no_install: bool,
}

/// Pauses between attempts to download something.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(5),
    Duration::from_secs(20),
    Duration::from_secs(60),
];

/// Downloads something. Prints a failure and tries again: a server may not answer for a moment.
pub fn patiently(mut download: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    for pause in PAUSES {
        let Err(error) = download() else {
            return Ok(());
        };
        println!("{error:#}; retrying in {} s", pause.as_secs());
        thread::sleep(pause);
    }
    download()
}

/// The environment variable that forbids installations, as `--no-install` does.
const NO_INSTALL: &str = "RAMSNAP_NO_INSTALL";

impl Install {
    /// Whether anything may be installed or downloaded.
    pub fn allowed(self) -> bool {
        !self.no_install && std::env::var_os(NO_INSTALL).is_none()
    }

    /// Makes every program that `sh` runs from now on install nothing, if this one must not.
    pub fn pass_on(self, sh: &Shell) {
        if !self.allowed() {
            sh.set_var(NO_INSTALL, "1");
        }
    }

    /// Installs or upgrades what is missing or too old of `packages` if this is a Debian machine
    /// and the caller is root. Prints what is still missing afterwards, with the command that
    /// installs it, and returns it.
    pub fn ensure(
        self,
        sh: &Shell,
        packages: &[Package],
        why: &str,
    ) -> anyhow::Result<Vec<Package>> {
        let mut attempted = HashSet::new();
        loop {
            let machine = Machine {
                root: nix::unistd::geteuid().is_root(),
                has_apt: Path::new("/usr/bin/apt-get").exists(),
                allowed: self.allowed(),
                lists: lists(),
            };
            let mut states = look(sh, &machine, packages)?;
            for state in &mut states {
                state.attempted = attempted.contains(state.package.name);
            }
            match plan::decide(&machine, &states) {
                Step::Done => return Ok(Vec::new()),
                Step::Update => {
                    println!("updating the package lists for {why}");
                    update(sh);
                }
                Step::Install(names) => {
                    attempted.extend(names.iter().copied());
                    println!("installing for {why}: {}", names.join(" "));
                    match install(sh, &names) {
                        Ok(()) => check_files(packages, &names)?,
                        Err(error) => println!("{error:#}"),
                    }
                }
                Step::Report(problems) => {
                    println!("{}", plan::report(&machine, why, &problems));
                    let package = |(state, _): (State, Problem)| state.package;
                    return Ok(problems.into_iter().map(package).collect());
                }
            }
        }
    }
}

/// A wrong name of a file would have the package installed in every run.
fn check_files(packages: &[Package], installed: &[&str]) -> anyhow::Result<()> {
    for package in packages {
        let Package { name, shows, .. } = package;
        ensure!(
            !installed.contains(name) || package.is_present(),
            "{name} was installed, but {shows} does not exist"
        );
    }
    Ok(())
}

/// Looks up the installed versions that matter and, before an installation, what is offered.
fn look(sh: &Shell, machine: &Machine, packages: &[Package]) -> anyhow::Result<Vec<State>> {
    let versioned = packages.iter().filter(|package| package.has_version());
    let versioned: Vec<&str> = versioned.map(|package| package.name).collect();
    let mut installed = HashMap::new();
    if !versioned.is_empty() && Path::new("/usr/bin/dpkg-query").exists() {
        let format = "${Package} ${Version} ${db:Status-Status}\\n";
        let query = cmd!(sh, "dpkg-query --show --showformat={format} {versioned...}");
        // The exit status is a failure where one of the packages is unknown.
        installed = installed_versions(&query.quiet().ignore_stderr().ignore_status().read()?);
    }
    let state = |package: &Package| State {
        package: *package,
        present: package.is_present(),
        installed: installed.remove(package.name),
        offered: None,
        attempted: false,
    };
    let mut states: Vec<State> = packages.iter().map(state).collect();
    let done = plan::decide(machine, &states) == Step::Done;
    if !done && machine.can_install() && machine.lists != Lists::Old {
        let names = packages.iter().map(|package| package.name);
        let policy = cmd!(sh, "apt-cache policy").args(names).env("LC_ALL", "C");
        let mut offered = candidates(&policy.quiet().ignore_stderr().read()?);
        for state in &mut states {
            state.offered = offered.remove(state.package.name);
        }
    }
    Ok(states)
}

fn installed_versions(listed: &str) -> HashMap<String, String> {
    let package = |line: &str| {
        let mut words = line.split(' ').map(str::to_owned);
        let (name, version) = (words.next()?, words.next()?);
        (words.next()? == "installed").then_some((name, version))
    };
    listed.lines().filter_map(package).collect()
}

/// Reads the candidates from the output of `apt-cache policy`.
fn candidates(policy: &str) -> HashMap<String, String> {
    let mut name = "";
    let mut found = HashMap::new();
    for line in policy.lines() {
        if let Some(package) = line.strip_suffix(':').filter(|name| !name.starts_with(' ')) {
            name = package;
        } else if let Some(version) = line.strip_prefix("  Candidate: ")
            && version != "(none)"
        {
            found.insert(name.to_owned(), version.to_owned());
        }
    }
    found
}

const LISTS: &str = "/var/lib/apt/lists";

/// Ubuntu's apt touches this file after each update, and other tools read its age.
const STAMP: &str = "/var/lib/apt/periodic/update-success-stamp";

/// Whether this process updated the lists, if it tried.
static UPDATED: OnceLock<bool> = OnceLock::new();

/// Judges the package lists by the time of the last successful update. The files have the server's
/// times, and `partial` changes in a failed update, too. The directory changes when an update
/// brings something new; the stamp covers the others.
fn lists() -> Lists {
    match UPDATED.get() {
        Some(true) => return Lists::Updated,
        Some(false) => return Lists::Unreachable,
        None => {}
    }
    let files = fs::read_dir(LISTS).into_iter().flatten().flatten();
    let present = files
        .into_iter()
        .any(|file| file.file_name().to_string_lossy().contains("_Packages"));
    let modified = |path: &str| fs::metadata(path).ok()?.modified().ok();
    let newest = modified(LISTS).max(modified(STAMP));
    Lists::judge(present, newest.and_then(|time| time.elapsed().ok()))
}

/// Updates the package lists, at most once per process.
fn update(sh: &Shell) {
    UPDATED.get_or_init(|| {
        let updated = patiently(|| update_now(sh));
        if let Err(error) = &updated {
            println!("{error:#}");
        }
        updated.is_ok()
    });
}

fn update_now(sh: &Shell) -> anyhow::Result<()> {
    cmd!(
        sh,
        "apt-get --option=APT::Update::Error-Mode=any update --quiet --quiet"
    )
    .quiet()
    .run()
    .context("apt-get update failed")?;
    // Without the stamp the next process updates again, which does no harm.
    let _ = fs::write(STAMP, "");
    Ok(())
}

fn install(sh: &Shell, names: &[&str]) -> anyhow::Result<()> {
    let install = || {
        cmd!(
            sh,
            "apt-get --option=DPkg::Lock::Timeout=600 install --quiet --quiet --yes --no-install-recommends {names...}"
        )
        .env("DEBIAN_FRONTEND", "noninteractive")
        .quiet()
        .ignore_stdout()
    };
    if install().ignore_stderr().run().is_ok() {
        return Ok(());
    }
    // The archive may have replaced a version since the last update, however recent that is.
    patiently(|| {
        let updated = update_now(sh);
        let installed = install().run();
        installed.with_context(|| format!("apt-get install {} failed", names.join(" ")))?;
        updated.or_else(|error| {
            println!("{error:#}");
            Ok(())
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn candidates_are_read_from_the_policy() {
        let policy = "rustc-web:\n  Installed: 1.85.0-1\n  Candidate: 1.96.0-1\n  \
            Version table:\n     1.96.0-1 500\n\
            g++:\n  Installed: (none)\n  Candidate: (none)\n  Version table:\n\
            strace:\n  Installed: (none)\n  Candidate: 6.1-0.1\n";
        let mut found: Vec<_> = candidates(policy).into_iter().collect();
        found.sort();
        let expected = [("rustc-web", "1.96.0-1"), ("strace", "6.1-0.1")];
        assert_eq!(
            found,
            expected.map(|(name, version)| (name.into(), version.into()))
        );
    }

    #[test]
    fn only_installed_packages_have_a_version() {
        let listed = "rustc-web 1.85.0-1 installed\ncargo-web 1.85.0-1 config-files\n\
            rust-web-src  not-installed\n";
        let found: Vec<_> = installed_versions(listed).into_iter().collect();
        assert_eq!(found, [("rustc-web".to_owned(), "1.85.0-1".to_owned())]);
    }
}
