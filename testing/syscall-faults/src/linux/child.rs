//! A scenario in a process of its own, and what that process has to say when it is over.

use std::collections::BTreeMap;
use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;
use dirty_bitmap::DirtyBitmap;
use harness::process::this_program;
use nix::libc::SIGXFSZ;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use scenarios::CommitObserver;
use serde::{Deserialize, Serialize};

use super::case::Case;
use super::outcome::Reported;
use super::serve::Served;
use super::tracee;
use super::vmm::{Vmm, VmmEnd};

/// In which a run ends, also on a machine that is very slow.
pub(super) const WITHIN: Duration = Duration::from_secs(120);

/// Carries out a scenario that its parent traces.
#[derive(clap::Args, Clone, Debug)]
pub(super) struct Child {
    #[arg(long)]
    scenario: String,
    #[arg(long)]
    dir: PathBuf,
    #[arg(long)]
    report: PathBuf,
    /// The largest file that this process may write, in bytes.
    #[arg(long)]
    limit: Option<u64>,
}

/// What a child reports about itself.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Report {
    pub said: Reported,
    pub saves: Vec<Save>,
    /// What the scenario did not give back.
    pub held: Vec<String>,
    /// What the server of a VMM has reported, and the end of the VMM.
    pub vmm: Option<(Served, VmmEnd)>,
}

/// The marks of one save.
#[derive(Debug, Deserialize, Serialize)]
pub(super) struct Save {
    pub before: Vec<Range<u64>>,
    pub after: Vec<Range<u64>>,
    /// Whether its commit returned.
    pub returned: bool,
    /// Whether the next save can take the marks.
    pub again: bool,
}

impl Child {
    pub(super) fn new(scenario: &str, dir: &Path, report: &Path, limit: Option<u64>) -> Self {
        Self {
            scenario: scenario.into(),
            dir: dir.into(),
            report: report.into(),
            limit,
        }
    }

    pub(super) fn command(&self) -> anyhow::Result<Command> {
        let mut command = Command::new(this_program()?);
        command.args(["child", "--scenario", &self.scenario]);
        command.arg("--dir").arg(&self.dir);
        command.arg("--report").arg(&self.report);
        if let Some(limit) = self.limit {
            command.arg(format!("--limit={limit}"));
        }
        command.stdin(Stdio::null()).stdout(Stdio::null());
        Ok(command)
    }

    /// Carries out the case that `named` returns for the name of the scenario.
    pub(super) fn run(&self, named: impl Fn(&str) -> Option<&'static Case>) -> anyhow::Result<()> {
        let case = named(&self.scenario).context("unknown scenario")?;
        // As a VMM does: its guest would die with it by this signal.
        signal_hook::flag::register(SIGXFSZ, Arc::new(AtomicBool::new(false)))?;
        let (soft, hard) = getrlimit(Resource::RLIMIT_FSIZE)?;
        let eyes = Eyes::default();
        let verdict = self.report.with_extension("vmm");
        let start = |script| Vmm::start(&self.dir, &verdict, script);
        let mut vmm = case.vmm.map(start).transpose()?;
        let before = Held::now()?;
        if let Some(limit) = self.limit {
            setrlimit(Resource::RLIMIT_FSIZE, limit, hard)?;
        }
        tracee::ask()?;
        // What an error holds is given back with it, before the end.
        let result = (case.scenario.act)(&self.dir, &eyes);
        let served = Served::of(&result);
        let said = match result {
            Ok(()) => Reported::done(),
            Err(error) => Reported::of(&error),
        };
        tracee::pause()?;
        setrlimit(Resource::RLIMIT_FSIZE, soft, hard)?;
        let end_of = |vmm| anyhow::Ok((served, VmmEnd::of(vmm, &verdict, served)?));
        let vmm = vmm.as_mut().map(end_of).transpose()?;
        let report = Report {
            said,
            held: before.still_held()?,
            saves: eyes.saves(),
            vmm,
        };
        Ok(fs::write(&self.report, serde_json::to_vec(&report)?)?)
    }
}

/// Observes a scenario.
#[derive(Default)]
struct Eyes(Mutex<Vec<Seen>>);

struct Seen {
    marks: Arc<DirtyBitmap>,
    before: Vec<Range<u64>>,
    returned: bool,
}

impl CommitObserver for Eyes {
    fn returned(&self) -> anyhow::Result<()> {
        if let Some(last) = self.seen().last_mut() {
            last.returned = true;
        }
        tracee::mark()
    }

    fn saving(&self, marks: &Arc<DirtyBitmap>) {
        self.seen().push(Seen {
            marks: Arc::clone(marks),
            before: marks.runs().collect(),
            returned: false,
        });
    }
}

impl Eyes {
    fn seen(&self) -> MutexGuard<'_, Vec<Seen>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn saves(&self) -> Vec<Save> {
        let save = |seen: &Seen| Save {
            before: seen.before.clone(),
            after: seen.marks.runs().collect(),
            returned: seen.returned,
            again: seen.marks.begin_epoch().is_ok(),
        };
        self.seen().iter().map(save).collect()
    }
}

/// What a process holds, each thing by a name, and how many of them.
#[derive(Debug, Default, PartialEq, Eq)]
struct Held(BTreeMap<String, usize>);

impl Held {
    fn now() -> anyhow::Result<Self> {
        let mut held = Self::default();
        for entry in fs::read_dir("/proc/self/fd")? {
            // The descriptor of this very listing is closed by now, or is about to be.
            match fs::read_link(entry?.path()) {
                Ok(path) if !is_listing(&path) => {
                    held.add(format!("descriptor of {}", path.display()))
                }
                _ => {}
            }
        }
        for entry in fs::read_dir("/proc/self/task")? {
            let name = fs::read_to_string(entry?.path().join("comm"));
            name.into_iter()
                .for_each(|name| held.add(format!("thread {}", name.trim())));
        }
        for line in fs::read_to_string("/proc/self/maps")?.lines() {
            // Mappings without a name, or with one in brackets, belong to the allocator, which
            // keeps freed memory.
            if let Some(at) = line.find('/').or_else(|| line.find("anon_inode")) {
                held.add(format!("mapping of {}", &line[at..]));
            }
        }
        Ok(held)
    }

    fn add(&mut self, what: String) {
        *self.0.entry(what).or_default() += 1;
    }

    /// What there is more of by now. Threads, and rings of the kernel, take a moment to go.
    fn still_held(&self) -> anyhow::Result<Vec<String>> {
        const PATIENCE: Duration = Duration::from_secs(60);
        let goes = |what: &String| what.starts_with("thread") || what.contains("[io_uring]");
        let end = Instant::now() + PATIENCE;
        loop {
            let more = self.more_in(&Self::now()?);
            if !more.iter().any(goes) || Instant::now() > end {
                return Ok(more);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn more_in(&self, now: &Self) -> Vec<String> {
        let before = |what| self.0.get(what).copied().unwrap_or(0);
        let more = now.0.iter().filter(|(what, count)| **count > before(*what));
        more.map(|(what, _)| what.clone()).collect()
    }
}

fn is_listing(path: &Path) -> bool {
    path.starts_with("/proc") && path.ends_with("fd")
}

#[cfg(test)]
mod tests {
    use memory_image::MappedImage;

    use super::*;

    #[test]
    fn a_descriptor_a_thread_and_a_mapping_that_are_held_are_named() {
        let before = Held::now().expect("held");
        let file = tempfile::NamedTempFile::new().expect("a file");
        file.as_file().set_len(4096).expect("a page");
        let image = MappedImage::open_raw(file.path()).expect("a mapping");
        let path = file.path().display().to_string();
        let (end, ended) = std::sync::mpsc::channel::<()>();
        let thread = thread::Builder::new().name("lingers".into());
        let thread = thread.spawn(move || ended.recv()).expect("a thread");
        let more = || before.more_in(&Held::now().expect("held"));
        let start = Instant::now();
        while !more().contains(&"thread lingers".into()) {
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", more());
        }
        for what in ["descriptor", "mapping"] {
            let held = format!("{what} of {path}");
            assert!(more().contains(&held), "{held}: {:?}", more());
        }
        drop((end, image, file));
        let _ = thread.join().expect("no panic");
        let is_ours = |what: &String| what.contains("lingers") || what.contains(&path);
        while more().iter().any(is_ours) {
            assert!(start.elapsed() < Duration::from_secs(60), "{:?}", more());
        }
    }
}
