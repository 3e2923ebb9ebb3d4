//! The programs and files of macOS that a mount takes.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail};

/// Where the programs and files of macOS are.
#[derive(Clone, Debug)]
pub(super) struct System {
    /// `PATH` for the programs.
    pub path: OsString,
    /// The list of NFS exports.
    pub exports: PathBuf,
    /// The time between two tries.
    pub pause: Duration,
}

impl System {
    /// Returns this machine.
    #[cfg(target_os = "macos")]
    pub(super) fn this() -> Self {
        Self {
            path: std::env::var_os("PATH").unwrap_or_default(),
            exports: PathBuf::from("/etc/exports"),
            pause: Duration::from_secs(1),
        }
    }

    /// Runs a program to its end, and returns its output.
    ///
    /// # Errors
    /// Returns an error with the arguments and all that the program has printed if it fails.
    pub(super) fn run<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<String> {
        let mut command = Command::new(program);
        command.args(arguments).env("PATH", &self.path);
        let shown = format!("{command:?}").replace('"', "");
        let output = command
            .output()
            .with_context(|| format!("can't start {program}"))?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let errors = String::from_utf8_lossy(&output.stderr);
            bail!("{shown} failed: {} {}", errors.trim(), printed.trim());
        }
        Ok(printed)
    }

    /// Runs a program that cleans up, and prints a warning if it fails.
    pub(super) fn clean_up<A: AsRef<OsStr>>(
        &self,
        program: &str,
        arguments: impl IntoIterator<Item = A>,
    ) {
        if let Err(error) = self.run(program, arguments) {
            eprintln!("warning: {error:#}");
        }
    }
}
