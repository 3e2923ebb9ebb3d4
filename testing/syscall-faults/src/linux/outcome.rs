//! What the library said of a commit that failed, in the words of the check.

use atomic_file::{AddError, CommitError, GroupCommitError, OpenError, RecoverError};
use lazy_restore::LazyError;
use live_snapshot::{LiveError, UffdCheckpointError, UffdTrackerError};
use memory_image::{
    ChainError, MapError, MergeError, OpenImageError, ReadImageError, RestoreError, VerifyError,
};
use memory_writer::SnapshotError;
use scenarios::check::Next;
use serde::{Deserialize, Serialize};

use super::serve::ServeFailure;

/// What a scenario ended with.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub(super) struct Reported {
    pub next: ReportedNext,
    /// That something was left in the directory.
    pub left: bool,
    /// The error and its causes.
    pub text: String,
}

#[derive(Clone, Copy, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub(super) enum ReportedNext {
    /// Everything was done, and there is no next one.
    All,
    Not,
    Done,
    /// The library does not know.
    Unknown,
    /// No error of the library's.
    Strange,
}

impl Reported {
    pub(super) fn done() -> Self {
        Self {
            next: ReportedNext::All,
            left: false,
            text: "ok".into(),
        }
    }

    pub(super) fn of(error: &anyhow::Error) -> Self {
        let (next, left) = of_any(error).unwrap_or((ReportedNext::Strange, false));
        Self {
            next,
            left,
            text: format!("{error:#}"),
        }
    }

    /// What that makes of the commit after those that returned.
    pub(super) fn next(&self) -> Next {
        match self.next {
            ReportedNext::All | ReportedNext::Not => Next::Not,
            ReportedNext::Done => Next::Done,
            ReportedNext::Unknown | ReportedNext::Strange => Next::Unknown,
        }
    }
}

type Verdict = (ReportedNext, bool);

const NOT: Verdict = (ReportedNext::Not, false);

fn of_any(error: &anyhow::Error) -> Option<Verdict> {
    if let Some(error) = error.downcast_ref::<CommitError>() {
        return Some(of_commit(error));
    }
    if let Some(error) = error.downcast_ref::<GroupCommitError>() {
        return Some(of_group(error));
    }
    if let Some(error) = error.downcast_ref::<OpenError>() {
        return Some(of_open(error));
    }
    if let Some(error) = error.downcast_ref::<SnapshotError>() {
        return Some(of_snapshot(error));
    }
    if let Some(error) = error.downcast_ref::<LiveError>() {
        return Some(match error {
            LiveError::Write(error) => of_snapshot(error),
            _ => NOT,
        });
    }
    if let Some(error) = error.downcast_ref::<MergeError>() {
        return Some(match error {
            MergeError::Write(error) => of_snapshot(error),
            _ => NOT,
        });
    }
    if error.is::<RecoverError>() {
        // The next recovery goes on where it stopped.
        return Some((ReportedNext::Unknown, true));
    }
    let of_tracker = error.is::<UffdTrackerError>() || error.is::<UffdCheckpointError>();
    let of_server = error.is::<ServeFailure>() || error.is::<LazyError>();
    let of_file = error.is::<AddError>() || error.is::<std::io::Error>();
    (is_of_reading(error) || of_tracker || of_server || of_file).then_some(NOT)
}

/// Returns whether the error is one of an operation that only reads images.
fn is_of_reading(error: &anyhow::Error) -> bool {
    error.is::<OpenImageError>()
        || error.is::<ChainError>()
        || error.is::<ReadImageError>()
        || error.is::<MapError>()
        || error.is::<RestoreError>()
        || error.is::<VerifyError>()
}

fn of_snapshot(error: &SnapshotError) -> Verdict {
    match error {
        SnapshotError::Commit(error) => of_commit(error),
        SnapshotError::Open(error) => of_open(error),
        _ => NOT,
    }
}

fn of_open(error: &OpenError) -> Verdict {
    (
        ReportedNext::Not,
        matches!(error, OpenError::Leftover { .. }),
    )
}

fn of_commit(error: &CommitError) -> Verdict {
    match error {
        CommitError::NotReplaced { leftover, .. }
        | CommitError::DestinationChanged { leftover, .. } => {
            (ReportedNext::Not, leftover.is_some())
        }
        CommitError::ReplacedDurabilityUnknown { leftover, .. } => {
            (ReportedNext::Done, leftover.is_some())
        }
        CommitError::ReplacedCleanupFailed { .. } => (ReportedNext::Done, true),
        CommitError::Unknown { .. } => (ReportedNext::Unknown, true),
        _ => (ReportedNext::Strange, false),
    }
}

/// As it is after a recovery.
fn of_group(error: &GroupCommitError) -> Verdict {
    match error {
        GroupCommitError::NothingReplaced { leftovers, .. } => {
            (ReportedNext::Not, !leftovers.is_empty())
        }
        GroupCommitError::RollForwardPending { .. }
        | GroupCommitError::ReplacedDurabilityUnknown { .. }
        | GroupCommitError::ReplacedRecordLeft { .. } => (ReportedNext::Done, true),
        GroupCommitError::Unknown { .. } => (ReportedNext::Unknown, true),
        _ => (ReportedNext::Strange, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn not_replaced() -> CommitError {
        CommitError::NotReplaced {
            dest: "vm.mem".into(),
            step: atomic_file::CommitStep::Sync,
            source: std::io::ErrorKind::StorageFull.into(),
            leftover: None,
        }
    }

    fn replaced() -> CommitError {
        CommitError::ReplacedDurabilityUnknown {
            dest: "vm.mem".into(),
            source: std::io::ErrorKind::Other.into(),
            leftover: None,
        }
    }

    #[test]
    fn an_error_says_the_same_however_deep_it_lies() {
        for (error, next) in [
            (not_replaced as fn() -> _, Next::Not),
            (replaced, Next::Done),
        ] {
            let snapshot = || SnapshotError::Commit(error());
            let of = |error: anyhow::Error| Reported::of(&error.context("a save")).next();
            assert_eq!(of(error().into()), next);
            assert_eq!(of(snapshot().into()), next);
            assert_eq!(of(MergeError::Write(snapshot()).into()), next);
        }
    }

    #[test]
    fn errors_of_other_code_leave_the_state_unknown() {
        let said = Reported::of(&anyhow::anyhow!("something"));
        assert_eq!(
            (said.next, said.next()),
            (ReportedNext::Strange, Next::Unknown)
        );
    }
}
