//! A client that is not served.

use std::fmt;

use thiserror::Error;

use super::error::ServeError;

/// The process of a VMM.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct VmProcess {
    /// Its id.
    pub id: i32,
    /// The name of its command, at most 15 bytes that it may have chosen itself. Empty if it cannot
    /// be read.
    pub command: String,
}

/// Writes the id and the command. Control characters are escaped.
impl fmt::Display for VmProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {}", self.id)?;
        match self.command.as_str() {
            "" => Ok(()),
            command => write!(f, " ({})", command.escape_debug()),
        }
    }
}

/// What was done to a VMM that cannot be served, or no longer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reaction {
    /// It was killed, or had exited before.
    Killed,
    /// A notice was written to its connection, which was shut down. It may have failed to kill it.
    Notified,
}

impl fmt::Display for Reaction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Killed => "killed",
            Self::Notified => "notified",
        })
    }
}

/// A client that has connected and is not served.
#[derive(Debug, Error)]
#[non_exhaustive]
pub struct RefusedClient {
    /// The reason.
    #[source]
    pub error: ServeError,
    /// The process that has connected, if it was identified.
    pub process: Option<Box<VmProcess>>,
    /// What was done to it. `None` if it has sent no userfaultfd, and waits for no pages.
    pub reaction: Option<Reaction>,
}

impl fmt::Display for RefusedClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.process {
            Some(process) => write!(f, "{process} was refused")?,
            None => f.write_str("a client was refused")?,
        }
        if let Some(reaction) = self.reaction {
            write!(f, " and {reaction}")?;
        }
        write!(f, ": {}", self.error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refused_client_is_named_with_its_end() {
        let process = VmProcess {
            id: 7,
            command: "fire\u{1b}[2J".into(),
        };
        let mut refused = RefusedClient {
            error: ServeError::Closed,
            process: Some(Box::new(process)),
            reaction: Some(Reaction::Killed),
        };
        let text = refused.to_string();
        let start = r"process 7 (fire\u{1b}[2J) was refused and killed: the client closed";
        assert!(text.starts_with(start), "{text}");
        (refused.process, refused.reaction) = (None, None);
        let text = refused.to_string();
        assert!(text.starts_with("a client was refused: "), "{text}");
    }
}
