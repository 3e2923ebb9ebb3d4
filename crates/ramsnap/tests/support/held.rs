//! The tool, held by `strace` at a system call.

use std::collections::HashMap;
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::NamedTempFile;

use crate::support::Work;

/// The calls that change files, or end a part of the work. The last `statx` is that of the new
/// file, for the report. `write` is excluded, as the first one of the listener would be held too.
const CALLS: &str = "openat,statx,mkdir,flock,ftruncate,fallocate,pread64,pwrite64,fsync,fdatasync,\
    renameat,renameat2,linkat,unlinkat,rmdir,close";

/// The call that reserves room and makes holes.
pub(crate) const ALLOCATING: &str = "fallocate";

/// The call that threads share: the main thread's part of them differs from run to run.
pub(crate) const SHARED: &str = "pread64";

/// A system call of the main thread: its name, and its number among the calls of this name.
pub(crate) type Call = (String, usize);

/// Returns the calls of `command` once it listens for signals, of each name the first and the last,
/// or all of them.
pub(crate) fn calls(command: &Command, all: bool) -> Vec<Call> {
    let log = NamedTempFile::new().unwrap();
    let trace = format!("trace=clone3,{CALLS}");
    let mut strace = under_strace(command, log.path(), &["-e", &trace]);
    let child = strace.stdout(Stdio::null()).spawn().unwrap();
    let main = child.id().to_string();
    let output = child.wait_with_output().unwrap();
    let log = fs::read_to_string(&log).unwrap();
    assert!(matches!(output.status.code(), Some(0 | 1)), "{output:?}");
    let mut numbers = HashMap::new();
    let (mut listens, mut calls) = (false, Vec::new());
    for line in log.lines() {
        let call = call_of(line, &main).and_then(|call| call.split_once('('));
        // Not the end of a call: `<... openat resumed>`.
        let Some((name, _)) = call.filter(|(name, _)| !name.contains(' ')) else {
            continue;
        };
        let number = numbers.entry(name).or_insert(0);
        *number += 1;
        if listens {
            calls.push((name.to_owned(), *number));
        }
        listens |= name == "clone3";
    }
    calls.retain(|(name, _)| name != "clone3");
    assert!(calls.len() > 2, "{log}");
    let ends = |call: &Call| {
        let mut same = calls.iter().filter(|other| other.0 == call.0);
        same.next() == Some(call) || (call.0 != SHARED && same.next_back() == Some(call))
    };
    calls
        .iter()
        .filter(|call| all || ends(call))
        .cloned()
        .collect()
}

/// Returns the text of a log line about the thread `id`, which is padded there.
fn call_of<'l>(line: &'l str, id: &str) -> Option<&'l str> {
    let (thread, call) = line.split_once(' ')?;
    (thread == id).then(|| call.trim_start())
}

/// `strace -D` traces its parent, which is `command`.
fn under_strace(command: &Command, log: &Path, args: &[&str]) -> Command {
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-D", "-o"]).arg(log).args(args);
    strace.arg(command.get_program()).args(command.get_args());
    for (key, value) in command.get_envs() {
        match value {
            Some(value) => strace.env(key, value),
            None => strace.env_remove(key),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        strace.current_dir(dir);
    }
    strace.stdin(Stdio::null()).stderr(Stdio::piped());
    // A signal for the tool is not for the test.
    strace.process_group(0);
    strace
}

/// A run of the tool whose main thread does not begin a call until [`release`](Self::release).
pub(crate) struct Held {
    child: Child,
}

impl Held {
    /// Runs `command` up to the call. Returns `None` if it ends without the call.
    pub(crate) fn before(command: &Command, (name, number): &Call) -> Option<Self> {
        let log = NamedTempFile::new().unwrap();
        let trace = format!("trace={name}");
        // The delay ends with `strace`.
        let inject = format!("inject={name}:delay_enter=3600s:when={number}");
        let child = under_strace(command, log.path(), &["-e", &trace, "-e", &inject])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let mut held = Self { child };
        let main = held.child.id().to_string();
        let call = format!("{name}(");
        let begun = || {
            let log = fs::read_to_string(&log).unwrap();
            let calls = log.lines().filter_map(|line| call_of(line, &main));
            calls.filter(|begun| begun.starts_with(&call)).count() == *number
        };
        while !begun() {
            if held.has_ended() {
                return None;
            }
            sleep(Duration::from_millis(1));
        }
        Some(held)
    }

    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal, and waits until the listener has handled it. Returns whether that ends the
    /// process, whose held threads `strace` keeps.
    pub(crate) fn signal(&mut self, signal: Signal) -> bool {
        let listener = loop {
            match self.listener() {
                Some(listener) => break listener,
                None => assert!(!self.has_ended(), "it has ended before the signal"),
            }
            sleep(Duration::from_millis(1));
        };
        self.send(signal);
        loop {
            if !listener.exists() {
                return true;
            }
            // For the next signal, or for what a held thread has.
            if sleeps(&listener) {
                return false;
            }
            sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn send(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().cast_signed()), signal).unwrap();
    }

    /// Returns the signals that every thread blocks, a bit each.
    pub(crate) fn blocked_by_all_threads(&self) -> u64 {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).unwrap();
        let blocked = tasks.filter_map(|task| {
            // A thread may end meanwhile. One that has ended states that it blocks nothing.
            let status = fs::read_to_string(task.unwrap().path().join("status")).ok()?;
            let field = |name| status.lines().find_map(|line| line.strip_prefix(name));
            if field("State:").unwrap().trim().starts_with(['X', 'Z']) {
                return None;
            }
            Some(u64::from_str_radix(field("SigBlk:").unwrap().trim(), 16).unwrap())
        });
        blocked.reduce(|all, one| all & one).unwrap()
    }

    /// Lets the process continue, and does not wait for its end.
    pub(crate) fn let_go_on(self) -> Self {
        self.end_strace();
        self
    }

    /// Waits until a signal has stopped the process, and it is no longer traced.
    pub(crate) fn wait_until_suspended(&self) {
        let status = format!("/proc/{}/status", self.child.id());
        while !fs::read_to_string(&status).unwrap().contains("State:\tT ") {
            sleep(Duration::from_millis(1));
        }
    }

    /// Waits until the main thread blocks in a `write` to an output that takes nothing.
    pub(crate) fn wait_until_it_writes(&mut self) {
        let call = format!("/proc/{}/syscall", self.child.id());
        let write = format!("{} ", nix::libc::SYS_write);
        while !fs::read_to_string(&call).unwrap().starts_with(&write) {
            assert!(!self.has_ended(), "it has ended without");
            sleep(Duration::from_millis(1));
        }
    }

    fn listener(&self) -> Option<PathBuf> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id())).ok()?;
        let mut tasks = tasks.flatten().map(|task| task.path());
        tasks.find(|task| waits_for_a_signal(task))
    }

    /// Ends `strace`, and with it the delay.
    fn end_strace(&self) {
        let status = fs::read_to_string(format!("/proc/{}/status", self.child.id()));
        let tracer = status.ok().and_then(|status| {
            let mut lines = status.lines();
            let tracer = lines.find_map(|line| line.strip_prefix("TracerPid:"));
            tracer?.trim().parse().ok()
        });
        if let Some(tracer @ 1..) = tracer {
            let _ = kill(Pid::from_raw(tracer), Signal::SIGKILL);
        }
    }

    /// Lets the process continue, and returns its exit status and its standard error.
    pub(crate) fn release(mut self) -> (ExitStatus, String) {
        self.end_strace();
        let mut error = String::new();
        let stderr = self.child.stderr.as_mut().unwrap();
        std::io::Read::read_to_string(stderr, &mut error).unwrap();
        (self.child.wait().unwrap(), error)
    }
}

/// Returns a restore to `guest` that is held after it has written a part of the RAM.
pub(crate) fn half_restored(work: &Work) -> Held {
    let command = work.command("restore full.mem -o guest");
    Held::before(&command, &("pwrite64".to_owned(), 2)).expect("held")
}

impl Drop for Held {
    fn drop(&mut self) {
        self.end_strace();
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns whether a thread sleeps in a `recvfrom` without flags: the next signal wakes it up.
fn waits_for_a_signal(task: &Path) -> bool {
    let read = |name| fs::read_to_string(task.join(name)).unwrap_or_default();
    let call = read("syscall");
    let mut call = call.split(' ');
    call.next() == Some(&nix::libc::SYS_recvfrom.to_string())
        && call.nth(3) == Some("0x0")
        && sleeps(task)
}

fn sleeps(task: &Path) -> bool {
    let status = fs::read_to_string(task.join("status")).unwrap_or_default();
    status.contains("State:\tS")
}
