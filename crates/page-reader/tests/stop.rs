//! `StoppedProcess` against real processes: of several threads, of threads that come and go, stopped by others, killed, out of reach.

#![cfg(target_os = "linux")]
#![allow(unsafe_code)]

mod common;

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use common::{Mapping, PAGE};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use page_reader::{
    PageReader, ProcessMaps, ProcessMapsError, ProcessMemory, ProcessMemoryError, ProcessStopError,
    StoppedProcess, Unresponsive,
};
use test_machine::{Need, rounds};

/// Guards against a hang.
const PATIENCE: Duration = Duration::from_secs(120);
/// What a process of `ROLE` plays, and the file that it counts in.
const ROLE: &str = "PAGE_READER_TEST_ROLE";
const COUNTS: &str = "PAGE_READER_TEST_COUNTS";
const THREADS: usize = 4;
/// Counts of threads come first.
const SIGNALS: usize = THREADS;
const CHILD: usize = THREADS + 1;
const ROLE_THREAD: usize = THREADS + 2;

/// Counters that processes share.
struct Counts {
    memory: Mapping,
}

impl Counts {
    fn at(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        file.set_len(PAGE as u64).unwrap();
        let memory = Mapping::of_file(file.as_fd(), PAGE, true);
        Self { memory }
    }

    fn get(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE / 8);
        // SAFETY: mapped and aligned for as long as self is; whoever else has it uses atomics.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().cast::<u64>().wrapping_add(index)) }
    }

    fn load(&self) -> [u64; THREADS] {
        std::array::from_fn(|index| self.get(index).load(SeqCst))
    }

    /// Waits until all of them went up.
    fn go_on(&self, past: [u64; THREADS]) {
        wait_until("the threads go on", || {
            self.load().iter().zip(past).all(|(now, past)| *now > past)
        });
    }
}

fn wait_until(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "waiting until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// This program, playing a role.
fn playing(role: &str, counts: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "a_role", "--nocapture"])
        .env(ROLE, role)
        .env(COUNTS, counts)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// No test: what other processes do here.
#[test]
fn a_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let path = PathBuf::from(std::env::var_os(COUNTS).unwrap());
    let counts: &'static Counts = Box::leak(Box::new(Counts::at(&path)));
    // Should nobody be left to kill it.
    nix::unistd::alarm::set(600);
    let count = |index: usize| {
        move || loop {
            counts.get(index).fetch_add(1, SeqCst);
        }
    };
    let start_threads = || {
        for index in 0..THREADS {
            thread::spawn(count(index));
        }
    };
    let this_thread = nix::unistd::gettid().as_raw() as u64;
    counts.get(ROLE_THREAD).store(this_thread, SeqCst);
    match role.as_str() {
        "counts" => {
            count_signals(counts);
            start_threads();
        }
        "changes its threads" => {
            for index in 0..THREADS {
                thread::spawn(move || change(counts, index));
            }
        }
        "has no first thread" => {
            start_threads();
            end_the_first_thread();
        }
        "waits for a child to run a program" => {
            start_threads();
            let flags = libc::CLONE_VFORK | libc::SIGCHLD;
            // SAFETY: a fork, but for the parent's waiting; the child makes system calls only, and touches the counter.
            let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
            if child == 0 {
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                counts.get(CHILD).store(std::process::id().into(), SeqCst);
            }
        }
        "runs itself again" => {
            start_threads();
            counts.go_on(counts.load());
            panic!("{}", playing(&role, &path).exec());
        }
        "runs another program once it's told" => {
            for _ in 0..200 {
                let thread = thread::Builder::new().stack_size(64 << 10);
                thread.spawn(thread::park).unwrap();
            }
            // The last that a tracer comes to.
            let runs_another = move || {
                let told = counts.get(CHILD);
                while told.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                thread::sleep(Duration::from_micros(told.load(SeqCst)));
                panic!("{}", playing("counts", &path).exec());
            };
            thread::spawn(runs_another);
            // Nothing counts, which would keep the processors from the others.
            (0..THREADS).for_each(|index| counts.get(index).store(1, SeqCst));
        }
        "stops its child" => {
            #[expect(clippy::zombie_processes, reason = "it's to outlive this process")]
            let child = playing("counts", &path).spawn().unwrap();
            counts.go_on([0; THREADS]);
            let stopped = StoppedProcess::stop(child.id(), PATIENCE).unwrap();
            counts.get(CHILD).store(child.id().into(), SeqCst);
            std::mem::forget(stopped);
        }
        other => panic!("no role {other}"),
    }
    loop {
        thread::sleep(PATIENCE);
    }
}

/// Threads that count once and leave that to another, of which each makes a thread before it ends.
fn change(counts: &'static Counts, index: usize) {
    counts.get(index).fetch_add(1, SeqCst);
    let _ = thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(move || change(counts, index))
        .unwrap();
}

fn end_the_first_thread() {
    extern "C" fn end(_: i32) {
        // SAFETY: ends the thread alone, which waits for that of the test and holds nothing others need.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let pid = std::process::id();
    // SAFETY: the handler makes a system call; the signal goes to the first thread, whose id is the process's.
    unsafe {
        libc::signal(libc::SIGUSR1, end as extern "C" fn(i32) as usize);
        libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR1);
    }
}

/// Counts real-time signals, of which none may be merged with another.
fn count_signals(counts: &'static Counts) {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32) {
        let counter = COUNTER.load(SeqCst) as *const AtomicU64;
        // SAFETY: set before the handler was, and never unmapped.
        unsafe { &*counter }.fetch_add(1, SeqCst);
    }
    COUNTER.store(std::ptr::from_ref(counts.get(SIGNALS)) as u64, SeqCst);
    // SAFETY: the handler does nothing but to count.
    unsafe { libc::signal(libc::SIGRTMIN(), count as extern "C" fn(i32) as usize) };
}

/// A process that plays a role, killed and reaped on drop.
struct Target {
    child: Child,
    counts: Counts,
    _dir: tempfile::TempDir,
}

impl Target {
    /// Once all its threads have counted.
    fn that(role: &str) -> Self {
        Self::with(role, |_| ())
    }

    fn with(role: &str, set_up: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("counts");
        fs::write(&path, [0; PAGE]).unwrap();
        let counts = Counts::at(&path);
        let mut command = playing(role, &path);
        set_up(&mut command);
        let child = command.spawn().unwrap();
        counts.go_on([0; THREADS]);
        Self {
            child,
            counts,
            _dir: dir,
        }
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn signal(&self, signal: i32) {
        // SAFETY: sends a signal, to a process that isn't reaped yet.
        let result = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    fn stop(&self) -> StoppedProcess {
        StoppedProcess::stop(self.pid(), PATIENCE).unwrap()
    }

    fn stands_still(&self) {
        let before = self.counts.load();
        // Traced and stopped; a thread that has ended stays for its tracer to look at.
        // A dead thread without a tracer may be listed for a moment longer.
        assert_eq!(states(self.pid()).trim_matches(['t', 'Z', 'X']), "");
        thread::sleep(Duration::from_millis(rounds(2, 20)));
        assert_eq!(self.counts.load(), before);
    }

    fn goes_on(&self) {
        self.counts.go_on(self.counts.load());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A letter for each thread.
fn states(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let state = |task: fs::DirEntry| -> Option<char> {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        stat.rsplit_once(") ").unwrap().1.chars().next()
    };
    tasks.filter_map(|task| state(task.unwrap())).collect()
}

/// Whether the process called there is not traced, and every thread is as `letters` allow.
fn is_free(pid: u32, letters: &[char]) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.contains("TracerPid:\t0\n") && states(pid).trim_matches(letters).is_empty()
}

macro_rules! need {
    ($need:ident, $test:literal) => {
        if !Need::$need.met($test) {
            return;
        }
    };
}

#[test]
fn every_thread_stands_still_while_the_guard_lives_and_goes_on_after() {
    need!(Ptrace, "every_thread_stands_still_while_the_guard_lives");
    let target = Target::that("counts");
    let stopped = target.stop();
    assert_eq!(stopped.pid(), target.pid());
    assert!(stopped.threads() > THREADS);
    target.stands_still();
    // Also when it's another thread that has it.
    thread::spawn(move || drop(stopped)).join().unwrap();
    target.goes_on();
    wait_until("it's free", || is_free(target.pid(), &['R', 'S']));
}

#[test]
fn threads_that_come_and_go_meanwhile_are_stopped_too() {
    need!(Ptrace, "threads_that_come_and_go_meanwhile_are_stopped_too");
    let target = Target::that("changes its threads");
    for _ in 0..rounds(10, 50) {
        let stopped = target.stop();
        target.stands_still();
        drop(stopped);
    }
    target.goes_on();
}

#[test]
fn a_process_that_runs_another_program_meanwhile_is_stopped_before_or_after() {
    need!(
        Ptrace,
        "a_process_that_runs_another_program_meanwhile_is_stopped"
    );
    let target = Target::that("runs itself again");
    for _ in 0..rounds(10, 100) {
        let stopped = target.stop();
        target.stands_still();
        drop(stopped);
        thread::sleep(Duration::from_millis(1));
    }
    target.goes_on();
}

/// The thread that does is the first from then on, whatever it was when it was first traced.
#[test]
fn a_process_that_runs_another_program_once_is_stopped_in_time() {
    need!(
        Ptrace,
        "a_process_that_runs_another_program_once_is_stopped_in_time"
    );
    for round in (0..30).step_by(rounds(10, 1)) {
        let target = Target::that("runs another program once it's told");
        target.counts.get(CHILD).store(1 + round * 100, SeqCst);
        let stopped = target.stop();
        target.stands_still();
        drop(stopped);
    }
}

#[test]
fn a_process_whose_first_thread_has_ended_is_stopped() {
    need!(Ptrace, "a_process_whose_first_thread_has_ended_is_stopped");
    let target = Target::that("has no first thread");
    wait_until("it has ended", || states(target.pid()).contains('Z'));
    // By the id of another.
    let thread = target.counts.get(ROLE_THREAD).load(SeqCst) as u32;
    assert_ne!(thread, target.pid());
    let stopped = StoppedProcess::stop(thread, Duration::MAX).unwrap();
    assert_eq!(stopped.pid(), target.pid());
    assert_eq!(stopped.threads(), THREADS + 1);
    target.stands_still();
    drop(stopped);
    target.goes_on();
}

#[test]
fn no_signal_is_lost_however_often_the_process_is_stopped() {
    need!(
        Ptrace,
        "no_signal_is_lost_however_often_the_process_is_stopped"
    );
    let target = Target::that("counts");
    let signals = target.counts.get(SIGNALS);
    let signals_sent: u64 = rounds(300, 3000);
    let mut sent = 0;
    thread::scope(|scope| {
        let sender = scope.spawn(|| {
            for sent in 1..=signals_sent {
                target.signal(libc::SIGRTMIN());
                // Fewer at once than a process may have pending.
                wait_until("signals arrive", || sent - signals.load(SeqCst) < 100);
            }
            signals_sent
        });
        while !sender.is_finished() {
            drop(target.stop());
        }
        sent = sender.join().unwrap();
    });
    wait_until("every signal arrived", || signals.load(SeqCst) == sent);
}

#[test]
fn a_signal_sent_to_a_stopped_process_arrives_when_it_goes_on() {
    need!(
        Ptrace,
        "a_signal_sent_to_a_stopped_process_arrives_when_it_goes_on"
    );
    let target = Target::that("counts");
    let stopped = target.stop();
    target.signal(libc::SIGRTMIN());
    target.stands_still();
    assert_eq!(target.counts.get(SIGNALS).load(SeqCst), 0);
    drop(stopped);
    wait_until("it arrives", || {
        target.counts.get(SIGNALS).load(SeqCst) == 1
    });
}

#[test]
fn a_process_that_was_stopped_before_stays_stopped_after() {
    need!(
        Ptrace,
        "a_process_that_was_stopped_before_stays_stopped_after"
    );
    let target = Target::that("counts");
    target.signal(libc::SIGSTOP);
    wait_until("it stops", || is_free(target.pid(), &['T']));
    let before = target.counts.load();
    let stopped = target.stop();
    target.stands_still();
    drop(stopped);
    wait_until("it's let go", || is_free(target.pid(), &['T']));
    assert_eq!(target.counts.load(), before);
    target.signal(libc::SIGCONT);
    target.goes_on();
}

/// So the capture may be killed at any time, and the guest doesn't stand still for ever.
#[test]
fn a_process_whose_stopper_is_killed_goes_on() {
    need!(Ptrace, "a_process_whose_stopper_is_killed_goes_on");
    let mut stopper = Target::that("stops its child");
    let child = stopper.counts.get(CHILD);
    wait_until("it's stopped", || child.load(SeqCst) != 0);
    let target = child.load(SeqCst) as u32;
    assert_eq!(states(target).trim_matches('t'), "");
    let before = stopper.counts.load();
    thread::sleep(Duration::from_millis(20));
    assert_eq!(stopper.counts.load(), before);
    stopper.child.kill().unwrap();
    stopper.child.wait().unwrap();
    stopper.counts.go_on(before);
    wait_until("it's free", || is_free(target, &['R', 'S']));
    kill(Pid::from_raw(target as i32), Signal::SIGKILL).unwrap();
}

#[test]
fn a_process_that_is_killed_while_stopped_is_gone_and_can_be_waited_for() {
    need!(Ptrace, "a_process_that_is_killed_while_stopped_is_gone");
    let mut target = Target::that("counts");
    let stopped = target.stop();
    let maps = ProcessMaps::of(target.pid()).unwrap();
    let stack = maps.named("[stack]").unwrap();
    let range = (stack.addresses.start, stack.size());
    let memory = ProcessMemory::open(target.pid(), [range]).unwrap();
    memory.read_at(stack.size() - 1, &mut [0]).unwrap();
    target.signal(libc::SIGKILL);
    wait_until("it's dead", || {
        states(target.pid()).trim_matches('Z').is_empty()
    });
    let error = memory.read_at(stack.size() - 1, &mut [0]).unwrap_err();
    let error: ProcessMemoryError = error.downcast().unwrap();
    assert!(matches!(error, ProcessMemoryError::Gone { .. }));
    let pid = target.pid();
    let gone = |error| matches!(error, ProcessMapsError::Gone { pid: gone } if gone == pid);
    assert!(gone(ProcessMaps::of(pid).unwrap_err()));
    drop(stopped);
    let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
    assert!(matches!(error, ProcessStopError::Gone { .. }), "{error}");
    target.child.wait().unwrap();
    let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
    assert!(matches!(error, ProcessStopError::Gone { .. }), "{error}");
    assert!(gone(ProcessMaps::of(pid).unwrap_err()));
}

#[test]
fn a_process_that_is_traced_already_is_refused_and_stays_with_its_tracer() {
    need!(Ptrace, "a_process_that_is_traced_already_is_refused");
    let target = Target::that("counts");
    let stopped = target.stop();
    let error = StoppedProcess::stop(target.pid(), PATIENCE).unwrap_err();
    let status = fs::read_to_string(format!("/proc/{}/status", target.pid())).unwrap();
    match error {
        ProcessStopError::Traced { tracer, .. } => {
            assert!(status.contains(&format!("TracerPid:\t{tracer}\n")));
        }
        other => panic!("{other}"),
    }
    target.stands_still();
    drop(stopped);
    target.goes_on();
    drop(target.stop());
}

#[test]
fn a_thread_that_does_not_stop_in_time_is_named_and_the_process_runs_on() {
    need!(Ptrace, "a_thread_that_does_not_stop_in_time_is_named");
    let target = Target::that("waits for a child to run a program");
    wait_until("the child is there", || {
        target.counts.get(CHILD).load(SeqCst) != 0
    });
    let within = Duration::from_millis(100);
    let role = target.counts.get(ROLE_THREAD).load(SeqCst);
    let let_go = || wait_until("it's let go", || is_free(target.pid(), &['R', 'S', 'D']));
    // One that waits for a processor all the time is named too.
    wait_until("the thread that can't stop is named", || {
        let start = Instant::now();
        let error = StoppedProcess::stop(target.pid(), within).unwrap_err();
        assert!(start.elapsed() >= within);
        let_go();
        match error {
            ProcessStopError::Unresponsive { thread, reason, .. } => {
                u64::from(thread) == role && reason == Unresponsive::Vfork
            }
            other => panic!("{other}"),
        }
    });
    target.goes_on();
}

/// One thread that can't be stopped doesn't keep the others from running.
#[test]
fn a_process_that_does_not_stop_runs_between_attempts() {
    need!(Ptrace, "a_process_that_does_not_stop_runs_between_attempts");
    let target = Target::that("waits for a child to run a program");
    let child = target.counts.get(CHILD);
    wait_until("the child is there", || child.load(SeqCst) != 0);
    thread::scope(|scope| {
        let stop = scope.spawn(|| StoppedProcess::stop(target.pid(), PATIENCE * 2));
        for _ in 0..3 {
            wait_until("all but one thread stand still", || {
                states(target.pid()).matches('t').count() > THREADS
            });
            target.goes_on();
        }
        // Nothing keeps it from stopping any more.
        let child = Pid::from_raw(child.load(SeqCst) as i32);
        kill(child, Signal::SIGKILL).unwrap();
        drop(stop.join().unwrap().unwrap());
    });
    target.goes_on();
}

#[test]
fn stopping_is_given_up_once_it_is_cancelled() {
    need!(Ptrace, "stopping_is_given_up_once_it_is_cancelled");
    let target = Target::that("waits for a child to run a program");
    let child = target.counts.get(CHILD);
    wait_until("the child is there", || child.load(SeqCst) != 0);
    let asked = AtomicU64::new(0);
    let third = || asked.fetch_add(1, SeqCst) >= 2;
    let error = StoppedProcess::stop_unless(target.pid(), Duration::MAX, &third).unwrap_err();
    assert!(
        matches!(error, ProcessStopError::Cancelled { .. }),
        "{error}"
    );
    wait_until("it's free", || is_free(target.pid(), &['R', 'S', 'D']));
    target.goes_on();
}

#[test]
fn this_process_does_not_stop_itself() {
    let error = StoppedProcess::stop(std::process::id(), PATIENCE).unwrap_err();
    assert!(matches!(error, ProcessStopError::Itself { .. }), "{error}");
}

#[test]
fn a_process_that_was_never_there_is_gone() {
    for pid in [0, 1 << 30, u32::MAX] {
        let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
        assert!(matches!(error, ProcessStopError::Gone { .. }), "{error}");
        let error = ProcessMaps::of(pid).unwrap_err();
        assert!(matches!(error, ProcessMapsError::Gone { .. }), "{error}");
    }
}

/// Played by another user, who may not.
#[test]
fn a_process_of_another_user_is_refused_and_the_remedy_is_said() {
    const NAME: &str = "a_process_of_another_user_is_refused_and_the_remedy_is_said";
    const INSIDE: &str = "PAGE_READER_TEST_OTHERS_PROCESS";
    if let Ok(pid) = std::env::var(INSIDE) {
        let pid = pid.parse().unwrap();
        let error = StoppedProcess::stop(pid, PATIENCE).unwrap_err();
        assert!(
            matches!(error, ProcessStopError::NotPermitted { .. }),
            "{error}"
        );
        assert!(error.to_string().contains("CAP_SYS_PTRACE"), "{error}");
        let error = ProcessMaps::of(pid).unwrap_err();
        assert!(matches!(error, ProcessMapsError::Read { .. }), "{error}");
        return;
    }
    need!(
        Root,
        "a_process_of_another_user_is_refused_and_the_remedy_is_said"
    );
    let target = Target::that("counts");
    let program = common::for_anyone();
    let output = Command::new(program.path())
        .args(["--exact", NAME])
        .env(INSIDE, target.pid().to_string())
        .current_dir("/")
        .uid(65534)
        .gid(65534)
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("1 passed"), "{output:?}");
    target.goes_on();
}
