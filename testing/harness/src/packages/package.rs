//! A Debian package.

use std::path::Path;

/// A package, and a file that is there once it is installed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Package {
    pub name: &'static str,
    /// A path, or the name of a command.
    pub shows: &'static str,
    /// The oldest upstream version that will do.
    pub(super) oldest: Option<&'static str>,
    /// All packages of a family must have the same version.
    pub(super) family: Option<&'static str>,
}

impl Package {
    pub const fn new(name: &'static str, shows: &'static str) -> Self {
        Self {
            name,
            shows,
            oldest: None,
            family: None,
        }
    }

    /// Requires a version that is at least `oldest` and the same for the whole family.
    pub const fn of_family(self, family: &'static str, oldest: &'static str) -> Self {
        Self {
            oldest: Some(oldest),
            family: Some(family),
            ..self
        }
    }

    /// Returns whether it is installed.
    pub(super) fn is_present(&self) -> bool {
        const COMMANDS: [&str; 4] = ["/usr/bin", "/usr/sbin", "/bin", "/sbin"];
        if self.shows.starts_with('/') {
            return Path::new(self.shows).exists();
        }
        COMMANDS
            .iter()
            .any(|dir| Path::new(dir).join(self.shows).exists())
    }

    /// Whether its version matters.
    pub(super) fn has_version(&self) -> bool {
        self.oldest.is_some() || self.family.is_some()
    }
}
