//! What became of the mutants of a crate.

use std::ops::AddAssign;
use std::path::Path;

use anyhow::Context;
use xshell::Shell;

/// The numbers of the mutants of a crate by result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcomes {
    caught: usize,
    /// The tests did not end, which counts as caught.
    timeout: usize,
    pub(crate) missed: usize,
    /// The change does not compile.
    pub(crate) unviable: usize,
}

impl AddAssign for Outcomes {
    fn add_assign(&mut self, other: Self) {
        self.caught += other.caught;
        self.timeout += other.timeout;
        self.missed += other.missed;
        self.unviable += other.unviable;
    }
}

impl Outcomes {
    pub(crate) fn tested(self) -> usize {
        self.caught + self.timeout + self.missed
    }

    /// Rounded down.
    pub(crate) fn percent(self) -> usize {
        (self.caught + self.timeout) * 100 / self.tested().max(1)
    }

    pub(crate) fn line(self) -> String {
        format!(
            "{} mutants, {} caught ({} %), {} missed",
            self.tested(),
            self.caught + self.timeout,
            self.percent(),
            self.missed
        )
    }
}

/// The names of mutants by result.
#[derive(Debug, Default)]
pub(crate) struct Results {
    caught: Vec<String>,
    timeout: Vec<String>,
    missed: Vec<String>,
    unviable: Vec<String>,
}

impl Results {
    /// Reads the files that cargo-mutants leaves in `out`.
    pub(crate) fn read(sh: &Shell, out: &Path) -> anyhow::Result<Self> {
        let names = |result: &str| {
            let names = sh.read_file(out.join(result).with_extension("txt"));
            let names = names.context("cargo-mutants left no results")?;
            anyhow::Ok(names.lines().map(str::to_owned).collect())
        };
        Ok(Self {
            caught: names("caught")?,
            timeout: names("timeout")?,
            missed: names("missed")?,
            unviable: names("unviable")?,
        })
    }

    /// Returns the numbers for the mutants in `wanted`, and the names of those that no test
    /// detected. `None` selects all mutants. cargo-mutants also tries deleted fields of structs
    /// that its regular expression does not match.
    pub(crate) fn of(&self, wanted: Option<&[String]>) -> (Outcomes, Vec<String>) {
        let is_wanted = |name: &&String| wanted.is_none_or(|wanted| wanted.contains(name));
        let count = |names: &[String]| names.iter().filter(is_wanted).count();
        let outcomes = Outcomes {
            caught: count(&self.caught),
            timeout: count(&self.timeout),
            missed: count(&self.missed),
            unviable: count(&self.unviable),
        };
        let missed = self.missed.iter().filter(is_wanted).cloned().collect();
        (outcomes, missed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn timeouts_count_as_caught_and_unviable_mutants_are_ignored() {
        let results = Results {
            caught: names(&["a", "b", "c"]),
            timeout: names(&["d"]),
            missed: names(&["e"]),
            unviable: names(&["f", "g"]),
        };
        let (outcomes, missed) = results.of(None);
        assert_eq!(outcomes.line(), "5 mutants, 4 caught (80 %), 1 missed");
        assert_eq!(missed, ["e"]);
    }

    #[test]
    fn mutants_that_were_not_missed_before_do_not_count_again() {
        let results = Results {
            caught: names(&["a", "not selected"]),
            missed: names(&["b", "not selected either"]),
            ..Results::default()
        };
        let (outcomes, missed) = results.of(Some(&names(&["a", "b"])));
        assert_eq!(outcomes.line(), "2 mutants, 1 caught (50 %), 1 missed");
        assert_eq!(missed, ["b"]);
    }

    #[test]
    fn no_mutants_are_none_caught() {
        assert_eq!(Outcomes::default().percent(), 0);
    }
}
