//! A case: a scenario, and what is to be known of its calls.

use nix::errno::Errno;
use scenarios::Scenario;

/// A scenario, and what is to be known of its calls.
pub(super) struct Case {
    pub scenario: Scenario,
    /// It starts threads itself: one that can't be started is no failure of the library, and
    /// numbers mean other calls each time.
    pub threads: bool,
    /// A call that always fails, where the file system has none such.
    pub lacks: Option<(&'static str, Errno)>,
}

/// Returns the case of a scenario without threads of its own.
pub(super) const fn case(scenario: Scenario) -> Case {
    Case {
        scenario,
        threads: false,
        lacks: None,
    }
}
