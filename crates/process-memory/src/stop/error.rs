//! The reasons why a process cannot be stopped.

use std::fmt;
use std::io;
use std::time::Duration;

/// An error of stopping a process. All threads of the process keep running.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProcessStopError {
    /// The process does not exist or has ended.
    #[error("process {pid} does not exist or has ended: check the process id")]
    Gone {
        /// The process id.
        pid: u32,
    },
    /// The process is the calling process.
    #[error(
        "process {pid} is this process, which cannot stop itself: give the process id of the VMM"
    )]
    CurrentProcess {
        /// The process id.
        pid: u32,
    },
    /// Another process traces it. A process has one tracer at a time.
    #[error(
        "process {pid} is already traced by process or thread {tracer} (a debugger, strace, \
         another capture): end the tracer first"
    )]
    Traced {
        /// The process id.
        pid: u32,
        /// The id of the tracing thread, or 0 if it is outside of this process's PID namespace.
        tracer: u32,
    },
    /// This process may not trace the process.
    #[error("this process may not trace process {pid}: {}", remedy(*yama))]
    NotPermitted {
        /// The process id.
        pid: u32,
        /// The value of `kernel.yama.ptrace_scope`, if it exists. From 1 on it restricts tracing.
        yama: Option<u32>,
    },
    /// A thread did not stop within the time limit.
    #[error(
        "thread {thread} of process {pid} did not stop within {within:?}, because {reason}: try \
         again, or allow more time"
    )]
    Unresponsive {
        /// The process id.
        pid: u32,
        /// The thread id.
        thread: u32,
        /// The time limit.
        within: Duration,
        /// The activity of the thread.
        reason: Unresponsive,
    },
    /// The token passed to [`StoppedProcess::stop_unless`](crate::StoppedProcess::stop_unless) was
    /// cancelled.
    #[error("stopping process {pid} was cancelled")]
    Cancelled {
        /// The process id.
        pid: u32,
    },
    /// A system call failed for another reason.
    #[error("failed to stop process {pid}: {operation} failed: {source}")]
    System {
        /// The process id.
        pid: u32,
        /// The call.
        operation: &'static str,
        /// The system error.
        source: io::Error,
    },
}

/// The reason why a thread does not stop: [`ProcessStopError::Unresponsive`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unresponsive {
    /// The thread waits for a child, created by `vfork` or `posix_spawn`, to execute a program or
    /// to end.
    Vfork,
    /// The thread sleeps in the kernel without reacting to signals, most likely for storage.
    Uninterruptible {
        /// The kernel function in which the thread sleeps, if the kernel reports it.
        function: Option<String>,
    },
    /// The thread runs or waits for a processor, or threads are created faster than they can be
    /// stopped.
    Running,
}

impl fmt::Display for Unresponsive {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vfork => f.write_str("it waits for a vfork child to execute a program or to end"),
            Self::Uninterruptible {
                function: Some(function),
            } => write!(
                f,
                "it waits in the kernel ({function}), most likely for storage"
            ),
            Self::Uninterruptible { function: None } => {
                f.write_str("it waits in the kernel, most likely for storage")
            }
            Self::Running => f.write_str("it runs, or waits for a processor"),
        }
    }
}

fn remedy(yama: Option<u32>) -> &'static str {
    match yama {
        None | Some(0) => "run as its user, or with CAP_SYS_PTRACE (as root)",
        Some(1) => {
            "Yama (kernel.yama.ptrace_scope is 1) allows only its ancestors: run with \
             CAP_SYS_PTRACE (as root)"
        }
        Some(2) => "Yama (kernel.yama.ptrace_scope is 2) requires CAP_SYS_PTRACE: run as root",
        Some(_) => {
            "Yama forbids all tracing (kernel.yama.ptrace_scope is 3): change the setting and \
             reboot"
        }
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[rstest]
    #[case::without_yama(None, "run as its user, or with CAP_SYS_PTRACE")]
    #[case::off(Some(0), "run as its user, or with CAP_SYS_PTRACE")]
    #[case::ancestors(Some(1), "ptrace_scope is 1")]
    #[case::capability(Some(2), "ptrace_scope is 2")]
    #[case::never(Some(3), "change the setting and reboot")]
    fn a_permission_error_names_the_restriction(#[case] yama: Option<u32>, #[case] expected: &str) {
        let error = ProcessStopError::NotPermitted { pid: 7, yama };
        assert!(error.to_string().contains(expected), "{error}");
    }
}
