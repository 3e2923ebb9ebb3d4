//! The mappings of a process, as the kernel lists them.

mod flags;
mod list;
mod region;

use std::fs::File;
use std::io::{self, BufReader};
use std::process;

use nix::errno::Errno;

pub use flags::{FlaggedRegion, RegionFlags};
pub(crate) use list::{ListError, maps, smaps};
pub use region::{Permissions, ProcessRegion, printable};

/// An error of listing the mappings of a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MappingsError {
    /// The process does not exist or has ended, or its first thread has ended. The kernel lists the
    /// memory of such a process for its other threads only: see
    /// [`ProcessRegion::list`](ProcessRegion::list).
    #[error(
        "process {pid} does not exist or has no memory: check that it runs, is not a kernel \
         thread, and that its first thread has not ended"
    )]
    Gone {
        /// The process id.
        pid: u32,
    },
    /// The list cannot be read.
    #[error(
        "failed to read {list}: check that this process may trace process {pid} (same user, or \
         CAP_SYS_PTRACE): {source}"
    )]
    Read {
        /// The process id.
        pid: u32,
        /// The path of the list.
        list: String,
        /// The system error.
        source: io::Error,
    },
    /// A line of the list is not a mapping.
    #[error("line {line} of {list} is not a mapping: {text}")]
    Line {
        /// The process id.
        pid: u32,
        /// The path of the list.
        list: String,
        /// The line number, from 1.
        line: usize,
        /// The line, control characters escaped.
        text: String,
    },
}

impl ProcessRegion {
    /// Returns the mappings of process `pid`, by ascending address.
    ///
    /// # Errors
    /// Returns an error if the process has ended, may not be examined, or if the list has an
    /// unknown format.
    pub fn of(pid: u32) -> Result<Vec<Self>, MappingsError> {
        Self::list(&format!("/proc/{pid}"), pid)
    }

    /// Returns the mappings of the calling process, by ascending address.
    ///
    /// # Errors
    /// Returns the errors of [`of`](Self::of).
    pub fn of_this_process() -> Result<Vec<Self>, MappingsError> {
        Self::list(SELF, process::id())
    }

    /// Returns the mappings that `directory` lists, by ascending address. The directory is
    /// `/proc/<pid>`, or that of a thread, `/proc/<pid>/task/<tid>`. Errors name process `pid`.
    ///
    /// # Errors
    /// Returns the errors of [`of`](Self::of).
    pub fn list(directory: &str, pid: u32) -> Result<Vec<Self>, MappingsError> {
        let path = format!("{directory}/maps");
        let regions = open(&path).and_then(maps);
        not_empty(regions.map_err(|error| described(error, path, pid))?, pid)
    }
}

impl FlaggedRegion {
    /// Returns the mappings of process `pid`, by ascending address.
    ///
    /// # Errors
    /// Returns the errors of [`ProcessRegion::of`].
    pub fn of(pid: u32) -> Result<Vec<Self>, MappingsError> {
        Self::list(&format!("/proc/{pid}"), pid)
    }

    /// Returns the mappings of the calling process, by ascending address.
    ///
    /// # Errors
    /// Returns the errors of [`ProcessRegion::of`].
    pub fn of_this_process() -> Result<Vec<Self>, MappingsError> {
        Self::list(SELF, process::id())
    }

    /// Returns the mappings that `directory` lists, as [`ProcessRegion::list`] does.
    ///
    /// # Errors
    /// Returns the errors of [`ProcessRegion::of`].
    pub fn list(directory: &str, pid: u32) -> Result<Vec<Self>, MappingsError> {
        let path = format!("{directory}/smaps");
        let mappings = open(&path).and_then(smaps);
        not_empty(mappings.map_err(|error| described(error, path, pid))?, pid)
    }
}

/// The directory of the calling process. Its number may be that of another process: `/proc` may
/// belong to another PID namespace.
pub(crate) const SELF: &str = "/proc/self";

fn open(path: &str) -> Result<BufReader<File>, ListError> {
    File::open(path).map(buffered).map_err(ListError::Read)
}

pub(crate) fn buffered<R: io::Read>(list: R) -> BufReader<R> {
    BufReader::with_capacity(64 << 10, list)
}

/// Refuses an empty list: a zombie process has no memory, and neither has a zombie thread, such as
/// the first one of a process that has others.
fn not_empty<R>(regions: Vec<R>, pid: u32) -> Result<Vec<R>, MappingsError> {
    match regions.is_empty() {
        true => Err(MappingsError::Gone { pid }),
        false => Ok(regions),
    }
}

fn described(error: ListError, list: String, pid: u32) -> MappingsError {
    match error {
        ListError::Read(source) if is_not_found(&source) => MappingsError::Gone { pid },
        ListError::Read(source) => MappingsError::Read { pid, list, source },
        ListError::Line { line, text } => MappingsError::Line {
            pid,
            list,
            line,
            text,
        },
    }
}

/// Returns `true` for an error that `/proc` returns for a process that has ended, by path or by an
/// open file.
fn is_not_found(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::ESRCH as i32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_list_that_was_read() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().to_str().unwrap();
        for list in ["maps", "smaps"] {
            std::fs::write(dir.path().join(list), "no mapping\n").unwrap();
        }
        let errors = [
            ProcessRegion::list(directory, 7).unwrap_err(),
            FlaggedRegion::list(directory, 7).unwrap_err(),
        ];
        let texts = errors.map(|error| error.to_string());
        let expected = ["maps", "smaps"]
            .map(|list| format!("line 1 of {directory}/{list} is not a mapping: no mapping"));
        assert_eq!(texts, expected);
    }

    #[test]
    fn a_list_that_cannot_be_read_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().to_str().unwrap();
        for list in ["maps", "smaps"] {
            // Reading a directory fails.
            std::fs::create_dir(dir.path().join(list)).unwrap();
        }
        let error = FlaggedRegion::list(directory, 7).unwrap_err().to_string();
        assert!(error.contains("/smaps: check"), "{error}");
        let error = ProcessRegion::list(directory, 7).unwrap_err().to_string();
        assert!(error.contains("/maps: check"), "{error}");
    }

    #[test]
    fn a_missing_or_empty_list_means_that_the_process_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().to_str().unwrap();
        let error = FlaggedRegion::list(directory, 7).unwrap_err();
        assert!(matches!(error, MappingsError::Gone { pid: 7 }), "{error}");
        for list in ["maps", "smaps"] {
            std::fs::write(dir.path().join(list), "").unwrap();
        }
        let error = FlaggedRegion::list(directory, 7).unwrap_err();
        assert!(matches!(error, MappingsError::Gone { pid: 7 }), "{error}");
        let error = ProcessRegion::list(directory, 7).unwrap_err();
        assert!(matches!(error, MappingsError::Gone { pid: 7 }), "{error}");
        let says_why = error.to_string().contains("its first thread has not ended");
        assert!(says_why, "{error}");
    }
}
