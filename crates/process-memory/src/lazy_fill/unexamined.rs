//! The processes that a check could not examine.

use std::fmt;

/// The processes that a check could not examine: each of them may be filling the memory.
///
/// [`Display`](fmt::Display) writes them on one line: the first process and the number of the
/// others, and the reason why more processes may be hidden.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
#[must_use = "each of these processes may be filling the memory"]
pub struct Unexamined {
    /// The processes that are listed in `/proc`, that run as the owner of the memory, and that this
    /// process may not examine.
    pub processes: Vec<UnexaminedProcess>,
    /// The reasons why `/proc` may not list all processes.
    pub hidden: Vec<HiddenProcesses>,
}

impl Unexamined {
    /// Returns `true` if every process that runs as the owner of the memory was examined, and
    /// `/proc` hides no process.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.processes.is_empty() && self.hidden.is_empty()
    }

    /// Adds what another check could not examine.
    pub fn merge(&mut self, other: Self) {
        for process in other.processes {
            if !self.processes.contains(&process) {
                self.processes.push(process);
            }
        }
        for hidden in other.hidden {
            if !self.hidden.contains(&hidden) {
                self.hidden.push(hidden);
            }
        }
    }
}

impl fmt::Display for Unexamined {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut before = "";
        if let Some(first) = self.processes.first() {
            write!(f, "{first}")?;
            if let others @ 1.. = self.processes.len() - 1 {
                write!(f, " and {others} more")?;
            }
            before = ", and ";
        }
        for hidden in &self.hidden {
            write!(f, "{before}{hidden}")?;
            before = ", and ";
        }
        Ok(())
    }
}

/// A process that could not be examined, and that runs as the owner of the memory.
///
/// [`Display`](fmt::Display) writes its id and the name of its program, with control characters
/// escaped.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct UnexaminedProcess {
    /// The process id.
    pub pid: u32,
    /// The name of its program, control characters escaped.
    pub command: String,
}

impl fmt::Display for UnexaminedProcess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.pid, self.command)
    }
}

/// A reason why `/proc` may not list all processes of the machine.
///
/// [`Display`](fmt::Display) writes which processes these are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum HiddenProcesses {
    /// `/proc` is that of a PID namespace other than the initial one, as in most containers.
    /// Processes outside of the namespace are not listed.
    OutsidePidNamespace,
    /// `/proc` is mounted with the option `hidepid`, and this process lacks the privilege to see
    /// the processes of other users.
    HidePid,
}

impl fmt::Display for HiddenProcesses {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::OutsidePidNamespace => {
                "the processes outside of this PID namespace, which /proc does not list"
            }
            Self::HidePid => {
                "the processes of other users, which /proc does not list (mount option hidepid)"
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn process(pid: u32) -> UnexaminedProcess {
        UnexaminedProcess {
            pid,
            command: "vmm".into(),
        }
    }

    #[rstest]
    #[case::one(vec![process(4)], vec![], "process 4 (vmm)")]
    #[case::some(vec![process(4), process(5), process(6)], vec![], "process 4 (vmm) and 2 more")]
    #[case::hidden(
        vec![],
        vec![HiddenProcesses::HidePid],
        "the processes of other users, which /proc does not list (mount option hidepid)"
    )]
    #[case::both(
        vec![process(4)],
        vec![HiddenProcesses::OutsidePidNamespace],
        "process 4 (vmm), and the processes outside of this PID namespace, which /proc does not \
     list"
    )]
    fn the_text_names_what_was_not_examined(
        #[case] processes: Vec<UnexaminedProcess>,
        #[case] hidden: Vec<HiddenProcesses>,
        #[case] text: &str,
    ) {
        let unexamined = Unexamined { processes, hidden };
        assert_eq!(unexamined.to_string(), text);
        assert!(!unexamined.is_empty());
    }

    #[test]
    fn merging_keeps_each_once() {
        let one = Unexamined {
            processes: vec![process(1), process(2)],
            hidden: vec![HiddenProcesses::HidePid],
        };
        let mut all = Unexamined::default();
        assert!(all.is_empty());
        all.merge(one.clone());
        all.merge(one.clone());
        assert_eq!(all, one);
    }
}
