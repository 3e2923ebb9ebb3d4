//! The processes below this one, which end with it.

use std::collections::HashSet;
use std::fs;
use std::path::Path;
use std::thread;
use std::time::Duration;

use anyhow::Context as _;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use signal_hook::consts::SIGTERM;
use signal_hook::iterator::Signals;

/// Starts a thread that ends what runs below this process once SIGTERM comes.
pub(super) fn end_on_sigterm() -> anyhow::Result<()> {
    let program = fs::read_link("/proc/self/exe")?;
    let programs = program
        .parent()
        .context("a program has a directory")?
        .to_owned();
    let mut signals = Signals::new([SIGTERM])?;
    thread::spawn(move || {
        signals.forever().next();
        let mut ended = HashSet::new();
        // Until this process ends: what is asked to end may still start others.
        loop {
            end_below(Pid::this().as_raw(), &programs, &mut ended);
            thread::sleep(Duration::from_millis(100));
        }
    });
    Ok(())
}

/// Sends SIGTERM, once, to the children of `parent` and all below them, but not to what a
/// program in the directory `programs` started.
fn end_below(parent: i32, programs: &Path, ended: &mut HashSet<i32>) {
    for child in children(parent) {
        // xtask and the programs that it runs end what they started. cargo does not: what it
        // started is ended first, because it is no longer below this process once cargo has ended.
        let program = fs::read_link(format!("/proc/{child}/exe"));
        if !program.is_ok_and(|program| program.parent() == Some(programs)) {
            end_below(child, programs, ended);
        }
        if ended.insert(child) {
            let _ = kill(Pid::from_raw(child), Signal::SIGTERM);
        }
    }
}

fn children(parent: i32) -> Vec<i32> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|process| process.file_name().to_str()?.parse().ok());
    ids.filter(|id| parent_of(*id) == Some(parent)).collect()
}

fn parent_of(id: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name, which may have any character, ends with the last parenthesis.
    let (_, fields) = stat.rsplit_once(") ")?;
    fields.split(' ').nth(1)?.parse().ok()
}
