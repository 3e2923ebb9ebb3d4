//! Commands in namespaces of their own.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::bail;
use harness::interrupt::Interrupt;
use harness::process::Process;

/// A command that prints nothing for this long hangs.
const SILENCE: Duration = Duration::from_mins(30);

/// Runs commands in mount and process namespaces of their own, which end with the commands, and
/// keeps a log of what they print.
pub(super) struct Runner {
    log: File,
    interrupt: Interrupt,
}

impl Runner {
    pub(super) fn new(log: &Path) -> anyhow::Result<Self> {
        println!("all output goes to {}", log.display());
        Ok(Self {
            log: File::create(log)?,
            interrupt: Interrupt::catch()?,
        })
    }

    pub(super) fn run<S: AsRef<OsStr>>(
        &mut self,
        script: &str,
        arguments: &[S],
    ) -> anyhow::Result<Duration> {
        const END: &str = "exit status: ";
        let script = format!("(set -e\n{script}\n) 2>&1 </dev/null; echo \"{END}$?\"");
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--pid", "--fork", "--kill-child"])
            .args(["sh", "-c", &script, "sh"])
            .args(arguments);
        let start = Instant::now();
        let process = Process::start(command, &self.interrupt)?;
        let mut printed = start;
        let mut last = VecDeque::new();
        while let Some(line) = process.next(SILENCE)? {
            self.log.write_all(line.as_bytes())?;
            let line = line.trim_end();
            if line.starts_with("== ") || printed.elapsed() > Duration::from_secs(10) {
                println!("  {:>4} s: {line}", start.elapsed().as_secs());
                printed = Instant::now();
            }
            last.push_back(line.to_owned());
            if last.len() > 40 {
                last.pop_front();
            }
        }
        let status = last.pop_back().unwrap_or_default();
        if status != format!("{END}0") {
            let last = Vec::from(last).join("\n");
            bail!("{status}; the last lines are:\n{last}");
        }
        Ok(start.elapsed())
    }
}
