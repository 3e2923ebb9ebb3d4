//! The state of a package, and what is wrong with it.

use std::fmt::{self, Display, Formatter};

use super::package::Package;
use super::version::at_least;

/// A package and its versions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct State {
    pub package: Package,
    /// Whether the file that shows it exists.
    pub present: bool,
    /// Known only where the package must have some version.
    pub installed: Option<String>,
    /// What apt would install, by the lists as they are.
    pub offered: Option<String>,
    /// Whether this process attempted to install it, with or without success.
    pub attempted: bool,
}

/// What is wrong with a package.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Problem {
    Missing,
    TooOld {
        found: String,
        needed: &'static str,
    },
    /// Another package of the same family has another version.
    Differs {
        found: String,
        other: &'static str,
        version: String,
    },
}

impl Display for Problem {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("not installed"),
            Self::TooOld { found, needed } => {
                write!(f, "{found} is installed, {needed} or newer is needed")
            }
            Self::Differs {
                found,
                other,
                version,
            } => write!(
                f,
                "{found} is installed, the version of {other}, {version}, is needed"
            ),
        }
    }
}

/// Returns the packages of the same family.
fn family<'a>(of: &State, packages: &'a [State]) -> impl Iterator<Item = &'a State> {
    let family = of.package.family;
    packages
        .iter()
        .filter(move |other| family.is_some() && other.package.family == family)
}

/// Returns what is wrong with a package, beside the others of its family.
pub(super) fn problem(state: &State, packages: &[State]) -> Option<Problem> {
    let package = state.package;
    if !state.present {
        return Some(Problem::Missing);
    }
    if !package.has_version() {
        return None;
    }
    let Some(found) = state.installed.clone() else {
        return Some(Problem::Missing);
    };
    if let Some(needed) = package.oldest.filter(|needed| !at_least(&found, needed)) {
        return Some(Problem::TooOld { found, needed });
    }
    let first = family(state, packages).find_map(|other| Some((other, other.installed.clone()?)));
    let (other, version) = first.filter(|(_, version)| *version != found)?;
    Some(Problem::Differs {
        found,
        other: other.package.name,
        version,
    })
}

/// Returns whether apt would install what is needed: of a family, all in one version.
pub(super) fn is_offered(state: &State, packages: &[State]) -> bool {
    let enough = |state: &State| match (&state.offered, state.package.oldest) {
        (Some(offered), Some(oldest)) => at_least(offered, oldest),
        (offered, _) => offered.is_some(),
    };
    let same = |other: &State| other.offered == state.offered;
    enough(state) && family(state, packages).all(|other| enough(other) && same(other))
}
