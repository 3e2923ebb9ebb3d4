//! Crash states made of a recording, mounted and checked one after the other.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::Context;
use file_systems::{FileSystem, LoopDevice};
use nix::fcntl::{FallocateFlags, fallocate};
use scenarios::Scenario;
use scenarios::check::{Next, PostCrashState, Tidying, Violation};

use super::disk::{Mounted, disk};
use super::record::Recording;
use super::states::{PHASES, State};

/// A disk that is given one crash state after the other.
pub(super) struct Replay<'a> {
    fs: &'static FileSystem,
    scenario: &'a Scenario,
    recording: &'a Recording,
    image: File,
    path: PathBuf,
    point: PathBuf,
}

impl<'a> Replay<'a> {
    pub(super) fn new(
        fs: &'static FileSystem,
        scenario: &'a Scenario,
        recording: &'a Recording,
        room: &Path,
    ) -> anyhow::Result<Self> {
        let (path, point) = (room.join("state.img"), room.join("state"));
        fs::create_dir(&point)?;
        let image = File::create_new(&path)?;
        image.set_len(recording.base.size)?;
        Ok(Self {
            fs,
            scenario,
            recording,
            image,
            path,
            point,
        })
    }

    /// Makes a state and looks at it. The error is of this machine's, not the state's.
    pub(super) fn look(
        &self,
        state: &State,
        tidying: Tidying,
    ) -> anyhow::Result<Result<(), Violation>> {
        self.make(state).context("can't make the state")?;
        // Another one for each state: a device that stays open keeps what it read of the state
        // before.
        let device = LoopDevice::over(&self.path, Some(disk(self.fs)?.min_size))?;
        let mounted = match Mounted::new(self.fs, &device, &self.point) {
            Ok(mounted) => mounted,
            Err(error) => {
                return Ok(Err(Violation::Lost(format!(
                    "it cannot be mounted: {error:#}"
                ))));
            }
        };
        let checked = self.check(state, tidying);
        mounted.unmount()?;
        Ok(checked)
    }

    fn make(&self, state: &State) -> io::Result<()> {
        let all = i64::try_from(self.recording.base.size).map_err(io::Error::other)?;
        let nothing = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&self.image, nothing, 0, all)?;
        self.recording.base.write_to(&self.image)?;
        let write = |offset, bytes: &[u8]| self.image.write_all_at(bytes, offset);
        self.recording.log.apply(state, &write)
    }

    fn check(&self, state: &State, tidying: Tidying) -> Result<(), Violation> {
        for (phase, returned) in PHASES.iter().zip(state.returned) {
            let after = PostCrashState {
                dir: &self.point.join(phase),
                returned,
                next: Next::Unknown,
                tidying,
            };
            (self.scenario.check)(&after).map_err(|violation| violation.when(phase))?;
        }
        Ok(())
    }
}
