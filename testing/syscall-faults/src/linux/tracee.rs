//! What a traced process does to be traced.

use anyhow::Context;
use nix::sys::ptrace;
use nix::sys::signal::{Signal, kill, raise};
use nix::unistd::Pid;

/// Lets the parent trace this process, until [`pause`] is called a second time.
pub(super) fn ask() -> anyhow::Result<()> {
    ptrace::traceme().context("can't be traced")?;
    pause()
}

/// Stops this process: the traced part begins or is over.
pub(super) fn pause() -> anyhow::Result<()> {
    Ok(raise(Signal::SIGSTOP)?)
}

/// Makes a mark in the trace.
pub(super) fn mark() -> anyhow::Result<()> {
    Ok(kill(Pid::this(), None)?)
}
