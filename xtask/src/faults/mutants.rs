//! Commits with a mistake in them, which must be found out, and one with none, which must not.

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use atomic_file::{CommitError, CommitStep, Leftover};
use dirty_bitmap::{DirtyBitmap, Epoch};

use super::scenarios::Case;
use crate::crash::check::{Aftermath, Fault};
use crate::crash::scenarios::commits::{DEST, RAM, full};
use crate::crash::scenarios::{Scenario, Witness};
use crate::fs_matrix::child::PAGE;
use crate::ram::Stamped;

/// One without a mistake, which must not be blamed.
pub static CONTROL: Case = mutant("by-hand", "nothing is wrong", |dir, seen| {
    commit(dir, seen, None)
});

pub static ALL: &[Case] = &[
    mutant(
        "believes-in-fsync",
        "what the sync of the file says is ignored",
        |dir, seen| commit(dir, seen, Some(Mistake::IgnoresSync)),
    ),
    mutant(
        "syncs-again",
        "a sync that failed is made again, and that one believed",
        |dir, seen| commit(dir, seen, Some(Mistake::SyncsAgain)),
    ),
    mutant(
        "forgets-first",
        "the marks are forgotten before the commit",
        |dir, seen| commit(dir, seen, Some(Mistake::ForgetsFirst)),
    ),
    mutant(
        "keeps-descriptor",
        "the stage is not closed after an error",
        |dir, seen| commit(dir, seen, Some(Mistake::KeepsDescriptor)),
    ),
    mutant(
        "keeps-stage",
        "the stage is not removed after an error",
        |dir, seen| commit(dir, seen, Some(Mistake::KeepsStage)),
    ),
    mutant(
        "denies-rename",
        "the directory's sync fails, and it says that nothing was replaced",
        |dir, seen| commit(dir, seen, Some(Mistake::DeniesRename)),
    ),
    mutant(
        "believes-rename",
        "a rename that says it failed is taken for one that did",
        |dir, seen| commit(dir, seen, Some(Mistake::BelievesRename)),
    ),
    mutant(
        "takes-short",
        "a short write is taken for a whole one",
        |dir, seen| commit(dir, seen, Some(Mistake::TakesShort)),
    ),
    mutant(
        "in-place",
        "the destination itself is written",
        |dir, seen| commit(dir, seen, Some(Mistake::InPlace)),
    ),
];

type Act = fn(&Path, &dyn Witness) -> anyhow::Result<()>;

const fn mutant(name: &'static str, about: &'static str, act: Act) -> Case {
    Case {
        scenario: Scenario {
            name,
            about,
            prepare: |dir| full(dir, 1),
            act,
            check,
        },
        threads: false,
        lacks: None,
    }
}

fn check(after: &Aftermath) -> Result<(), Fault> {
    after.version(DEST, RAM, &after.allowed(1, 2)).map(drop)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    IgnoresSync,
    SyncsAgain,
    ForgetsFirst,
    KeepsDescriptor,
    KeepsStage,
    DeniesRename,
    BelievesRename,
    TakesShort,
    InPlace,
}

/// A commit by hand that is right, but for the mistake.
fn commit(dir: &Path, witness: &dyn Witness, mistake: Option<Mistake>) -> anyhow::Result<()> {
    let live = DirtyBitmap::new(0, RAM, PAGE)?;
    live.set_range(0, RAM)?;
    let live = Arc::new(live);
    witness.saving(&live);
    let mut epoch = Some(live.begin_epoch()?);
    let mut forget = || epoch.take().map_or(Ok(()), Epoch::release);
    if mistake == Some(Mistake::ForgetsFirst) {
        forget()?;
    }
    replace(dir, mistake)?;
    forget()?;
    witness.returned()
}

fn replace(dir: &Path, mistake: Option<Mistake>) -> Result<(), CommitError> {
    let has = |this| mistake == Some(this);
    let dest = dir.join(DEST);
    let stage = match mistake {
        Some(Mistake::InPlace) => dest.clone(),
        _ => dir.join(".atomic-file-00000000-0.stage"),
    };
    let remove = || match fs::remove_file(&stage) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Some(Leftover {
            path: stage.clone(),
            source,
        }),
        _ => None,
    };
    let not = |step, source| CommitError::NotReplaced {
        dest: dest.clone(),
        step,
        source,
        leftover: if has(Mistake::KeepsStage) {
            None
        } else {
            remove()
        },
    };
    let opened = File::open(dir).and_then(|dir| Ok((dir, File::create(&stage)?)));
    let (dir, file) = opened.map_err(|error| not(CommitStep::Check, error))?;
    let written = write(&file, mistake).and_then(|()| match file.sync_all() {
        Err(_) if has(Mistake::IgnoresSync) => Ok(()),
        Err(_) if has(Mistake::SyncsAgain) => file.sync_all(),
        synced => synced,
    });
    if let Err(error) = written {
        if has(Mistake::KeepsDescriptor) {
            mem::forget(file);
        }
        return Err(not(CommitStep::Sync, error));
    }
    if let Err(rename) = fs::rename(&stage, &dest) {
        match fs::symlink_metadata(&stage) {
            _ if has(Mistake::BelievesRename) => return Err(not(CommitStep::Rename, rename)),
            Ok(_) => return Err(not(CommitStep::Rename, rename)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(CommitError::Unknown {
                    dest,
                    rename,
                    source,
                });
            }
        }
    }
    dir.sync_all().map_err(|source| match mistake {
        Some(Mistake::DeniesRename) => not(CommitStep::Sync, source),
        _ => CommitError::ReplacedDurabilityUnknown {
            dest: dest.clone(),
            source,
            leftover: None,
        },
    })
}

fn write(file: &File, mistake: Option<Mistake>) -> io::Result<()> {
    const CHUNK: u64 = 256 << 10;
    for at in (0..RAM).step_by(CHUNK as usize) {
        let bytes = Stamped::new(2, RAM).bytes(at..at + CHUNK);
        match mistake {
            Some(Mistake::TakesShort) => file.write_at(&bytes, at).map(drop)?,
            _ => file.write_all_at(&bytes, at)?,
        }
    }
    Ok(())
}
