//! Debian packages that a task needs: installed where they are missing, and said.

use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::{Context, bail};
use xshell::{Shell, cmd};

/// What a task may do to this machine.
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct Install {
    /// Install nothing: do without what is missing, or fail where it can't be done without
    #[arg(long)]
    no_install: bool,
}

/// A package, and a file that is there once it is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package {
    pub name: &'static str,
    /// A path, or the name of a command.
    pub shows: &'static str,
}

impl Package {
    pub const fn new(name: &'static str, shows: &'static str) -> Self {
        Self { name, shows }
    }

    pub fn is_installed(&self) -> bool {
        const COMMANDS: [&str; 4] = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        if self.shows.starts_with('/') {
            return Path::new(self.shows).exists();
        }
        COMMANDS
            .iter()
            .any(|dir| Path::new(dir).join(self.shows).exists())
    }
}

/// Pauses between attempts to download something.
const PAUSES: [Duration; 3] = [
    Duration::from_secs(5),
    Duration::from_secs(20),
    Duration::from_secs(60),
];

/// Downloads something, and tries again where that fails, saying so: a server may not answer for a moment.
pub fn patiently(mut download: impl FnMut() -> anyhow::Result<()>) -> anyhow::Result<()> {
    for pause in PAUSES {
        let Err(error) = download() else {
            return Ok(());
        };
        println!("{error:#}; once more in {} s", pause.as_secs());
        thread::sleep(pause);
    }
    download()
}

impl Install {
    /// Whether anything may be installed or downloaded.
    pub fn allowed(self) -> bool {
        !self.no_install
    }

    /// Installs what is missing of `packages`, saying so, if this is a Debian machine and the caller is root. What is still missing
    /// afterwards is returned, and was said.
    pub fn ensure(
        self,
        sh: &Shell,
        packages: &[Package],
        why: &str,
    ) -> anyhow::Result<Vec<Package>> {
        let missing = || {
            packages
                .iter()
                .copied()
                .filter(|package| !package.is_installed())
        };
        let names: Vec<&str> = missing().map(|package| package.name).collect();
        if names.is_empty() {
            return Ok(Vec::new());
        }
        let list = names.join(" ");
        let root = nix::unistd::geteuid().is_root();
        if self.no_install || !root || !Path::new("/usr/bin/apt-get").exists() {
            println!(
                "missing for {why}: {list} (as root on Debian, without --no-install, they are installed)"
            );
            return Ok(missing().collect());
        }
        println!("installing for {why}: {list}");
        let _quiet = sh.push_env("DEBIAN_FRONTEND", "noninteractive");
        let install = || {
            let names = &names;
            cmd!(
                sh,
                "apt-get --option=DPkg::Lock::Timeout=600 install --quiet --quiet --yes --no-install-recommends {names...}"
            )
        };
        // Package lists may be older than what the mirror has, or not there at all.
        if install()
            .quiet()
            .ignore_stdout()
            .ignore_stderr()
            .run()
            .is_err()
        {
            patiently(|| {
                cmd!(
                    sh,
                    "apt-get --option=APT::Update::Error-Mode=any update --quiet --quiet"
                )
                .quiet()
                .run()
                .context("apt-get update")?;
                install()
                    .quiet()
                    .ignore_stdout()
                    .run()
                    .with_context(|| format!("apt-get install {list}"))
            })?;
        }
        let still: Vec<_> = missing().collect();
        if let Some(package) = still.first() {
            bail!(
                "{} was installed, and there is no {}",
                package.name,
                package.shows
            );
        }
        Ok(still)
    }
}
