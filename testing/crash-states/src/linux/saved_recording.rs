//! Recordings that stay, so that a state can be looked at again.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::Context;
use file_systems::FileSystem;
use scenarios::write_log;

use super::disk::disk;
use super::record::{Base, Recording};
use super::states::{Log, State};

/// Where a recording of a scenario on a file system stays.
pub(super) struct SavedRecording {
    dir: PathBuf,
    fs: &'static FileSystem,
}

impl SavedRecording {
    pub(super) fn new(home: &Path, fs: &'static FileSystem, scenario: &str) -> Self {
        Self {
            dir: home.join(format!("{}-{scenario}", fs.name)),
            fs,
        }
    }

    /// Keeps what the log at `log` was recorded over, and what its states are chosen by.
    pub(super) fn save(
        &self,
        base: &Base,
        log: &Path,
        seed: u64,
        limit: usize,
    ) -> anyhow::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let image = File::create(self.dir.join("disk.img"))?;
        image.set_len(base.size)?;
        base.write_to(&image)?;
        fs::copy(log, self.dir.join("log"))?;
        Ok(fs::write(
            self.dir.join("states"),
            format!("{seed} {limit}\n"),
        )?)
    }

    /// The recording and its states.
    pub(super) fn load(&self) -> anyhow::Result<(Recording, Vec<State>)> {
        let dir = self.dir.display();
        let chosen = fs::read_to_string(self.dir.join("states")).with_context(|| {
            format!("{dir} has no recording: a run keeps one if a state fails, or with --keep")
        })?;
        let numbers = chosen.trim_end().split_once(' ');
        let (seed, limit) = numbers.with_context(|| format!("{dir}/states: {chosen:?}"))?;
        let entries = write_log::read(&File::open(self.dir.join("log"))?)?;
        let recording = Recording {
            base: Base::of(&self.dir.join("disk.img"))?,
            log: Log::new(entries, disk(self.fs)?.min_size),
        };
        let states = recording.log.states(seed.parse()?, limit.parse()?);
        Ok((recording, states))
    }
}
