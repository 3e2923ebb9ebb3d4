//! What must hold when the power is back.

use std::fmt;
use std::path::Path;

use atomic_file::AtomicWriter;

use crate::directory::names;
use crate::ram::{Content, content};

/// What a crash must not do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Violation {
    /// What had been there, or was promised to be, is not, or can't be got at.
    Lost(String),
    /// Neither the old nor the new: parts of both, or of something else.
    Torn(String),
    /// A file was left behind that no recovery removes.
    Left(String),
}

impl Violation {
    /// The same, and in which phase of the scenario it was found.
    pub fn when(self, phase: &str) -> Self {
        let say = |what| format!("{phase}: {what}");
        match self {
            Self::Lost(what) => Self::Lost(say(what)),
            Self::Torn(what) => Self::Torn(say(what)),
            Self::Left(what) => Self::Left(say(what)),
        }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lost(what) => write!(f, "lost: {what}"),
            Self::Torn(what) => write!(f, "torn: {what}"),
            Self::Left(what) => write!(f, "left behind: {what}"),
        }
    }
}

/// A thing that fails when the power is back is lost.
pub fn lost<E: fmt::Display>(what: &str) -> impl Fn(E) -> Violation + '_ {
    move |error| Violation::Lost(format!("{what}: {error:#}"))
}

/// Who clears up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tidying {
    /// `atomic_file::recover`, which sweeps.
    Recover,
    /// The next writers to the same destinations.
    NextWriter,
}

/// What became of the commit after those that had returned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// The process died before it returned.
    Unknown,
    /// It said that nothing was replaced.
    Not,
    /// It said that all was replaced.
    Done,
}

/// A directory as a crash or a failure left it.
#[derive(Debug, Clone, Copy)]
pub struct PostCrashState<'a> {
    pub dir: &'a Path,
    /// The commits that had returned.
    pub returned: usize,
    pub next: Next,
    pub tidying: Tidying,
}

impl PostCrashState<'_> {
    /// The commits that have been made for certain.
    pub fn least(&self) -> usize {
        self.returned + usize::from(self.next == Next::Done)
    }

    /// The commits that may have been made.
    pub fn most(&self) -> usize {
        self.returned + usize::from(self.next != Next::Not)
    }

    /// Of versions that are committed one after the other, `first` being there before, those that
    /// may be there now.
    pub fn allowed(&self, first: u32, last: u32) -> Vec<u32> {
        let after = |commits| last.min(first + commits as u32);
        (after(self.least())..=after(self.most())).collect()
    }

    /// The version that a file is whole of.
    pub fn version(&self, name: &str, size: u64, allowed: &[u32]) -> Result<u32, Violation> {
        let expected = || format!("{name}, expected of {allowed:?}");
        match content(&self.dir.join(name), size) {
            Ok(Content::Whole(version)) if allowed.contains(&version) => Ok(version),
            Ok(found @ (Content::Whole(_) | Content::Missing)) => {
                Err(Violation::Lost(format!("{}: {found}", expected())))
            }
            Ok(found) => Err(Violation::Torn(format!("{}: {found}", expected()))),
            Err(error) => Err(Violation::Lost(format!("{}: {error}", expected()))),
        }
    }

    pub fn exists(&self, name: &str) -> bool {
        self.dir.join(name).exists()
    }

    /// Opens writers, all at once, and drops them.
    pub fn next_writers(&self, destinations: &[&str]) -> Result<(), Violation> {
        let open = |name| AtomicWriter::open(self.dir.join(name));
        let writers = destinations.iter().map(open).collect::<Result<Vec<_>, _>>();
        writers.map(drop).map_err(lost("can't open a writer"))
    }

    /// Clears up. Nothing but the destinations and `others` may be there then. A destination that
    /// had several writers at once is named as often: the next writer looks for no more leftovers
    /// than stand in its way.
    pub fn tidy(&self, destinations: &[&str], others: &[&str]) -> Result<(), Violation> {
        match self.tidying {
            Tidying::Recover => {
                atomic_file::recover(self.dir).map_err(lost("can't recover"))?;
            }
            Tidying::NextWriter => self.next_writers(destinations)?,
        }
        let belong = [destinations, others].concat();
        let mut left = names(self.dir, &belong).map_err(lost("can't list the directory"))?;
        // FUSE keeps removed files that are still open under names of its own.
        left.retain(|name| !name.starts_with(".fuse_hidden"));
        if left.is_empty() {
            return Ok(());
        }
        Err(Violation::Left(format!("{left:?}, by {:?}", self.tidying)))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::ram::Stamped;

    const SIZE: u64 = 64 << 10;

    fn after(dir: &Path, returned: usize) -> PostCrashState<'_> {
        PostCrashState {
            dir,
            returned,
            next: Next::Unknown,
            tidying: Tidying::Recover,
        }
    }

    #[test]
    fn old_version_is_allowed_only_until_the_commit_returns() {
        let dir = tempfile::tempdir().expect("a directory");
        let allowed = |returned| after(dir.path(), returned).allowed(1, 3);
        assert_eq!(allowed(0), [1, 2]);
        assert_eq!(allowed(1), [2, 3]);
        assert_eq!(allowed(2), [3]);
    }

    #[test]
    fn what_a_commit_said_leaves_one_right_version() {
        let dir = tempfile::tempdir().expect("a directory");
        let said = |next| PostCrashState {
            next,
            ..after(dir.path(), 1)
        };
        assert_eq!(said(Next::Not).allowed(1, 3), [2]);
        assert_eq!(said(Next::Done).allowed(1, 3), [3]);
        assert_eq!(said(Next::Unknown).allowed(1, 3), [2, 3]);
    }

    #[test]
    fn old_or_missing_pages_are_lost_and_mixed_ones_are_torn() {
        let dir = tempfile::tempdir().expect("a directory");
        let after = after(dir.path(), 1);
        let look = || after.version("vm.mem", SIZE, &[2]);
        let write = |bytes: &[u8]| fs::write(dir.path().join("vm.mem"), bytes).expect("written");
        assert!(matches!(look(), Err(Violation::Lost(_))));
        write(&Stamped::new(1, SIZE).bytes(0..SIZE));
        assert!(matches!(look(), Err(Violation::Lost(_))));
        let mut bytes = Stamped::new(2, SIZE).bytes(0..SIZE);
        write(&bytes);
        assert_eq!(look(), Ok(2));
        bytes[4096..8192].fill(0);
        write(&bytes);
        assert!(matches!(look(), Err(Violation::Torn(_))));
        write(&bytes[..4096]);
        assert!(matches!(look(), Err(Violation::Torn(_))));
    }

    #[test]
    fn what_no_sweep_removes_is_left_behind() {
        let dir = tempfile::tempdir().expect("a directory");
        fs::write(dir.path().join("vm.mem.tmp"), "").expect("written");
        let tidy = after(dir.path(), 0).tidy(&["vm.mem"], &[]);
        assert!(matches!(tidy, Err(Violation::Left(_))));
        let tidy = after(dir.path(), 0).tidy(&["vm.mem"], &["vm.mem.tmp"]);
        assert_eq!(tidy, Ok(()));
    }
}
