//! A case: a scenario, and what is to be known of its calls.

use nix::errno::Errno;
use scenarios::Scenario;

use super::vmm::Script;

/// A scenario, and the properties of its calls.
pub(super) struct Case {
    pub scenario: Scenario,
    /// The scenario starts threads itself. A thread that cannot be started is not a failure of the
    /// library, and numbers refer to different calls in each run.
    pub threads: bool,
    /// A call that always fails, as on a file system that does not support it.
    pub lacks: Option<(&'static str, Errno)>,
    /// What a VMM of another process does, whose RAM the scenario serves.
    pub vmm: Option<Script>,
}

/// Returns the case of a scenario without threads of its own.
pub(super) const fn case(scenario: Scenario) -> Case {
    Case {
        scenario,
        threads: false,
        lacks: None,
        vmm: None,
    }
}
