//! Lints every crate for Apple silicon and links what uses the hypervisor, also on Linux.
//!
//! Run it by `cargo xtask check-macos`.

mod framework;
mod link;
mod linker;
mod mach_o;
mod self_check;
mod standard_library;
mod target;
mod toolchain;

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Parser;
use harness::packages::Install;
use xshell::Shell;

use target::TARGET;
use toolchain::Toolchain;

/// Apart from the host's: Debian's compiler and the toolchain's don't share.
const TARGET_DIR: &str = "target/macos";

/// Lint everything for aarch64-apple-darwin, and link what uses the hypervisor
///
/// Lints (clippy, warnings are errors) every crate, test, example and task for Apple silicon.
/// Breaks lines for macOS in a copy of a crate, and shows that each is detected. Links
/// hvf-backend's examples, the tool and the programs of xtask into Mach-O executables, and checks
/// what macOS requires of them: load commands, oldest macOS, functions of the framework, signature.
///
/// It requires the target in this toolchain (`rustup target add aarch64-apple-darwin`), or as root
/// Debian's packages of a Rust toolchain with the standard library's source, which is built once
/// into target/macos. To compile C and to link on a system other than macOS, it requires Python and
/// its pip, and downloads the package ziglang, a C compiler and linker with stubs of macOS's
/// libraries (100 MB), into target/macos. A missing piece is listed, and is an error.
#[derive(Parser)]
#[command(name = "cargo xtask check-macos", bin_name = "cargo xtask check-macos")]
struct CheckMacos {
    #[command(flatten)]
    install: Install,
    /// Lint only libraries and programs, without the check of the lints, and link only
    /// hvf-backend's examples with its fewest features
    #[arg(long)]
    quick: bool,
}

fn main() -> ExitCode {
    let check = CheckMacos::parse();
    harness::run(|sh| check.run(sh))
}

impl CheckMacos {
    fn run(self, sh: &Shell) -> anyhow::Result<()> {
        if self.check(sh)? {
            return Ok(());
        }
        let why = "the packages that it needs are not installed";
        if harness::is_step() {
            return harness::leave_out("macos", why);
        }
        bail!(
            "nothing can be checked for macOS, because {why}: run `rustup target add {TARGET}`, \
             or see cargo xtask check-macos --help"
        )
    }

    /// Checks, or prints what this machine lacks and returns false.
    fn check(&self, sh: &Shell) -> anyhow::Result<bool> {
        let Some(toolchain) = Toolchain::find(sh, self.install)? else {
            println!("NOT RUN: this machine can't check for macOS");
            return Ok(false);
        };
        toolchain.check_version(sh)?;
        let dir = sh.current_dir().join(TARGET_DIR);
        sh.create_dir(&dir)?;
        if !linker::prepare(sh, self.install, &dir)? {
            println!("NOT RUN: this machine can't compile C or link for macOS");
            return Ok(false);
        }
        let _env = toolchain.env(sh, &dir)?;
        if self.quick {
            lint(sh, toolchain, &["--lib", "--bins"])?;
        } else {
            lint(sh, toolchain, &["--all-targets"])?;
            self_check::run(sh, toolchain, &dir)?;
        }
        link::link(sh, toolchain, self.quick)?;
        Ok(true)
    }
}

fn lint(sh: &Shell, toolchain: Toolchain, targets: &[&str]) -> anyhow::Result<()> {
    toolchain
        .cargo(sh, "clippy")
        .args(targets)
        // Every mistake at once.
        .args(["--all-features", "--keep-going"])
        // No benchmark runs on a Mac yet: its peers are measured against Linux's own interfaces.
        .args(["--workspace", "--exclude", "benches", "--locked"])
        .run()
        .context("cargo clippy for macOS failed: the errors above")
}
