//! Child processes that end with all their children, however this process ends, and the lines that
//! they write.

use std::env;
use std::io::{self, BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

use crate::interrupt::Interrupt;

/// Returns the path of this program, found at the first call.
pub fn this_program() -> anyhow::Result<&'static Path> {
    static PROGRAM: OnceLock<PathBuf> = OnceLock::new();
    if let Some(program) = PROGRAM.get() {
        return Ok(program);
    }
    let program = env::current_exe().context("can't find this program")?;
    Ok(PROGRAM.get_or_init(|| program))
}

/// A running process and the lines of its standard output. Dropping it kills its process group.
#[derive(Debug)]
pub struct Process {
    child: Child,
    lines: Receiver<io::Result<String>>,
    interrupt: Interrupt,
}

/// A process printed nothing for so many seconds.
#[derive(Debug, thiserror::Error)]
#[error("nothing heard for {0} s")]
pub struct Silence(u64);

/// How often a wait looks whether it was interrupted.
const LOOK: Duration = Duration::from_millis(100);

impl Process {
    /// Its standard input is what `command` says.
    pub fn start(mut command: Command, interrupt: &Interrupt) -> anyhow::Result<Self> {
        interrupt.check()?;
        let mut child = command
            .process_group(0)
            .stdout(Stdio::piped())
            .spawn()
            .with_context(|| format!("can't run {}", command.get_program().display()))?;
        let stdout = child.stdout.take().context("it has a standard output")?;
        let (send, lines) = channel();
        thread::spawn(move || {
            let mut stdout = BufReader::new(stdout);
            while let Some(line) = next_line(&mut stdout).transpose() {
                let failed = line.is_err();
                if send.send(line).is_err() || failed {
                    return;
                }
            }
        });
        Ok(Self {
            child,
            lines,
            interrupt: interrupt.clone(),
        })
    }

    /// Returns the next line with its line end, which the last may lack; `None` once the process
    /// has closed its output. The error is [`Silence`] where no line came within that time.
    pub fn next(&self, within: Duration) -> anyhow::Result<Option<String>> {
        let deadline = Instant::now() + within;
        loop {
            self.interrupt.check()?;
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left.min(LOOK)) {
                Ok(line) => return Ok(Some(line?)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) if left.is_zero() => {
                    return Err(Silence(within.as_secs()).into());
                }
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
    }

    /// Ends it at once, and waits until it is gone.
    pub fn kill(&mut self) {
        let group = Pid::from_raw(self.child.id().cast_signed());
        let _ = killpg(group, Signal::SIGKILL);
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn next_line(from: &mut impl BufRead) -> io::Result<Option<String>> {
    let mut line = Vec::new();
    from.read_until(b'\n', &mut line)?;
    Ok((!line.is_empty()).then(|| String::from_utf8_lossy(&line).into_owned()))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    fn shell(script: &str) -> Command {
        let mut shell = Command::new("sh");
        shell.args(["-c", script]);
        shell
    }

    #[test]
    fn a_process_that_says_nothing_is_given_up() {
        let process = Process::start(shell("sleep 300"), &Interrupt::default()).expect("a shell");
        let error = process
            .next(Duration::from_millis(50))
            .expect_err("no line");
        assert!(error.to_string().contains("nothing heard"), "{error}");
        assert!(error.context("whose it is").is::<Silence>());
    }

    #[test]
    fn lines_come_with_their_ends_and_the_last_as_it_is() {
        let process = Process::start(shell("printf 'one\\ntw'"), &Interrupt::default());
        let process = process.expect("a shell");
        let next = || process.next(Duration::from_secs(30)).expect("no error");
        assert_eq!(next().as_deref(), Some("one\n"));
        assert_eq!(next().as_deref(), Some("tw"));
        assert_eq!(next(), None);
    }

    #[test]
    fn a_wait_ends_when_it_is_interrupted() {
        let interrupt = Interrupt::default();
        let process = Process::start(shell("sleep 300"), &interrupt).expect("a shell");
        interrupt.ask();
        let error = process
            .next(Duration::from_secs(300))
            .expect_err("interrupted");
        assert_eq!(error.to_string(), "interrupted");
        assert!(!error.is::<Silence>());
    }

    #[test]
    fn a_dropped_process_takes_its_children_with_it() {
        let (mut errors, theirs) = io::pipe().expect("a pipe");
        let mut command = shell("(sleep 300; echo late >&2) & echo ready; wait");
        command.stderr(theirs);
        let process = Process::start(command, &Interrupt::default()).expect("a shell");
        let line = process.next(Duration::from_secs(60)).expect("a line");
        assert_eq!(line.as_deref(), Some("ready\n"));
        drop(process);
        // The pipe ends when the last of them has ended.
        let mut said = String::new();
        errors.read_to_string(&mut said).expect("text");
        assert_eq!(said, "", "the child lived on");
    }
}
