//! `cargo xtask check-macos`: lint every crate for Apple silicon, and link what uses the
//! hypervisor, also on Linux.

mod link;
mod mach_o;
mod self_check;
mod standard_library;

use std::path::Path;

use anyhow::{Context, bail, ensure};
use harness::packages::Install;
use xshell::{Cmd, PushEnv, Shell, cmd};

use crate::debian_rust::{self, OLDEST_RUST};

const TARGET: &str = "aarch64-apple-darwin";

/// Apart from the host's: Debian's compiler and the toolchain's don't share.
const TARGET_DIR: &str = "target/macos";

/// Nothing is run: speed is the compiler's own, not the program's.
const UNOPTIMISED: [&str; 4] = [
    "--config",
    "profile.dev.opt-level=0",
    // Without any debug information cargo strips executables, with a tool that Debian's rustc comes
    // without.
    "--config",
    "profile.dev.debug=\"line-directives-only\"",
];

/// Lint everything for aarch64-apple-darwin, and link what uses the hypervisor
///
/// Lints (clippy, warnings are errors) every crate, test, example and task for Apple silicon.
/// Breaks lines for macOS in a copy of a crate, and shows that each is found. Links hvf-backend's
/// example and xtask into Mach-O executables, and checks what macOS requires of them: load
/// commands, oldest macOS, functions of the framework, signature.
///
/// It takes the target in this toolchain (`rustup target add aarch64-apple-darwin`), or as root
/// Debian's packages of a Rust toolchain with the standard library's source, which is built once
/// into target/macos. For C and to link, on a system other than macOS, it takes Python and its pip,
/// and downloads the package ziglang, a C compiler and linker with stubs of macOS's libraries (100
/// MB), into target/macos. Each piece that is missing is listed, and is an error.
#[derive(clap::Args)]
pub(crate) struct CheckMacos {
    #[command(flatten)]
    pub install: Install,
    /// Link what `cargo xtask` builds, and not the fewest and the most features of hvf-backend
    #[arg(long)]
    pub quick: bool,
}

impl CheckMacos {
    pub(crate) fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if self.check(sh)? {
            return Ok(());
        }
        bail!(
            "nothing can be checked for macOS: run `rustup target add {TARGET}`, or see cargo xtask check-macos --help"
        )
    }

    /// Checks, or prints what this machine lacks and returns false.
    pub(crate) fn check(&self, sh: &Shell) -> anyhow::Result<bool> {
        let Some(toolchain) = Toolchain::find(sh, self.install)? else {
            println!("NOT RUN: this machine can't check for macOS");
            return Ok(false);
        };
        toolchain.check_version(sh)?;
        let dir = sh.current_dir().join(TARGET_DIR);
        sh.create_dir(&dir)?;
        if !link::prepare(sh, self.install, &dir)? {
            println!("NOT RUN: this machine can't compile C or link for macOS");
            return Ok(false);
        }
        let _env = toolchain.env(sh, &dir)?;
        lint(sh, toolchain)?;
        self_check::run(sh, toolchain, &dir)?;
        link::link(sh, toolchain, self.quick)?;
        Ok(true)
    }
}

/// What compiles for macOS on this machine.
#[derive(Clone, Copy)]
enum Toolchain {
    /// The one in use, with the target's standard library.
    Installed,
    /// Debian's, which builds the standard library.
    Debian,
}

impl Toolchain {
    fn find(sh: &Shell, install: Install) -> anyhow::Result<Option<Self>> {
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
    fn check_version(self, sh: &Shell) -> anyhow::Result<()> {
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
            "the toolchain is too old to check for macOS: {rustc} is {found:?}, and Cargo.toml needs {OLDEST_RUST} (rust-version); {remedy}"
        );
        Ok(())
    }

    /// For every command alike, so that none rebuilds what another built.
    fn env<'sh>(self, sh: &'sh Shell, dir: &Path) -> anyhow::Result<Vec<PushEnv<'sh>>> {
        let mut env = vec![
            sh.push_env("CARGO_TARGET_DIR", dir),
            // A clean build is faster without it.
            sh.push_env("CARGO_INCREMENTAL", "0"),
        ];
        env.extend(link::env(sh, dir));
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

    fn cargo<'sh>(self, sh: &'sh Shell, command: &str) -> Cmd<'sh> {
        let cargo = match self {
            Self::Installed => cmd!(sh, "cargo {command}"),
            // By their paths: cargo looks for its subcommands in rustup's directory first.
            Self::Debian if command == "clippy" => cmd!(sh, "/usr/bin/cargo-clippy clippy"),
            Self::Debian => {
                let cargo = debian_rust::CARGO;
                cmd!(sh, "{cargo} {command}")
            }
        };
        cargo.args(["--target", TARGET]).args(UNOPTIMISED)
    }
}

fn lint(sh: &Shell, toolchain: Toolchain) -> anyhow::Result<()> {
    toolchain
        .cargo(sh, "clippy")
        // Every mistake at once.
        .args(["--all-targets", "--all-features", "--keep-going"])
        // No benchmark runs on a Mac yet: its peers are measured against Linux's own interfaces.
        .args(["--workspace", "--exclude", "benches", "--locked"])
        .run()
        .context("cargo clippy for macOS failed: the errors above")
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
