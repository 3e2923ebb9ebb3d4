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
use super::serve::ZEROS_FOR_ERRORS;

/// The commit without a mutant, in which no violation may be found.
pub(super) static CONTROL: Case = mutant(
    "by-hand",
    "a correct commit without the library",
    |dir, seen| commit(dir, seen, None),
);

pub(super) static ALL: &[Case] = &[
    mutant(
        "ignore-sync-error",
        "an error of the file's sync is ignored",
        |dir, seen| commit(dir, seen, Some(Mutant::IgnoreSyncError)),
    ),
    mutant(
        "retry-sync",
        "a failed sync is repeated, and the second result is trusted",
        |dir, seen| commit(dir, seen, Some(Mutant::RetrySync)),
    ),
    mutant(
        "release-before-commit",
        "the marks are released before the commit",
        |dir, seen| commit(dir, seen, Some(Mutant::ReleaseBeforeCommit)),
    ),
    mutant(
        "leak-descriptor",
        "the staged file is not closed after an error",
        |dir, seen| commit(dir, seen, Some(Mutant::LeakDescriptor)),
    ),
    mutant(
        "leave-staged-file",
        "the staged file is not removed after an error",
        |dir, seen| commit(dir, seen, Some(Mutant::LeaveStagedFile)),
    ),
    mutant(
        "report-not-replaced",
        "if the directory's sync fails, the error states that nothing was replaced",
        |dir, seen| commit(dir, seen, Some(Mutant::ReportNotReplaced)),
    ),
    mutant(
        "trust-rename-error",
        "a rename that reports an error is assumed to have had no effect",
        |dir, seen| commit(dir, seen, Some(Mutant::TrustRenameError)),
    ),
    mutant(
        "accept-short-write",
        "a short write is accepted as complete",
        |dir, seen| commit(dir, seen, Some(Mutant::AcceptShortWrite)),
    ),
    mutant(
        "write-in-place",
        "the destination is overwritten in place",
        |dir, seen| commit(dir, seen, Some(Mutant::WriteInPlace)),
    ),
    ZEROS_FOR_ERRORS,
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
        vmm: None,
    }
}

fn check(after: &PostCrashState) -> Result<(), Violation> {
    after.version(DEST, RAM, &after.allowed(1, 2)).map(drop)
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    IgnoreSyncError,
    RetrySync,
    ReleaseBeforeCommit,
    LeakDescriptor,
    LeaveStagedFile,
    ReportNotReplaced,
    TrustRenameError,
    AcceptShortWrite,
    WriteInPlace,
}

/// Commits without the library, correctly except for the mutant.
fn commit(dir: &Path, observer: &dyn CommitObserver, mutant: Option<Mutant>) -> anyhow::Result<()> {
    let live = DirtyBitmap::new(0, RAM, PAGE)?;
    live.mark_range(0, RAM)?;
    let live = Arc::new(live);
    observer.saving(&live);
    let mut epoch = Some(live.begin_epoch()?);
    let mut release = || epoch.take().map_or(Ok(()), Epoch::release);
    if mutant == Some(Mutant::ReleaseBeforeCommit) {
        release()?;
    }
    replace(dir, mutant)?;
    release()?;
    observer.returned()
}

fn replace(dir: &Path, mutant: Option<Mutant>) -> Result<(), CommitError> {
    let has = |this| mutant == Some(this);
    let dest = dir.join(DEST);
    let stage = match mutant {
        Some(Mutant::WriteInPlace) => dest.clone(),
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
        leftover: if has(Mutant::LeaveStagedFile) {
            None
        } else {
            remove()
        },
    };
    let opened = File::open(dir).and_then(|dir| Ok((dir, File::create(&stage)?)));
    let (dir, file) = opened.map_err(|error| not(CommitStep::Check, error))?;
    let written = write(&file, mutant).and_then(|()| match file.sync_all() {
        Err(_) if has(Mutant::IgnoreSyncError) => Ok(()),
        Err(_) if has(Mutant::RetrySync) => file.sync_all(),
        synced => synced,
    });
    if let Err(error) = written {
        if has(Mutant::LeakDescriptor) {
            mem::forget(file);
        }
        return Err(not(CommitStep::Sync, error));
    }
    if let Err(rename) = fs::rename(&stage, &dest) {
        match fs::symlink_metadata(&stage) {
            _ if has(Mutant::TrustRenameError) => return Err(not(CommitStep::Rename, rename)),
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
        Some(Mutant::ReportNotReplaced) => not(CommitStep::Sync, source),
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
            Some(Mutant::AcceptShortWrite) => file.write_at(&bytes, at).map(drop)?,
            _ => file.write_all_at(&bytes, at)?,
        }
    }
    Ok(())
}
