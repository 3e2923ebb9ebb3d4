//! One scenario on one file system: recorded, then every state checked.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use atomic_file::{AddError, OpenError};
use file_systems::FileSystem;
use harness::interrupt::Interrupt;
use scenarios::Scenario;
use scenarios::check::{Tidying, Violation};

use super::disk::promises;
use super::record::{self, record};
use super::replay::Replay;
use super::saved_recording::SavedRecording;

/// How states are chosen, and where recordings stay.
pub(super) struct Settings<'a> {
    pub seed: u64,
    pub limit: usize,
    pub keep: bool,
    pub home: &'a Path,
    pub interrupt: &'a Interrupt,
}

pub(super) struct Job {
    pub fs: &'static FileSystem,
    pub scenario: &'static Scenario,
    /// The first violation is enough.
    pub mutant: bool,
}

/// What came of a job.
pub(super) struct Done {
    pub fs: &'static FileSystem,
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
    pub first: Option<(usize, Violation)>,
    pub recording: Duration,
    pub checking: Duration,
}

impl Done {
    pub(super) fn violations(&self) -> usize {
        self.lost + self.torn + self.left
    }
}

impl Job {
    /// In `room`, a directory that is made for it and removed. `None` where the file system lacks
    /// what the scenario is about, which is said.
    pub(super) fn run(&self, settings: &Settings, room: &Path) -> anyhow::Result<Option<Done>> {
        fs::create_dir(room)?;
        let done = match self.run_in(settings, room) {
            Err(error) if !promises(self.fs) && is_refusal(&error) => {
                println!("{} on {}: {error}", self.scenario.name, self.fs.name);
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
            let Err(violation) = replay.look(state, tidying(number))? else {
                continue;
            };
            match violation {
                Violation::Lost(_) => done.lost += 1,
                Violation::Torn(_) => done.torn += 1,
                Violation::Left(_) => done.left += 1,
            }
            done.first.get_or_insert((number, violation));
            if self.mutant {
                break;
            }
        }
        done.checking = start.elapsed() - recorded;
        let failed = done.violations() > 0 && promises(self.fs) && !self.mutant;
        if failed || settings.keep {
            let kept = SavedRecording::new(settings.home, self.fs, self.scenario.name);
            let log = room.join(record::LOG);
            kept.save(&recording.base, &log, settings.seed, settings.limit)?;
        }
        Ok(done)
    }
}

/// Returns whether the library refused because the file system does not support the operation.
fn is_refusal(error: &anyhow::Error) -> bool {
    let open = error.downcast_ref();
    matches!(open, Some(OpenError::NoClobberUnsupported { .. })) || error.is::<AddError>()
}

/// Who clears up after the state of this number.
pub(super) fn tidying(number: usize) -> Tidying {
    match number % 2 {
        0 => Tidying::Recover,
        _ => Tidying::NextWriter,
    }
}
