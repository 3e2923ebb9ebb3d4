//! The state of each disk, and what the guests report about it.

use std::collections::BTreeMap;

use anyhow::{Context, bail};

use crate::finding::Line;
use crate::guest::Disk;
use crate::kind::Kind;

/// Whether a rename on it is atomic over a loss of power.
pub(super) fn promises(kind: Kind) -> bool {
    kind.disk().is_some_and(|disk| disk.survives_power_loss)
}

/// The state of one disk.
pub(super) struct State {
    pub kind: Kind,
    /// The bytes that survived the last cut. The next guest writes to a copy of them.
    pub image: Disk,
    pub said: Said,
    /// Whether the next guest creates the file system again, because the last one did not return
    /// from checking it.
    pub recreate: bool,
    pub flushed: usize,
    pub dropped: usize,
}

/// The guests' reports about one disk.
#[derive(Clone, Debug, Default)]
pub(super) struct Said {
    /// The last commit that was acknowledged, if any was since the file system was made.
    pub acknowledged: Option<u32>,
    pub commits: u64,
    /// Of the cuts by which kind of disk.
    pub after: BTreeMap<Cache, Tally>,
}

/// What the disk does with writes that no flush has followed when the power goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Cache {
    /// Loses or tears some of them: a disk with a volatile cache.
    Volatile,
    /// Keeps them: only the guest's memory is lost.
    None,
}

impl Cache {
    /// By turns.
    pub(super) fn of_cut(round: u32) -> Self {
        if round.is_multiple_of(2) {
            Self::Volatile
        } else {
            Self::None
        }
    }
}

/// What the destination was after the cuts.
#[derive(Clone, Debug, Default)]
pub(super) struct Tally {
    pub old: u32,
    pub new: u32,
    /// Neither, by what there was.
    pub lost: BTreeMap<String, u32>,
}

impl Tally {
    pub(super) fn lost(&self) -> u32 {
        self.lost.values().sum()
    }
}

/// Books a line of the guest's. The kind, if it was a commit.
pub(super) fn take(states: &mut [State], line: Line, cache: Cache) -> anyhow::Result<Option<Kind>> {
    match line {
        Line::Recovered(name, stamp, text) => {
            let said = &mut of(states, &name)?.said;
            let tally = said.after.entry(cache).or_default();
            match (said.acknowledged, stamp) {
                (Some(last), Some(stamp)) if stamp == last => tally.old += 1,
                (Some(last), Some(stamp)) if stamp == last + 1 => tally.new += 1,
                (last, _) => {
                    let last = last.map_or("no".into(), |last| last.to_string());
                    let what = match stamp {
                        Some(stamp) => format!("version {stamp} after {last}"),
                        None => text,
                    };
                    *tally.lost.entry(what).or_default() += 1;
                }
            }
            said.acknowledged = stamp;
        }
        Line::Remade(name) => of(states, &name)?.said.acknowledged = None,
        Line::Committed(name, stamp) => {
            let state = of(states, &name)?;
            state.said.acknowledged = Some(stamp);
            state.said.commits += 1;
            return Ok(Some(state.kind));
        }
        Line::Failed(why) => {
            let of_state = |state: &&mut State| why.starts_with(&format!("{}: ", state.kind));
            match states.iter_mut().find(of_state) {
                // What was left by the cut was mounted, and can't be written to after all.
                Some(state) if !promises(state.kind) => {
                    let tally = state.said.after.entry(cache).or_default();
                    *tally.lost.entry(why).or_default() += 1;
                }
                _ => bail!("{why}"),
            }
        }
        _ => {}
    }
    Ok(None)
}

fn of<'s>(states: &'s mut [State], name: &str) -> anyhow::Result<&'s mut State> {
    let found = states.iter_mut().find(|state| state.kind.name == name);
    found.with_context(|| format!("a line about {name}, which has no disk"))
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use file_systems::FileSystem;

    use super::*;

    #[test]
    fn a_failed_commit_counts_for_exfat_and_ends_the_run_of_ext4() {
        let state = |kind| State {
            kind,
            image: Disk::existing(PathBuf::new(), true),
            said: Said::default(),
            recreate: false,
            flushed: 0,
            dropped: 0,
        };
        let mut states = [FileSystem::EXFAT, FileSystem::EXT4].map(state);
        let failed = |kind: Kind| Line::Failed(format!("{kind}: no space"));
        let taken = take(&mut states, failed(FileSystem::EXFAT), Cache::Volatile);
        assert_eq!(taken.expect("it is booked"), None);
        assert_eq!(states[0].said.after[&Cache::Volatile].lost(), 1);
        let error =
            take(&mut states, failed(FileSystem::EXT4), Cache::Volatile).expect_err("it promises");
        assert_eq!(error.to_string(), "ext4: no space");
        take(&mut states, Line::Failed("no port".into()), Cache::None)
            .expect_err("a line of no disk");
    }
}
