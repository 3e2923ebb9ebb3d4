//! The toolchain that compiles for macOS.

use std::path::Path;

use anyhow::{Context, ensure};
use harness::debian_rust::{self, OLDEST_RUST};
use harness::packages::Install;
use xshell::{Cmd, PushEnv, Shell, cmd};

use crate::target::{TARGET, UNOPTIMIZED};
use crate::{linker, standard_library};

/// What compiles for macOS on this machine.
#[derive(Clone, Copy)]
pub(crate) enum Toolchain {
    /// The one in use, with the target's standard library.
    Installed,
    /// Debian's, which builds the standard library.
    Debian,
}

impl Toolchain {
    pub(crate) fn find(sh: &Shell, install: Install) -> anyhow::Result<Option<Self>> {
        let libraries = cmd!(sh, "rustc --print target-libdir --target {TARGET}").quiet();
        if sh.path_exists(libraries.read()?) {
            return Ok(Some(Self::Installed));
        }
        match install.ensure(sh, &debian_rust::PACKAGES, "check-macos") {
            Ok(missing) => Ok(missing.is_empty().then_some(Self::Debian)),
            Err(error) => {
                // Debian has them, Ubuntu has not.
                println!("{error:#}");
                Ok(None)
            }
        }
    }

    /// A compiler that is too old fails here, not as an error of the code.
    pub(crate) fn check_version(self, sh: &Shell) -> anyhow::Result<()> {
        let (rustc, remedy) = match self {
            Self::Installed => ("rustc", "run `rustup update`"),
            Self::Debian => (
                "/usr/bin/rustc",
                "install newer rustc-web, cargo-web, rust-web-clippy and rust-web-src, or run `rustup target add aarch64-apple-darwin`",
            ),
        };
        let found = cmd!(sh, "{rustc} --version").quiet().read()?;
        ensure!(
            version(&found)? >= version(OLDEST_RUST)?,
            "the toolchain is too old to check for macOS: {rustc} is {found:?}, and the checks need {OLDEST_RUST} (rust-version); {remedy}"
        );
        Ok(())
    }

    /// For every command alike, so that none rebuilds what another built.
    pub(crate) fn env<'sh>(self, sh: &'sh Shell, dir: &Path) -> anyhow::Result<Vec<PushEnv<'sh>>> {
        let mut env = vec![
            sh.push_env("CARGO_TARGET_DIR", dir),
            // A clean build is faster without it.
            sh.push_env("CARGO_INCREMENTAL", "0"),
        ];
        env.extend(linker::env(sh, dir));
        let mut flags = "-Dwarnings".to_owned();
        if matches!(self, Self::Debian) {
            env.extend(debian_rust::env(sh));
            let sysroot = standard_library::sysroot(sh, dir)?;
            // The encoded flags are separated by this byte: a path may have spaces.
            flags += &format!("\u{1f}--sysroot={}", sysroot.display());
        }
        env.push(sh.push_env("CARGO_ENCODED_RUSTFLAGS", flags));
        Ok(env)
    }

    pub(crate) fn cargo<'sh>(self, sh: &'sh Shell, command: &str) -> Cmd<'sh> {
        let cargo = match self {
            Self::Installed => cmd!(sh, "cargo {command}"),
            // By their paths: cargo looks for its subcommands in rustup's directory first.
            Self::Debian if command == "clippy" => cmd!(sh, "/usr/bin/cargo-clippy clippy"),
            Self::Debian => {
                let cargo = debian_rust::CARGO;
                cmd!(sh, "{cargo} {command}")
            }
        };
        cargo.args(["--target", TARGET]).args(UNOPTIMIZED)
    }
}

/// Major and minor of `rustc --version`'s output, or of `rust-version`.
fn version(text: &str) -> anyhow::Result<(u32, u32)> {
    let number = text.strip_prefix("rustc ").unwrap_or(text);
    let mut parts = number.split(['.', '-', ' ']);
    let mut part = || parts.next()?.parse().ok();
    part()
        .zip(part())
        .with_context(|| format!("no version of Rust in {text:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        let version = |text| version(text).expect("a version");
        assert_eq!(version("rustc 1.95.0 (59807616e 2026-04-14)"), (1, 95));
        assert!(version("rustc 1.100.0-nightly (abc)") > version("1.95"));
        assert!(version("rustc 1.63.0") < version("1.95"));
    }

    #[test]
    fn text_without_a_version_is_an_error() {
        version("rustc is missing").expect_err("no number");
    }
}
