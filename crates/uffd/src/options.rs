//! Options for opening a userfaultfd.

use crate::flags::Features;

/// Options for opening a userfaultfd, created by
/// [`Userfaultfd::options`](crate::Userfaultfd::options).
#[derive(Clone, Debug, Default)]
#[must_use = "options do nothing until `open`"]
pub struct UserfaultfdOptions {
    pub(crate) user_mode_only: bool,
    pub(crate) required: Features,
    pub(crate) optional: Features,
}

impl UserfaultfdOptions {
    /// Sets whether to handle only faults of the process's own instructions. An access by the
    /// kernel, in a system call or for a vCPU, then fails. This needs no privilege (Linux 5.11).
    /// The default is false.
    pub fn user_mode_only(mut self, user_mode_only: bool) -> Self {
        self.user_mode_only = user_mode_only;
        self
    }

    /// Sets the required features. The default is none.
    pub fn features(mut self, features: Features) -> Self {
        self.required = features;
        self
    }

    /// Sets features that are used if the kernel has them and permits them. The default is none.
    /// [`Userfaultfd::features`](crate::Userfaultfd::features) returns the features in use.
    pub fn optional_features(mut self, features: Features) -> Self {
        self.optional = features;
        self
    }
}
