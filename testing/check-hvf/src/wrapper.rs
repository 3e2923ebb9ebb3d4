//! This program as cargo's wrapper of the compiler: it instruments few packages. The others are
//! compiled as fast as ever, and count nothing.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use harness::process::this_program;
use xshell::{PushEnv, Shell};

/// The package whose lines are counted, and one whose program calls it: only instrumented programs
/// write the counters to a file.
const PACKAGES: [&str; 2] = ["ramsnap-hvf-backend", "demo"];

/// The variable that is set in the environment of a wrapper.
const IS_WRAPPER: &str = "RAMSNAP_CHECK_HVF_COMPILES";

/// Makes cargo call this program instead of the compiler.
pub(crate) fn push(sh: &Shell) -> anyhow::Result<[PushEnv<'_>; 2]> {
    Ok([
        sh.push_env("RUSTC_WORKSPACE_WRAPPER", this_program()?),
        sh.push_env(IS_WRAPPER, "1"),
    ])
}

/// Runs the compiler, if cargo calls this program as its wrapper. Returns only where it does not,
/// or where the compiler can't be run.
pub(crate) fn as_compiler() -> Option<ExitCode> {
    env::var_os(IS_WRAPPER)?;
    let mut arguments = env::args_os().skip(1);
    let compiler = arguments.next()?;
    let mut rustc = Command::new(&compiler);
    if env::var("CARGO_PKG_NAME").is_ok_and(|name| PACKAGES.contains(&name.as_str())) {
        rustc.arg("-Cinstrument-coverage");
    }
    let error = rustc.args(arguments).exec();
    eprintln!("error: can't run {}: {error}", compiler.display());
    Some(ExitCode::FAILURE)
}
