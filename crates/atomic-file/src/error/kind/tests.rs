use std::error::Error;
use std::path::PathBuf;

use super::*;
use crate::error::CommitStep;
use crate::{AtomicWriter, Attribute};

const DENIED: ErrorKind = ErrorKind::PermissionDenied;
const FULL: ErrorKind = ErrorKind::StorageFull;

fn path() -> PathBuf {
    "a file".into()
}

fn full() -> io::Error {
    FULL.into()
}

fn leftover() -> Leftover {
    Leftover {
        path: path(),
        source: full(),
    }
}

fn sweep_error() -> SweepError {
    SweepError {
        operation: "list",
        path: path(),
        source: full(),
    }
}

/// Fails unless the `io::Error` has this kind and contains the error.
#[track_caller]
fn assert_kept<E: Error + Send + Sync + 'static>(error: E, kind: ErrorKind)
where
    io::Error: From<E>,
{
    let text = error.to_string();
    let reason = error.source().map(ToString::to_string);
    let error = io::Error::from(error);
    assert_eq!(error.kind(), kind, "{text}");
    assert_eq!(error.to_string(), text);
    assert_eq!(error.source().map(ToString::to_string), reason, "{text}");
    let kept = error.downcast::<E>().expect("the same error");
    assert_eq!(kept.to_string(), text);
}

#[test]
fn commit_errors_keep_their_kind_and_state_the_result() {
    let cases = [
        (
            CommitError::NotReplaced {
                dest: path(),
                step: CommitStep::Sync,
                source: full(),
                leftover: None,
            },
            FULL,
            Some(false),
        ),
        (
            CommitError::DestinationChanged {
                dest: path(),
                leftover: Some(leftover()),
            },
            ErrorKind::Other,
            Some(false),
        ),
        (
            CommitError::ReplacedDurabilityUnknown {
                dest: path(),
                source: full(),
                leftover: None,
            },
            FULL,
            Some(true),
        ),
        (
            CommitError::ReplacedCleanupFailed {
                dest: path(),
                source: leftover(),
            },
            FULL,
            Some(true),
        ),
        (
            CommitError::Unknown {
                dest: path(),
                rename: full(),
                source: DENIED.into(),
            },
            FULL,
            None,
        ),
    ];
    for (error, kind, replaced) in cases {
        assert_eq!(error.replaced(), replaced, "{error}");
        assert_kept(error, kind);
    }
}

#[test]
fn group_errors_keep_their_kind_and_state_the_result() {
    let cases = [
        (
            GroupCommitError::NothingReplaced {
                step: CommitStep::Record,
                path: path(),
                source: full(),
                leftovers: vec![leftover()],
            },
            Some(false),
        ),
        (
            GroupCommitError::RollForwardPending {
                path: path(),
                source: full(),
            },
            None,
        ),
        (
            GroupCommitError::DestinationTaken {
                path: path(),
                owner: 1000,
                source: full(),
            },
            None,
        ),
        (
            GroupCommitError::Unknown {
                record: path(),
                rename: full(),
                source: DENIED.into(),
            },
            None,
        ),
        (
            GroupCommitError::ReplacedDurabilityUnknown {
                dir: path(),
                source: full(),
            },
            Some(true),
        ),
        (
            GroupCommitError::ReplacedRecordLeft {
                record: path(),
                source: full(),
            },
            Some(true),
        ),
    ];
    for (error, replaced) in cases {
        assert_eq!(error.replaced(), replaced, "{error}");
        assert_kept(error, FULL);
    }
}

#[test]
fn open_errors_keep_their_kind() {
    let path = path();
    let not_preserved = || NotPreserved {
        attribute: Attribute::Owner,
        source: DENIED.into(),
    };
    let is_dir = |is_dir| OpenError::NotAFile {
        path: "a file".into(),
        is_dir,
    };
    #[rustfmt::skip]
    let cases = [
        (OpenError::NoFileName { path: path.clone() }, ErrorKind::InvalidInput),
        (OpenError::ReservedName { path: path.clone() }, ErrorKind::InvalidInput),
        (OpenError::OpenDirectory { path: path.clone(), source: full() }, FULL),
        (is_dir(true), ErrorKind::IsADirectory),
        (is_dir(false), ErrorKind::InvalidInput),
        (
            OpenError::DanglingSymlink { path: path.clone(), target: path.clone() },
            ErrorKind::NotFound,
        ),
        (OpenError::UntrustedSymlink { path: path.clone(), owner: 1000 }, DENIED),
        (
            OpenError::MagicLink { path: path.clone(), link: path.clone() },
            ErrorKind::InvalidInput,
        ),
        (OpenError::AlreadyExists { path: path.clone() }, ErrorKind::AlreadyExists),
        (OpenError::DestinationChanged { path: path.clone() }, ErrorKind::Other),
        (OpenError::NotPreserved { path: path.clone(), source: not_preserved() }, DENIED),
        (
            OpenError::NotWritable { path: path.clone(), dir: path.clone(), source: full() },
            FULL,
        ),
        (
            OpenError::CrossFileSystem { dest_dir: path.clone(), staging_dir: path.clone() },
            ErrorKind::CrossesDevices,
        ),
        (
            OpenError::NoClobberUnsupported { path: path.clone(), source: DENIED.into() },
            ErrorKind::Unsupported,
        ),
        (OpenError::Leftover { path: path.clone(), source: leftover() }, FULL),
        (
            OpenError::Recover {
                path: path.clone(),
                source: RecoverError::Sweep(sweep_error()),
            },
            FULL,
        ),
        (OpenError::io("list", &path, full()), FULL),
    ];
    for (error, kind) in cases {
        assert_kept(error, kind);
    }
    let obstacles = [
        (Obstacle::MountPoint, ErrorKind::ResourceBusy),
        (Obstacle::Immutable, DENIED),
        (Obstacle::AppendOnly, DENIED),
        (Obstacle::Swap, DENIED),
        (Obstacle::ImmutableDirectory, DENIED),
        (Obstacle::AppendOnlyDirectory, DENIED),
        (Obstacle::OthersInStickyDirectory { owner: 1000 }, DENIED),
    ];
    for (obstacle, kind) in obstacles {
        let path = path.clone();
        assert_kept(OpenError::CannotReplace { path, obstacle }, kind);
    }
}

#[test]
fn recovery_errors_keep_their_kind() {
    let (dest, record, stage) = (path(), path(), path());
    let directory = || RecoverError::DestinationIsDirectory {
        dest: path(),
        record: path(),
    };
    #[rustfmt::skip]
    let cases = [
        (
            RecoverError::Damaged { path: path(), problem: "torn" },
            ErrorKind::InvalidData,
        ),
        (directory(), ErrorKind::IsADirectory),
        (
            RecoverError::DestinationTaken {
                dest: dest.clone(),
                owner: 1000,
                record: record.clone(),
            },
            DENIED,
        ),
        (
            RecoverError::Stuck {
                dir: path(),
                first: Box::new(directory()),
                others: Vec::new(),
                report: Box::default(),
            },
            ErrorKind::IsADirectory,
        ),
        (
            RecoverError::StageChanged { stage, dest, record: record.clone() },
            ErrorKind::InvalidData,
        ),
        (
            RecoverError::StagesLost {
                lost: vec![path()],
                staged: Vec::new(),
                in_place: Vec::new(),
                record,
            },
            ErrorKind::NotFound,
        ),
        (RecoverError::Sweep(sweep_error()), FULL),
        (
            RecoverError::Io { operation: "read", path: path(), source: full() },
            FULL,
        ),
    ];
    for (error, kind) in cases {
        assert_kept(error, kind);
    }
    assert_kept(sweep_error(), FULL);
    assert_kept(leftover(), FULL);
}

#[test]
fn a_refused_member_is_returned_in_the_io_error() {
    let dir = tempfile::tempdir().unwrap();
    let dest = dir.path().join("dest");
    let kinds = [
        (Ineligible::SameDestination, ErrorKind::InvalidInput),
        (Ineligible::NoLocks, ErrorKind::Unsupported),
    ];
    for (reason, kind) in kinds {
        let writer = Box::new(AtomicWriter::open(&dest).unwrap());
        let error = io::Error::from(AddError { reason, writer });
        assert_eq!(error.kind(), kind);
        let AddError { writer, .. } = error.downcast().unwrap();
        assert_eq!(writer.dest_path(), dest);
    }
}
