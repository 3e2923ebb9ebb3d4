//! Processes in roles, for tests that stop them.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use process_memory::StoppedProcess;
use test_machine::rounds;

use test_memory::{Mapping, PAGE};

/// A limit that ends a hanging test.
pub(crate) const PATIENCE: Duration = Duration::from_secs(120);
/// The variable that names the role of a process, and the one that names its file of counters.
const ROLE: &str = "PROCESS_MEMORY_TEST_ROLE";
const COUNTS: &str = "PROCESS_MEMORY_TEST_COUNTS";
pub(crate) const THREADS: usize = 4;
/// The counters of the threads come first.
pub(crate) const SIGNALS: usize = THREADS;
pub(crate) const CHILD: usize = THREADS + 1;
pub(crate) const ROLE_THREAD: usize = THREADS + 2;

/// Counters that processes share.
pub(crate) struct Counts {
    memory: Mapping,
}

impl Counts {
    pub(crate) fn at(path: &Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        file.set_len(PAGE as u64).unwrap();
        let memory = Mapping::of_file(file.as_fd(), PAGE, true);
        Self { memory }
    }

    pub(crate) fn get(&self, index: usize) -> &AtomicU64 {
        assert!(index < PAGE / 8);
        // SAFETY: mapped and aligned for the lifetime of self; all processes use atomics.
        unsafe { AtomicU64::from_ptr(self.memory.as_ptr().cast::<u64>().wrapping_add(index)) }
    }

    pub(crate) fn load(&self) -> [u64; THREADS] {
        std::array::from_fn(|index| self.get(index).load(SeqCst))
    }

    /// Waits until every counter exceeds `past`.
    pub(crate) fn wait_past(&self, past: [u64; THREADS]) {
        wait_until("the threads count", || {
            self.load().iter().zip(past).all(|(now, past)| *now > past)
        });
    }
}

pub(crate) fn wait_until(what: &str, is: impl Fn() -> bool) {
    let start = Instant::now();
    while !is() {
        assert!(start.elapsed() < PATIENCE, "waiting until {what}");
        thread::sleep(Duration::from_millis(1));
    }
}

/// Returns a command that runs this program in a role.
fn role_command(role: &str, counts: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command
        .args(["--exact", "role", "--nocapture"])
        .env(ROLE, role)
        .env(COUNTS, counts)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}

/// Runs the role of a child process, or returns at once in the test process. The test `role` of
/// each test binary calls it.
pub(crate) fn play_role() {
    let Ok(role) = std::env::var(ROLE) else {
        return;
    };
    let path = PathBuf::from(std::env::var_os(COUNTS).unwrap());
    let counts: &'static Counts = Box::leak(Box::new(Counts::at(&path)));
    // Ends the process if the test process cannot kill it.
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
            // SAFETY: a fork whose parent waits; the child only makes system calls and writes the
            // counter.
            let child = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
            if child == 0 {
                let _ = nix::sys::prctl::set_pdeathsig(Signal::SIGKILL);
                counts.get(CHILD).store(std::process::id().into(), SeqCst);
            }
        }
        "runs itself again" => {
            start_threads();
            counts.wait_past(counts.load());
            panic!("{}", role_command(&role, &path).exec());
        }
        "executes a program on request" => {
            for _ in 0..200 {
                let thread = thread::Builder::new().stack_size(64 << 10);
                thread.spawn(thread::park).unwrap();
            }
            // The last thread in the list of a tracer.
            let execute = move || {
                let request = counts.get(CHILD);
                while request.load(SeqCst) == 0 {
                    thread::yield_now();
                }
                thread::sleep(Duration::from_micros(request.load(SeqCst)));
                panic!("{}", role_command("counts", &path).exec());
            };
            thread::spawn(execute);
            // No thread counts, so that the processors are free for the others.
            (0..THREADS).for_each(|index| counts.get(index).store(1, SeqCst));
        }
        "stops its child" => {
            #[expect(clippy::zombie_processes, reason = "it outlives this process")]
            let child = role_command("counts", &path).spawn().unwrap();
            counts.wait_past([0; THREADS]);
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

/// Runs a chain of threads, each of which counts once, starts the next one, and ends.
fn change(counts: &'static Counts, index: usize) {
    counts.get(index).fetch_add(1, SeqCst);
    let _ = thread::Builder::new()
        .stack_size(64 << 10)
        .spawn(move || change(counts, index))
        .unwrap();
}

fn end_the_first_thread() {
    extern "C" fn end(_: i32) {
        // SAFETY: ends only this thread, which waits for the thread of the test and holds no locks.
        unsafe { libc::syscall(libc::SYS_exit, 0) };
    }
    let pid = std::process::id();
    // SAFETY: the handler makes a system call; the signal is sent to the first thread, whose id is
    // the process id.
    unsafe {
        libc::signal(libc::SIGUSR1, end as extern "C" fn(i32) as usize);
        libc::syscall(libc::SYS_tgkill, pid, pid, libc::SIGUSR1);
    }
}

/// Counts real-time signals, which the kernel does not merge.
fn count_signals(counts: &'static Counts) {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    extern "C" fn count(_: i32) {
        let counter = COUNTER.load(SeqCst) as *const AtomicU64;
        // SAFETY: set before the handler is installed, and never unmapped.
        unsafe { &*counter }.fetch_add(1, SeqCst);
    }
    COUNTER.store(std::ptr::from_ref(counts.get(SIGNALS)) as u64, SeqCst);
    // SAFETY: the handler only counts.
    unsafe { libc::signal(libc::SIGRTMIN(), count as extern "C" fn(i32) as usize) };
}

/// A process in a role, killed and reaped on drop.
pub(crate) struct Target {
    pub(crate) child: Child,
    pub(crate) counts: Counts,
    _dir: tempfile::TempDir,
}

impl Target {
    /// Starts a process, and waits until all its threads have counted.
    pub(crate) fn that(role: &str) -> Self {
        Self::with(role, |_| ())
    }

    pub(crate) fn with(role: &str, set_up: impl FnOnce(&mut Command)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("counts");
        fs::write(&path, [0; PAGE]).unwrap();
        let counts = Counts::at(&path);
        let mut command = role_command(role, &path);
        set_up(&mut command);
        let child = command.spawn().unwrap();
        counts.wait_past([0; THREADS]);
        Self {
            child,
            counts,
            _dir: dir,
        }
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(crate) fn signal(&self, signal: i32) {
        // SAFETY: sends a signal to a process that is not reaped yet.
        let result = unsafe { libc::kill(self.pid() as i32, signal) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    }

    pub(crate) fn stop(&self) -> StoppedProcess {
        StoppedProcess::stop(self.pid(), PATIENCE).unwrap()
    }

    /// Panics unless all threads are stopped.
    pub(crate) fn assert_stopped(&self) {
        let before = self.counts.load();
        // Threads are traced and stopped, or have ended: the tracer has not reaped them, or they
        // are still listed for a moment.
        assert_eq!(states(self.pid()).trim_matches(['t', 'Z', 'X']), "");
        thread::sleep(Duration::from_millis(rounds(2, 20)));
        assert_eq!(self.counts.load(), before);
    }

    /// Waits until all threads have counted again.
    pub(crate) fn assert_running(&self) {
        self.counts.wait_past(self.counts.load());
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Returns a letter for the state of each thread.
pub(crate) fn states(pid: u32) -> String {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    let state = |task: fs::DirEntry| -> Option<char> {
        let stat = fs::read_to_string(task.path().join("stat")).ok()?;
        stat.rsplit_once(") ").unwrap().1.chars().next()
    };
    tasks.filter_map(|task| state(task.unwrap())).collect()
}

/// Returns `true` if the process is not traced and the state of every thread is in `letters`.
pub(crate) fn is_free(pid: u32, letters: &[char]) -> bool {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    status.contains("TracerPid:\t0\n") && states(pid).trim_matches(letters).is_empty()
}
