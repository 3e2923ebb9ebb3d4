//! Checks the files, resources and result of a run.

use std::fmt;
use std::path::Path;

use scenarios::check::{self, Next, PostCrashState, Tidying};
use scenarios::directory::names;

use super::case::Case;
use super::child::{Report, Save};
use super::injected_fault::{How, InjectedFault};
use super::outcome::ReportedNext;
use super::tracer::{End, Trace};

/// What must not be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum FaultViolation {
    /// Something that had been there, or a mark.
    Lost(String),
    Torn(String),
    /// A staged file that is neither reported nor removed, or something that the process still
    /// holds.
    Leaked(String),
    /// What was said is not so; or nothing was said at all.
    Untrue(String),
}

impl fmt::Display for FaultViolation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(what) => write!(f, "lost: {what}"),
            Self::Torn(what) => write!(f, "torn: {what}"),
            Self::Leaked(what) => write!(f, "leaked: {what}"),
            Self::Untrue(what) => write!(f, "untrue: {what}"),
        }
    }
}

impl From<check::Violation> for FaultViolation {
    fn from(fault: check::Violation) -> Self {
        match fault {
            check::Violation::Lost(what) => Self::Lost(what),
            check::Violation::Torn(what) => Self::Torn(what),
            check::Violation::Left(what) => Self::Leaked(what),
        }
    }
}

/// A run that is over.
pub(super) struct Run<'a> {
    pub case: &'a Case,
    pub fault: Option<&'a InjectedFault>,
    pub dir: &'a Path,
    /// What the directory held before.
    pub before: &'a [String],
    pub trace: &'a Trace,
    /// What the child wrote, unless it died before.
    pub report: Option<Report>,
    /// The end of what it wrote to its standard error.
    pub stderr: String,
    pub tidying: Tidying,
}

impl Run<'_> {
    pub(super) fn judge(&self) -> Result<(), FaultViolation> {
        match (self.trace.end, &self.report) {
            (End::Hung, _) => Err(FaultViolation::Untrue("it does not end".into())),
            (End::Killed(_), _) if self.fault.is_some_and(InjectedFault::kills) => {
                self.check(Next::Unknown).map_err(FaultViolation::from)
            }
            (End::Exited(0), Some(report)) => self.judge_report(report),
            (end, _) => Err(FaultViolation::Untrue(format!(
                "{end:?}: {}",
                self.stderr.trim()
            ))),
        }
    }

    fn judge_report(&self, report: &Report) -> Result<(), FaultViolation> {
        let said = &report.said;
        let text = &said.text;
        if said.next == ReportedNext::Strange {
            return Err(FaultViolation::Untrue(format!(
                "not an error of the library: {text}"
            )));
        }
        if said.next == ReportedNext::All && self.fault.is_some_and(fails_a_sync) {
            return Err(FaultViolation::Untrue(
                "a sync failed, and success was reported".into(),
            ));
        }
        report.saves.iter().try_for_each(judge_save)?;
        if let Some((served, vmm)) = &report.vmm {
            vmm.judge(*served)?;
        }
        if let Some(held) = report.held.iter().find(|held| !self.is_the_faults(held)) {
            return Err(FaultViolation::Leaked(format!("{held}, after: {text}")));
        }
        // A writer that finds another's staged file between its creation and its lock leaves it to
        // that other writer. If the other's own look at the file fails, the next writer removes it,
        // as `check` verifies.
        let may_stay = said.left || self.case.threads;
        if !may_stay && !self.fault.is_some_and(fails_clearing_up) {
            self.nothing_left(text)?;
        }
        let Err(violation) = self.check(said.next()) else {
            return Ok(());
        };
        // The files are whole, but not as the error states.
        match self.check(Next::Unknown) {
            Ok(()) => Err(FaultViolation::Untrue(format!(
                "{violation}, after: {text}"
            ))),
            Err(_) => Err(violation.when(text).into()),
        }
    }

    fn check(&self, next: Next) -> Result<(), check::Violation> {
        (self.case.scenario.check)(&PostCrashState {
            dir: self.dir,
            returned: self.trace.returned,
            next,
            tidying: self.tidying,
        })
    }

    /// Checks that no staged file is left. A recycled file does not count: the next writer uses it.
    fn nothing_left(&self, text: &str) -> Result<(), FaultViolation> {
        let before: Vec<_> = self.before.iter().map(String::as_str).collect();
        let mut left = names(self.dir, &before).map_err(check::lost("can't list the directory"))?;
        left.retain(|name| name.starts_with(".atomic-file-") && !name.ends_with(".spare"));
        match left.is_empty() {
            true => Ok(()),
            false => Err(FaultViolation::Leaked(format!("{left:?}, after: {text}"))),
        }
    }

    /// Returns whether the injected fault itself leaks `held`. When `creat` succeeds but reports an
    /// error, only the kernel knows the descriptor.
    fn is_the_faults(&self, held: &str) -> bool {
        let at = self.fault.and_then(InjectedFault::at);
        let made = at.is_some_and(|at| at.kind.name == "creat" && matches!(at.how, How::Lost(_)));
        made && held.starts_with("descriptor of")
    }
}

/// Returns whether a sync reports a failure. An interrupted sync is repeated, and does not count.
fn fails_a_sync(fault: &InjectedFault) -> bool {
    use nix::errno::Errno::EINTR;
    fault.at().is_some_and(|at| {
        let fails = matches!(at.how, How::Error(errno) | How::Lost(errno) if errno != EINTR);
        at.kind.is_sync() && fails
    })
}

/// Returns whether the removal of a staged file fails. A writer that is dropped cannot report such
/// an error.
fn fails_clearing_up(fault: &InjectedFault) -> bool {
    matches!(fault, InjectedFault::Twice(..)) || fault.at().is_some_and(|at| at.kind.removes())
}

fn judge_save(save: &Save) -> Result<(), FaultViolation> {
    if !save.again {
        return Err(FaultViolation::Leaked(
            "the epoch of a save that is over".into(),
        ));
    }
    if !save.returned && save.after != save.before {
        let (before, after) = (&save.before, &save.after);
        return Err(FaultViolation::Lost(format!(
            "marks: {before:x?} before the save, {after:x?} after it"
        )));
    }
    if save.returned && !save.after.is_empty() {
        let after = &save.after;
        return Err(FaultViolation::Untrue(format!(
            "{after:x?} are saved and still marked"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> InjectedFault {
        text.parse().expect("a fault")
    }

    #[test]
    fn a_failed_sync_is_reported_and_an_interrupted_one_repeated() {
        assert!(fails_a_sync(&fault("fsync#1:EIO")));
        assert!(fails_a_sync(&fault("fsync#2:lost:EIO")));
        assert!(!fails_a_sync(&fault("fsync#1:EINTR")));
        assert!(!fails_a_sync(&fault("fsync#1:kill")));
        assert!(!fails_a_sync(&fault("pwrite64#1:EIO")));
    }

    #[test]
    fn failed_save_restores_all_marks_and_successful_save_none() {
        let save = |before: &[Range], after: &[Range], returned| {
            judge_save(&Save {
                before: before.to_vec(),
                after: after.to_vec(),
                returned,
                again: true,
            })
        };
        type Range = std::ops::Range<u64>;
        assert_eq!(save(&[0..4, 8..12], &[0..4, 8..12], false), Ok(()));
        assert_eq!(save(&[0..4], &[], true), Ok(()));
        assert!(matches!(
            save(&[0..4, 8..12], &[0..4], false),
            Err(FaultViolation::Lost(_))
        ));
        assert!(matches!(
            save(&[0..4], &[0..4], true),
            Err(FaultViolation::Untrue(_))
        ));
    }
}
