//! A child process whose every system call is seen, and one of them tampered with.
//!
//! The child asks to be traced and stops itself; stops itself again when it is done; and between
//! sends itself no signal at all for each commit that returned. All three are calls that do nothing
//! else, so nothing of the tracing shows in what is traced.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::os::unix::process::CommandExt as _;
use std::process::Command;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::Context;
use nix::errno::Errno;
use nix::libc;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill, killpg};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use scenarios::start::start;

use super::calls::{Class, Kind};
use super::injected_fault::{How, InjectedFault};
use super::ring::Ring;
use super::traced_call::Call;

/// How the child ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Exited(i32),
    Killed(Signal),
    /// It had to be killed.
    Hung,
}

/// What was seen.
#[derive(Debug)]
pub(super) struct Trace {
    pub end: End,
    pub calls: Vec<Call>,
    /// The marks in between.
    pub returned: usize,
    /// Whether all that was to go wrong did.
    pub met: bool,
    /// Numbers of calls that are in no table.
    pub unknown: BTreeSet<i64>,
    /// Whether there was an io_uring, and the kernel does not show it.
    pub blind: bool,
}

/// Runs `command` to its end, all by this thread, which must have no other children.
///
/// `lacks` is a call that always fails.
pub(super) fn trace(
    mut command: Command,
    fault: Option<&InjectedFault>,
    lacks: Option<(&'static str, Errno)>,
    within: Duration,
) -> anyhow::Result<Trace> {
    let child = start(command.process_group(0)).context("can't start a child")?;
    let first = Pid::from_raw(child.id().cast_signed());
    let mut tracer = Tracer {
        first,
        fault,
        lacks,
        threads: HashMap::new(),
        over: false,
        counts: HashMap::new(),
        hit: false,
        since: 0,
        trace: Trace {
            end: End::Hung,
            calls: Vec::new(),
            returned: 0,
            met: false,
            unknown: BTreeSet::new(),
            blind: false,
        },
        ring: None,
    };
    let (ended, end) = channel::<()>();
    let (followed, late) = thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let late = end.recv_timeout(within) == Err(RecvTimeoutError::Timeout);
            if late {
                let _ = killpg(first, Signal::SIGKILL);
            }
            late
        });
        let followed = tracer.follow();
        if followed.is_err() {
            let _ = killpg(first, Signal::SIGKILL);
            while next().is_ok() {}
        }
        drop(ended);
        (followed, watch.join().expect("no panic"))
    });
    let end = followed?;
    let mut trace = tracer.trace;
    trace.end = if late { End::Hung } else { end };
    Ok(trace)
}

/// What any thread of the child did next.
fn next() -> nix::Result<WaitStatus> {
    // Only what this thread traces, threads of the child too.
    let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD;
    loop {
        match waitpid(None, Some(flags)) {
            Err(Errno::EINTR) => {}
            status => return status,
        }
    }
}

struct Tracer<'a> {
    first: Pid,
    fault: Option<&'a InjectedFault>,
    lacks: Option<(&'static str, Errno)>,
    /// The calls that threads are in.
    threads: HashMap<Pid, Option<Inside>>,
    over: bool,
    counts: HashMap<&'static str, u32>,
    /// Whether the first that was to go wrong has.
    hit: bool,
    /// Calls since then that could have said `EIO`.
    since: u32,
    ring: Option<Ring>,
    trace: Trace,
}

/// A call under way.
#[derive(Clone, Copy)]
struct Inside {
    number: i64,
    arguments: [u64; 6],
    call: Option<usize>,
    /// What is to be said of it.
    answer: Option<Answer>,
}

#[derive(Clone, Copy)]
enum Answer {
    Always(Errno),
    /// Not where it failed by itself.
    InPlaceOfSuccess(Errno),
}

impl Tracer<'_> {
    fn follow(&mut self) -> anyhow::Result<End> {
        loop {
            match next().context("can't wait for the child")? {
                WaitStatus::Exited(pid, code) if pid == self.first => return Ok(End::Exited(code)),
                WaitStatus::Signaled(pid, signal, _) if pid == self.first => {
                    return Ok(End::Killed(signal));
                }
                WaitStatus::Stopped(pid, Signal::SIGSTOP) if !self.threads.contains_key(&pid) => {
                    self.threads.insert(pid, None);
                    if pid == self.first {
                        let options = Options::PTRACE_O_TRACESYSGOOD
                            | Options::PTRACE_O_TRACECLONE
                            | Options::PTRACE_O_EXITKILL;
                        ptrace::setoptions(pid, options)?;
                    }
                    self.go_on(pid, None)?;
                }
                WaitStatus::Stopped(pid, Signal::SIGSTOP) if pid == self.first => {
                    self.over = true;
                    self.go_on(pid, None)?;
                }
                WaitStatus::Stopped(pid, signal) => self.go_on(pid, Some(signal))?,
                WaitStatus::PtraceSyscall(pid) => {
                    gone(self.look(pid))?;
                    self.go_on(pid, None)?;
                }
                WaitStatus::PtraceEvent(pid, ..) => self.go_on(pid, None)?,
                WaitStatus::Exited(pid, _) | WaitStatus::Signaled(pid, ..) => {
                    self.threads.remove(&pid);
                }
                WaitStatus::Continued(_) | WaitStatus::StillAlive => {}
            }
        }
    }

    fn go_on(&self, pid: Pid, signal: Option<Signal>) -> nix::Result<()> {
        gone(match self.over {
            true => ptrace::cont(pid, signal),
            false => ptrace::syscall(pid, signal),
        })
    }

    /// A thread enters a call or leaves it.
    fn look(&mut self, pid: Pid) -> nix::Result<()> {
        let registers = ptrace::getregs(pid)?;
        let inside = self.threads.get(&pid).copied().flatten();
        let inside = match inside {
            Some(inside) => {
                self.leave(pid, registers, inside)?;
                self.watch_ring(pid, registers, inside);
                None
            }
            None => Some(self.enter(pid, registers)?),
        };
        self.threads.insert(pid, inside);
        Ok(())
    }

    fn leave(&mut self, pid: Pid, mut registers: Registers, inside: Inside) -> nix::Result<()> {
        let result = registers.rax.cast_signed();
        if let Some(call) = inside.call {
            self.trace.calls[call].result = result;
        }
        let errno = match inside.answer {
            Some(Answer::Always(errno)) => errno,
            Some(Answer::InPlaceOfSuccess(errno)) if result >= 0 => errno,
            _ => return Ok(()),
        };
        registers.rax = (-i64::from(errno as i32)).cast_unsigned();
        ptrace::setregs(pid, registers)
    }

    fn enter(&mut self, pid: Pid, registers: Registers) -> nix::Result<Inside> {
        let number = registers.orig_rax.cast_signed();
        let arguments = [
            registers.rdi,
            registers.rsi,
            registers.rdx,
            registers.r10,
            registers.r8,
            registers.r9,
        ];
        let mut inside = Inside {
            number,
            arguments,
            call: None,
            answer: None,
        };
        if self.over {
            return Ok(inside);
        }
        if number == libc::SYS_kill && registers.rsi == 0 {
            self.trace.returned += 1;
        }
        if is_of_eventfd(pid, number, arguments) {
            return Ok(inside);
        }
        let kind = match Class::of(number, arguments) {
            Class::Fails(kind) => kind,
            Class::LeftOut => return Ok(inside),
            Class::Unknown => {
                self.trace.unknown.insert(number);
                return Ok(inside);
            }
        };
        let (call, how) = self.count(kind, arguments[2]);
        inside.call = Some(call);
        let lacks = self.lacks.filter(|(name, _)| *name == kind.name);
        if let Some(how) = how.or(lacks.map(|(_, errno)| How::Error(errno))) {
            inside.answer = self.tamper(pid, registers, how)?;
        }
        if number == libc::SYS_io_uring_enter {
            self.submit()?;
        }
        Ok(inside)
    }

    /// One more call, its number among all, and what goes wrong with it.
    fn count(&mut self, kind: &'static Kind, asked: u64) -> (usize, Option<How>) {
        let nth = self.counts.entry(kind.name).or_default();
        *nth += 1;
        let call = Call {
            kind,
            nth: *nth,
            asked,
            result: 0,
        };
        self.trace.calls.push(call);
        (self.trace.calls.len() - 1, self.due(&call))
    }

    /// The requests of a ring are about to be handed over.
    fn submit(&mut self) -> nix::Result<()> {
        for (entry, bytes) in self.of_ring(Ring::submitting).unwrap_or_default() {
            let (call, how) = self.count(Ring::kind(), bytes);
            self.of_ring(|ring| ring.submit(entry, call, how));
            if how == Some(How::Kill) {
                kill(self.first, Signal::SIGKILL)?;
            }
        }
        Ok(())
    }

    /// Records what a call that has returned means to a ring, and what has completed during it.
    fn watch_ring(&mut self, pid: Pid, registers: Registers, inside: Inside) {
        let Inside {
            number, arguments, ..
        } = inside;
        let result = registers.rax;
        match number {
            libc::SYS_io_uring_setup if result.cast_signed() >= 0 => {
                self.ring = Ring::set_up(pid, result, arguments[1]).ok();
                self.trace.blind |= self.ring.is_none();
            }
            libc::SYS_mmap if self.ring.as_ref().is_some_and(|ring| ring.is(arguments[4])) => {
                if let Some(ring) = &mut self.ring {
                    ring.mapped(arguments[5], result);
                }
            }
            libc::SYS_close if self.ring.as_ref().is_some_and(|ring| ring.is(arguments[0])) => {
                self.ring = None;
            }
            _ => {}
        }
        for (call, result) in self.of_ring(Ring::completing).unwrap_or_default() {
            self.trace.calls[call].result = result;
        }
    }

    fn of_ring<T>(&mut self, act: impl FnOnce(&mut Ring) -> io::Result<T>) -> Option<T> {
        let done = act(self.ring.as_mut()?);
        if done.is_err() {
            self.ring = None;
            self.trace.blind = true;
        }
        done.ok()
    }

    /// What goes wrong with this call.
    fn due(&mut self, call: &Call) -> Option<How> {
        let fault = self.fault?;
        let at = fault.at()?;
        if !self.hit {
            self.hit = (at.kind.name, at.nth) == (call.kind.name, call.nth);
            self.trace.met = self.hit && matches!(fault, InjectedFault::Call(_));
            return self.hit.then_some(at.how);
        }
        let InjectedFault::Twice(_, after) = fault else {
            return None;
        };
        self.since += u32::from(call.kind.errors.contains(&Errno::EIO));
        let due = self.since == *after && !self.trace.met;
        self.trace.met |= due;
        due.then_some(How::Error(Errno::EIO))
    }

    fn tamper(&self, pid: Pid, mut registers: Registers, how: How) -> nix::Result<Option<Answer>> {
        match how {
            How::Error(errno) => {
                // There is no such call, so nothing is done.
                registers.orig_rax = u64::MAX;
                ptrace::setregs(pid, registers)?;
                Ok(Some(Answer::Always(errno)))
            }
            How::Lost(errno) => Ok(Some(Answer::InPlaceOfSuccess(errno))),
            How::Short(bytes) => {
                // A thread may make another call than in the recorded run, with a smaller buffer.
                registers.rdx = registers.rdx.min(bytes);
                ptrace::setregs(pid, registers)?;
                Ok(None)
            }
            How::Kill => kill(self.first, Signal::SIGKILL).map(|()| None),
        }
    }
}

/// Returns whether a call reads or writes an eventfd. It cannot fail: the counter is far from its
/// limit.
fn is_of_eventfd(pid: Pid, number: i64, arguments: [u64; 6]) -> bool {
    let counter = [libc::SYS_read, libc::SYS_write].contains(&number) && arguments[2] == 8;
    let path = || std::fs::read_link(format!("/proc/{pid}/fd/{}", arguments[0]));
    counter && path().is_ok_and(|path| path.as_os_str() == "anon_inode:[eventfd]")
}

type Registers = libc::user_regs_struct;

/// Ignores the error of a thread that was killed concurrently.
fn gone(result: nix::Result<()>) -> nix::Result<()> {
    match result {
        Err(Errno::ESRCH) => Ok(()),
        result => result,
    }
}

#[cfg(test)]
mod tests;
