//! Commits with a mutant, which must be detected, and one without, which must pass.

use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;

use atomic_file::{CommitError, CommitStep, Leftover};
use dirty_bitmap::{DirtyBitmap, Epoch};
use scenarios::check::{PostCrashState, Violation};
use scenarios::child::PAGE;
use scenarios::commits::{DEST, RAM, full};
use scenarios::ram::Stamped;
use scenarios::{CommitObserver, Scenario};

use super::case::Case;

/// One without a mutant, which must not be blamed.
pub(super) static CONTROL: Case = mutant("by-hand", "nothing is wrong", |dir, seen| {
    commit(dir, seen, None)
});

pub(super) static ALL: &[Case] = &[
    mutant(
        "believes-in-fsync",
        "what the sync of the file says is ignored",
        |dir, seen| commit(dir, seen, Some(Mutant::IgnoresSync)),
    ),
    mutant(
        "syncs-again",
        "a sync that failed is made again, and that one believed",
        |dir, seen| commit(dir, seen, Some(Mutant::SyncsAgain)),
    ),
    mutant(
        "forgets-first",
        "the marks are forgotten before the commit",
        |dir, seen| commit(dir, seen, Some(Mutant::ForgetsFirst)),
    ),
    mutant(
        "keeps-descriptor",
        "the stage is not closed after an error",
        |dir, seen| commit(dir, seen, Some(Mutant::KeepsDescriptor)),
    ),
    mutant(
        "keeps-stage",
        "the stage is not removed after an error",
        |dir, seen| commit(dir, seen, Some(Mutant::KeepsStage)),
    ),
    mutant(
        "denies-rename",
        "the directory's sync fails, and it says that nothing was replaced",
        |dir, seen| commit(dir, seen, Some(Mutant::DeniesRename)),
    ),
    mutant(
        "believes-rename",
        "a rename that says it failed is taken for one that did",
        |dir, seen| commit(dir, seen, Some(Mutant::BelievesRename)),
    ),
    mutant(
        "takes-short",
        "a short write is taken for a whole one",
        |dir, seen| commit(dir, seen, Some(Mutant::TakesShort)),
    ),
    mutant(
        "in-place",
        "the destination itself is written",
        |dir, seen| commit(dir, seen, Some(Mutant::InPlace)),
    ),
];

type Act = fn(&Path, &dyn CommitObserver) -> anyhow::Result<()>;

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

fn check(after: &PostCrashState) -> Result<(), Violation> {
    after.version(DEST, RAM, &after.allowed(1, 2)).map(drop)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
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

/// A commit by hand that is right, but for the mutant.
fn commit(dir: &Path, observer: &dyn CommitObserver, mutant: Option<Mutant>) -> anyhow::Result<()> {
    let live = DirtyBitmap::new(0, RAM, PAGE)?;
    live.set_range(0, RAM)?;
    let live = Arc::new(live);
    observer.saving(&live);
    let mut epoch = Some(live.begin_epoch()?);
    let mut forget = || epoch.take().map_or(Ok(()), Epoch::release);
    if mutant == Some(Mutant::ForgetsFirst) {
        forget()?;
    }
    replace(dir, mutant)?;
    forget()?;
    observer.returned()
}

fn replace(dir: &Path, mutant: Option<Mutant>) -> Result<(), CommitError> {
    let has = |this| mutant == Some(this);
    let dest = dir.join(DEST);
    let stage = match mutant {
        Some(Mutant::InPlace) => dest.clone(),
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
        leftover: if has(Mutant::KeepsStage) {
            None
        } else {
            remove()
        },
    };
    let opened = File::open(dir).and_then(|dir| Ok((dir, File::create(&stage)?)));
    let (dir, file) = opened.map_err(|error| not(CommitStep::Check, error))?;
    let written = write(&file, mutant).and_then(|()| match file.sync_all() {
        Err(_) if has(Mutant::IgnoresSync) => Ok(()),
        Err(_) if has(Mutant::SyncsAgain) => file.sync_all(),
        synced => synced,
    });
    if let Err(error) = written {
        if has(Mutant::KeepsDescriptor) {
            mem::forget(file);
        }
        return Err(not(CommitStep::Sync, error));
    }
    if let Err(rename) = fs::rename(&stage, &dest) {
        match fs::symlink_metadata(&stage) {
            _ if has(Mutant::BelievesRename) => return Err(not(CommitStep::Rename, rename)),
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
    dir.sync_all().map_err(|source| match mutant {
        Some(Mutant::DeniesRename) => not(CommitStep::Sync, source),
        _ => CommitError::ReplacedDurabilityUnknown {
            dest: dest.clone(),
            source,
            leftover: None,
        },
    })
}

fn write(file: &File, mutant: Option<Mutant>) -> io::Result<()> {
    const CHUNK: u64 = 256 << 10;
    for at in (0..RAM).step_by(CHUNK as usize) {
        let bytes = Stamped::new(2, RAM).bytes(at..at + CHUNK);
        match mutant {
            Some(Mutant::TakesShort) => file.write_at(&bytes, at).map(drop)?,
            _ => file.write_all_at(&bytes, at)?,
        }
    }
    Ok(())
}
