//! `cargo xtask check-macos`: lint every crate for Apple silicon, and link what uses the hypervisor, also on Linux.

mod link;
mod mach_o;

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use xshell::{Cmd, PushEnv, Shell, cmd};

use crate::debian_rust;
use crate::packages::Install;

const TARGET: &str = "aarch64-apple-darwin";

/// Apart from the host's: Debian's compiler and the toolchain's don't share.
const TARGET_DIR: &str = "target/macos";

/// Nothing is run: speed is the compiler's own, not the program's.
const UNOPTIMISED: [&str; 6] = [
    "--config",
    "profile.dev.opt-level=0",
    "--config",
    "profile.dev.debug=false",
    // Without debug information cargo strips that of the standard library, with a tool that Debian's rustc comes without.
    "--config",
    "profile.dev.strip=\"none\"",
];

/// Lint everything for aarch64-apple-darwin, and link what uses the hypervisor
///
/// Lints (clippy, warnings are errors) every crate, test, example and task for Apple silicon. Links hvf-backend's examples and xtask into
/// Mach-O executables, and checks what macOS will ask of them: load commands, oldest macOS, functions of the framework, signature.
///
/// It takes the target in this toolchain (`rustup target add aarch64-apple-darwin`), or as root Debian's packages of a Rust toolchain with
/// the standard library's source. For C and to link, on a system other than macOS, it takes Python and its pip, and downloads the package ziglang, a
/// C compiler and linker with stubs of macOS's libraries (100 MB), into target/macos. Each piece that is missing is said, and is an error.
#[derive(clap::Args)]
pub struct CheckMacos {
    #[command(flatten)]
    pub install: Install,
    /// Lint the crate of this Cargo.toml in place of this workspace, and link nothing
    #[arg(long, value_name = "CARGO_TOML")]
    pub manifest_path: Option<PathBuf>,
}

impl CheckMacos {
    pub fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if self.check(sh)? {
            return Ok(());
        }
        bail!(
            "nothing can be checked for macOS: run `rustup target add {TARGET}`, or see cargo xtask check-macos --help"
        )
    }

    /// Checks, or says that this machine can't, and what it lacks: false.
    pub fn check(self, sh: &Shell) -> anyhow::Result<bool> {
        let Some(toolchain) = Toolchain::find(sh, self.install)? else {
            println!("NOT RUN: this machine can't check for macOS");
            return Ok(false);
        };
        let dir = sh.current_dir().join(TARGET_DIR);
        sh.create_dir(&dir)?;
        let _env = toolchain.env(sh, &dir);
        if let Some(manifest) = self.manifest_path {
            // The shell works in the workspace, the caller may stand elsewhere.
            toolchain.lint(sh, Some(&std::path::absolute(manifest)?))?;
            return Ok(true);
        }
        if !link::prepare(sh, self.install, &dir)? {
            println!("NOT RUN: this machine can't compile C or link for macOS");
            return Ok(false);
        }
        toolchain.lint(sh, None)?;
        link::link(sh, toolchain)?;
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

    /// For every command alike: the linker, too, is a reason for cargo to build the standard library again.
    fn env<'sh>(self, sh: &'sh Shell, dir: &Path) -> Vec<PushEnv<'sh>> {
        let mut env = vec![
            sh.push_env("RUSTFLAGS", "-Dwarnings"),
            sh.push_env("CARGO_TARGET_DIR", dir),
        ];
        env.extend(link::env(sh, dir));
        if matches!(self, Self::Debian) {
            env.extend(debian_rust::env(sh));
        }
        env
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
        let cargo = cargo.args(["--target", TARGET]).args(UNOPTIMISED);
        match self {
            Self::Installed => cargo,
            Self::Debian => cargo.arg("-Zbuild-std=std,panic_unwind"),
        }
    }

    fn lint(self, sh: &Shell, manifest: Option<&Path>) -> anyhow::Result<()> {
        let lint = self
            .cargo(sh, "clippy")
            // Every mistake at once.
            .args(["--all-targets", "--all-features", "--keep-going"]);
        let lint = match manifest {
            Some(manifest) => lint.arg("--manifest-path").arg(manifest),
            // No benchmark runs on a Mac yet: its peers are measured against Linux's own interfaces.
            None => lint.args(["--workspace", "--exclude", "benches", "--locked"]),
        };
        lint.run().context("the code is not right for macOS")
    }
}
