//! A VMM in another process, which is not traced, and what became of it.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use harness::process::this_program;
use nix::errno::Errno;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use page_client::Memory;
use random::Random;
use scenarios::commits::RAM;
use scenarios::images::ram_of_mixed;
use serde::{Deserialize, Serialize};
use std::os::unix::process::ExitStatusExt;

use super::oracle::FaultViolation;
use super::serve::{SOCKET, Served};

/// The page size of the host.
const PAGE: u64 = 4096;

/// The VMM ends within this time after its server, also on a slow machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a VMM does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(super) enum Script {
    /// One access after the other, each when the server waits for messages.
    Steps,
    /// Several threads touch and discard memory.
    Threads,
}

/// A step of [`Script::Steps`], in pages.
enum Step {
    Read(u64),
    Remove(u64, u64),
}

/// Each read page is one that no fault before it has filled.
const STEPS: [Step; 11] = [
    Step::Read(0),
    Step::Read(255),
    // Of the packed diff, and of the raw one.
    Step::Read(4 * 9 + 1),
    Step::Read(4 * 10 + 3),
    // The last page of the first region, and the first one of the second.
    Step::Read(63),
    Step::Read(64),
    // Missing pages, and pages of which some are filled.
    Step::Remove(100, 8),
    Step::Remove(36, 2),
    // Zeros now.
    Step::Read(101),
    Step::Read(37),
    Step::Read(180),
];

/// The faults of the steps.
pub(super) const STEP_FAULTS: u64 = 9;

/// The regions of the VMM, in bytes.
const REGIONS: [u64; 2] = [64 * PAGE, RAM - 64 * PAGE];

/// Runs a VMM, as a child of the server.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Vmm {
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    verdict: PathBuf,
    #[arg(long, value_enum)]
    script: Script,
    /// The process of the server.
    #[arg(long)]
    server: i32,
}

/// What a VMM has found in its memory once its server has ended.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Eq, Serialize)]
pub(super) struct Found {
    /// The first page with other bytes than those of the images.
    wrong: Option<String>,
    /// Pages that cannot be read.
    poisoned: u64,
    notified: bool,
}

/// The end of a VMM.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq, Serialize)]
pub(super) enum VmmEnd {
    Found(Found),
    Killed,
    /// It waited for a server that has not served it.
    Waits,
    Hangs,
    Strange(String),
}

impl Vmm {
    /// Starts the VMM. It does not outlive this process.
    pub(super) fn start(dir: &Path, verdict: &Path, script: Script) -> anyhow::Result<Child> {
        let script = clap::ValueEnum::to_possible_value(&script).context("a script has a name")?;
        let mut command = Command::new(this_program()?);
        command.arg("vmm").arg("--dir").arg(dir);
        command.arg("--verdict").arg(verdict);
        command.args(["--script", script.get_name()]);
        command.arg(format!("--server={}", std::process::id()));
        command.stdin(Stdio::null()).stdout(Stdio::null());
        command.spawn().context("can't start a VMM")
    }

    pub(super) fn run(&self) -> anyhow::Result<()> {
        set_pdeathsig(Signal::SIGKILL)?;
        ensure!(getppid().as_raw() == self.server, "the server has ended");
        let mut vmm = page_client::Vmm::new(&Memory::private(REGIONS))?;
        let mut memory = Expected(ram_of_mixed());
        let mut found = Found::default();
        loop {
            match vmm.connect(&self.dir.join(SOCKET)) {
                Ok(()) => break,
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                // The server listens later.
                Err(_) => thread::sleep(Duration::from_millis(1)),
            }
        }
        let is_served = match self.script {
            Script::Steps => memory.steps(&vmm, &mut found)?,
            Script::Threads => {
                memory.threads(&vmm, &mut found)?;
                true
            }
        };
        found.notified = vmm.notice().contains("\"error\"");
        // A refused VMM must end: the server keeps its descriptor, and fills no page.
        let pages = match is_served || !found.notified {
            true => 0..RAM / PAGE,
            false => 0..0,
        };
        // All of it, and what was compared before too. Only this counts poisoned pages.
        found.poisoned = 0;
        for page in pages {
            memory.compare(&vmm, page, &mut found)?;
        }
        let written = self.verdict.with_extension("written");
        fs::write(&written, serde_json::to_vec(&found)?)?;
        Ok(fs::rename(written, &self.verdict)?)
    }
}

/// The bytes that the memory must have.
struct Expected(Vec<u8>);

impl Expected {
    /// Returns whether the server has begun to serve.
    fn steps(&mut self, vmm: &page_client::Vmm, found: &mut Found) -> anyhow::Result<bool> {
        let mut server = Server {
            process: getppid().as_raw(),
            seen: false,
            started: Instant::now(),
        };
        for step in &STEPS {
            server.wait_until_it_waits(vmm);
            if !server.seen && vmm.is_notified() {
                return Ok(false);
            }
            match *step {
                Step::Read(page) => self.compare(vmm, page, found)?,
                Step::Remove(first, pages) => self.remove(vmm, first, pages)?,
            }
        }
        Ok(server.seen)
    }

    fn threads(&mut self, vmm: &page_client::Vmm, found: &mut Found) -> anyhow::Result<()> {
        /// The last pages are discarded, and not read meanwhile.
        const DISCARDED: u64 = 32;
        let read = RAM / PAGE - DISCARDED;
        let this = &*self;
        let all = thread::scope(|scope| {
            let threads: Vec<_> = (0..3)
                .map(|seed| {
                    scope.spawn(move || {
                        let (mut random, mut found) = (Random::seeded(seed), Found::default());
                        for _ in 0..read {
                            this.compare(vmm, random.below(read), &mut found)?;
                        }
                        anyhow::Ok(found)
                    })
                })
                .collect();
            for first in (read..RAM / PAGE).step_by(4) {
                vmm.remove(first * PAGE, 3 * PAGE)?;
            }
            let joined = threads
                .into_iter()
                .map(|thread| thread.join().expect("no panic"));
            joined.collect::<anyhow::Result<Vec<_>>>()
        })?;
        found.wrong = all.into_iter().find_map(|found| found.wrong);
        for first in (read..RAM / PAGE).step_by(4) {
            self.zero(first, 3);
        }
        Ok(())
    }

    fn remove(&mut self, vmm: &page_client::Vmm, first: u64, pages: u64) -> anyhow::Result<()> {
        vmm.remove(first * PAGE, pages * PAGE)?;
        self.zero(first, pages);
        Ok(())
    }

    fn zero(&mut self, first: u64, pages: u64) {
        self.0[(first * PAGE) as usize..][..(pages * PAGE) as usize].fill(0);
    }

    fn compare(&self, vmm: &page_client::Vmm, page: u64, found: &mut Found) -> anyhow::Result<()> {
        let expected = &self.0[(page * PAGE) as usize..][..PAGE as usize];
        match vmm.read(page * PAGE, PAGE) {
            Ok(bytes) if bytes == expected => {}
            Ok(bytes) => {
                let zeros = bytes.iter().all(|byte| *byte == 0);
                let what = if zeros { "zeros" } else { "other bytes" };
                let wrong = || format!("{what} in page {page} of the VMM");
                found.wrong.get_or_insert_with(wrong);
            }
            Err(Errno::EFAULT) => found.poisoned += 1,
            Err(errno) => bail!("page {page} of the VMM: {errno}"),
        }
        Ok(())
    }
}

/// The server that the VMM waits for.
struct Server {
    process: i32,
    seen: bool,
    started: Instant,
}

impl Server {
    /// Waits until the page fault handler waits for messages, so that the calls of the server are
    /// the same in each run. A handler that has ended, or never begins, is not waited for.
    fn wait_until_it_waits(&mut self, vmm: &page_client::Vmm) {
        // Elsewhere /proc may not show the calls of another process.
        const LIMIT: Duration = Duration::from_secs(20);
        while self.started.elapsed() < LIMIT {
            match self.call_of_handler() {
                Some(call) if call == nix::libc::SYS_poll.to_string() => {
                    self.seen = true;
                    return;
                }
                None if self.seen || vmm.is_notified() => return,
                _ => thread::sleep(Duration::from_micros(100)),
            }
        }
    }

    /// Returns the number of the system call that the handler is in.
    fn call_of_handler(&self) -> Option<String> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.process)).ok()?;
        let mut tasks = tasks.filter_map(|task| Some(task.ok()?.path()));
        let is_handler = |task: &PathBuf| {
            let name = fs::read_to_string(task.join("comm"));
            name.is_ok_and(|name| name.trim() == "lazy-ram-faults")
        };
        let handler = tasks.find(is_handler)?;
        let call = fs::read_to_string(handler.join("syscall")).ok()?;
        Some(call.split_whitespace().next()?.to_owned())
    }
}

impl VmmEnd {
    /// Waits for the end of a VMM after that of its server.
    pub(super) fn of(vmm: &mut Child, verdict: &Path, served: Served) -> anyhow::Result<Self> {
        let patience = match served {
            Served::Not => Duration::ZERO,
            _ => PATIENCE,
        };
        let started = Instant::now();
        let status = loop {
            if let Some(status) = vmm.try_wait()? {
                break status;
            }
            if started.elapsed() >= patience {
                vmm.kill()?;
                vmm.wait()?;
                return Ok(match served {
                    Served::Not => Self::Waits,
                    _ => Self::Hangs,
                });
            }
            thread::sleep(Duration::from_millis(1));
        };
        if status.signal() == Some(Signal::SIGKILL as i32) {
            return Ok(Self::Killed);
        }
        Ok(match fs::read(verdict) {
            Ok(found) if status.success() => Self::Found(serde_json::from_slice(&found)?),
            _ => Self::Strange(format!("the VMM has ended with {status}")),
        })
    }

    /// Checks that the end is the one that the server has reported.
    pub(super) fn judge(&self, served: Served) -> Result<(), FaultViolation> {
        let untrue = || {
            let text = format!("{served:?} was reported, and of the VMM {self:?}");
            Err(FaultViolation::Untrue(text))
        };
        match (served, self) {
            (
                _,
                Self::Found(Found {
                    wrong: Some(wrong), ..
                }),
            ) => Err(FaultViolation::Torn(wrong.clone())),
            (_, Self::Hangs) => {
                let text = "the VMM waits for its pages forever".to_owned();
                Err(FaultViolation::Untrue(text))
            }
            (_, Self::Strange(_)) => untrue(),
            (Served::Not, _) => Ok(()),
            (Served::Failed, Self::Killed) => Ok(()),
            (_, Self::Killed | Self::Waits) => untrue(),
            (Served::Failed, Self::Found(found)) if found.notified => Ok(()),
            (Served::WithPoison, Self::Found(found)) if !found.notified => Ok(()),
            (Served::Completely, Self::Found(found)) if *found == Found::default() => Ok(()),
            (_, Self::Found(_)) => untrue(),
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn found(wrong: bool, poisoned: u64, notified: bool) -> VmmEnd {
        VmmEnd::Found(Found {
            wrong: wrong.then(|| "zeros in page 1".to_owned()),
            poisoned,
            notified,
        })
    }

    #[rstest]
    #[case::equal(Served::Completely, found(false, 0, false), true)]
    #[case::zeros(Served::Completely, found(true, 0, false), false)]
    #[case::zeros_of_none(Served::Not, found(true, 0, false), false)]
    #[case::silent_poison(Served::Completely, found(false, 1, false), false)]
    #[case::poison(Served::WithPoison, found(false, 1, false), true)]
    #[case::silent_failure(Served::Failed, found(false, 3, false), false)]
    #[case::notice(Served::Failed, found(false, 3, true), true)]
    #[case::killed(Served::Failed, VmmEnd::Killed, true)]
    #[case::killed_without_reason(Served::WithPoison, VmmEnd::Killed, false)]
    #[case::waits(Served::Not, VmmEnd::Waits, true)]
    #[case::hangs(Served::Failed, VmmEnd::Hangs, false)]
    fn end_of_a_vmm_must_be_the_reported_one(
        #[case] served: Served,
        #[case] end: VmmEnd,
        #[case] right: bool,
    ) {
        assert_eq!(end.judge(served).is_ok(), right);
    }
}
