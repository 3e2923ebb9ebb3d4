//! One scenario on one file system: recorded, then every state checked.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use atomic_file::{AddError, OpenError};

use super::check::{Fault, Tidying};
use super::disk::FileSystem;
use super::kept::Kept;
use super::record::{self, record};
use super::replay::Replay;
use super::scenarios::Scenario;
use harness::interrupt::Interrupt;

/// How states are chosen, and where recordings stay.
pub struct Settings<'a> {
    pub seed: u64,
    pub limit: usize,
    pub keep: bool,
    pub home: &'a Path,
    pub interrupt: &'a Interrupt,
}

pub struct Job {
    pub fs: FileSystem,
    pub scenario: &'static Scenario,
    /// The first fault is enough.
    pub mutant: bool,
}

/// What came of a job.
pub struct Done {
    pub fs: FileSystem,
    pub scenario: &'static str,
    pub mutant: bool,
    /// Entries of the log, and how many of them are flushes.
    pub entries: usize,
    pub flushes: usize,
    pub states: usize,
    pub lost: usize,
    pub torn: usize,
    pub left: usize,
    /// With the number of its state.
    pub first: Option<(usize, Fault)>,
    pub recording: Duration,
    pub checking: Duration,
}

impl Done {
    pub fn faults(&self) -> usize {
        self.lost + self.torn + self.left
    }
}

impl Job {
    /// In `room`, a directory that is made for it and removed. `None` where the file system lacks what the scenario is about, which is said.
    pub fn run(&self, settings: &Settings, room: &Path) -> anyhow::Result<Option<Done>> {
        fs::create_dir(room)?;
        let done = match self.run_in(settings, room) {
            Err(error) if !self.fs.promises() && is_refusal(&error) => {
                println!("{} on {}: {error}", self.scenario.name, self.fs.name());
                None
            }
            done => Some(done?),
        };
        fs::remove_dir_all(room)?;
        Ok(done)
    }

    fn run_in(&self, settings: &Settings, room: &Path) -> anyhow::Result<Done> {
        let start = Instant::now();
        let recording = record(
            self.fs,
            self.scenario,
            self.mutant,
            room,
            settings.interrupt,
        )?;
        let recorded = start.elapsed();
        let states = recording.log.states(settings.seed, settings.limit);
        let replay = Replay::new(self.fs, self.scenario, &recording, room)?;
        let mut done = Done {
            fs: self.fs,
            scenario: self.scenario.name,
            mutant: self.mutant,
            entries: recording.log.len(),
            flushes: recording.log.flushes(),
            states: 0,
            lost: 0,
            torn: 0,
            left: 0,
            first: None,
            recording: recorded,
            checking: Duration::ZERO,
        };
        for (number, state) in states.iter().enumerate() {
            settings.interrupt.check()?;
            done.states += 1;
            let Err(fault) = replay.look(state, tidying(number))? else {
                continue;
            };
            match fault {
                Fault::Lost(_) => done.lost += 1,
                Fault::Torn(_) => done.torn += 1,
                Fault::Left(_) => done.left += 1,
            }
            done.first.get_or_insert((number, fault));
            if self.mutant {
                break;
            }
        }
        done.checking = start.elapsed() - recorded;
        let failed = done.faults() > 0 && self.fs.promises() && !self.mutant;
        if failed || settings.keep {
            let kept = Kept::new(settings.home, self.fs, self.scenario.name);
            let log = room.join(record::LOG);
            kept.save(&recording.base, &log, settings.seed, settings.limit)?;
        }
        Ok(done)
    }
}

/// The library found out that the file system can't do it.
fn is_refusal(error: &anyhow::Error) -> bool {
    let open = error.downcast_ref();
    matches!(open, Some(OpenError::NoClobberUnsupported { .. })) || error.is::<AddError>()
}

/// Who clears up after the state of this number.
pub fn tidying(number: usize) -> Tidying {
    match number % 2 {
        0 => Tidying::Recover,
        _ => Tidying::NextWriter,
    }
}
