//! What `xtask` and the programs under `testing/` share.
//!
//! `cargo xtask NAME` runs most of these programs. Each has a `main` that calls [`run`]. Their
//! children and their cleanup on Ctrl-C are in [`process`] and [`interrupt`]; the Debian
//! packages that they install are in [`packages`], and other tools in [`cargo_tool`], [`python`]
//! and [`debian_rust`]; the figures that `--record` keeps are in [`record`].
//!
//! This crate links no crate under `crates/`, and neither does `xtask`, which depends on it.

#![allow(
    missing_docs,
    clippy::missing_errors_doc,
    clippy::missing_panics_doc,
    reason = "for the workspace's own programs"
)]

pub mod cargo_tool;
pub mod changed;
pub mod debian_rust;
pub mod file_systems;
pub mod interrupt;
#[cfg(target_os = "linux")]
pub mod namespace;
pub mod packages;
pub mod process;
pub mod python;
pub mod record;

use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use test_machine::{NOT_RUN, Need, not_run};
use xshell::Shell;

/// The features that the tests select, as far as they change a dependency: programs that are built
/// with them share the build of most dependencies with the tests. More features of hvf-backend
/// would need a newer macOS.
pub const FEATURES: &str = "ramsnap-page-reader/serde,ramsnap-page-reader/vm-memory";

/// Runs a program in the workspace's root: prints its error, and returns its exit code.
pub fn run(program: impl FnOnce(&Shell) -> anyhow::Result<()>) -> ExitCode {
    let done = workspace_shell().and_then(|sh| program(&sh));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns a shell whose directory is the workspace's root.
fn workspace_shell() -> anyhow::Result<Shell> {
    let sh = Shell::new()?;
    sh.change_dir(workspace()?);
    Ok(sh)
}

/// Returns the workspace's root.
pub fn workspace() -> anyhow::Result<&'static Path> {
    let testing = Path::new(env!("CARGO_MANIFEST_DIR")).parent();
    let root = testing.and_then(Path::parent);
    root.context("testing/harness lies in the workspace")
}

/// Returns the kernel that runs here, by name and release.
pub fn kernel() -> String {
    nix::sys::utsname::uname().map_or_else(
        |_| "an unknown kernel".into(),
        |name| format!("{} {}", name.sysname().display(), name.release().display()),
    )
}

/// Returns whether this program is a step of `cargo xtask test`, `ci` or `prove`.
pub fn is_step() -> bool {
    std::env::var_os(NOT_RUN).is_some()
}

/// Reports that `what` is not run. An error in CI.
pub fn leave_out(what: &str, why: &str) -> anyhow::Result<()> {
    let ci = std::env::var_os("CI").is_some_and(|ci| ci == "true");
    ensure!(!ci, "{what} was not run: {why}");
    not_run(what, why);
    Ok(())
}

/// Returns whether this machine has `need`. Reports that `what` is not run where it has not, which
/// is an error in CI. `takes` follows in the report: what the need consists of.
pub fn runs_here(need: Need, what: &str, takes: &str, ci: bool) -> anyhow::Result<bool> {
    if need.is_met() {
        return Ok(true);
    }
    ensure!(!ci, "{what}: this machine has no {need}, which CI requires");
    not_run(what, &format!("this machine has no {need}{takes}"));
    Ok(false)
}
