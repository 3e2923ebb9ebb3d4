//! The exit status of the tool, as `ramsnap --help` lists it.

use std::process::ExitCode;

/// The exit status of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExitStatus {
    /// The work is done; a check passed.
    Success,
    /// A check failed: damaged, not linked, different.
    CheckFailed,
    /// The command line is not valid. Nothing was written.
    Usage,
    /// Everything else: an I/O error, no permission, no room.
    Failed,
    /// Interrupted by the signal of this number.
    Interrupted(i32),
}

impl ExitStatus {
    /// Returns the status of a check that is `good` or not.
    pub fn of_check(good: bool) -> Self {
        match good {
            true => Self::Success,
            false => Self::CheckFailed,
        }
    }

    /// Returns the code that the process exits with.
    pub fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::CheckFailed => 1,
            Self::Usage => 2,
            Self::Failed => 3,
            // As in a shell.
            Self::Interrupted(signal) => u8::try_from(128 + signal).unwrap_or(u8::MAX),
        }
    }
}

impl From<ExitStatus> for ExitCode {
    fn from(status: ExitStatus) -> Self {
        status.code().into()
    }
}
