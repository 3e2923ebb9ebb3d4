//! The outcome of filling pages.

use std::io;

use nix::errno::Errno;
use thiserror::Error;

/// The outcome of one request to fill or move pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use = "a request may be done in part"]
pub struct Filled {
    /// The number of bytes that were filled, from the start of the range. Accesses that waited for
    /// them were woken, unless the flags exclude it.
    pub bytes: u64,
    /// The reason why the request stopped before its end.
    pub stop: Option<Stop>,
}

impl Filled {
    /// Converts the kernel's two answers to a request for `len` bytes.
    pub(crate) fn new(len: u64, answer: nix::Result<()>, done: i64) -> Self {
        let (bytes, stop) = match answer {
            Ok(()) => (len, None),
            Err(Errno::EAGAIN) if done > 0 => (done.cast_unsigned(), Some(Stop::Partial)),
            Err(errno) => (0, Some(Stop::of(errno))),
        };
        Self { bytes, stop }
    }

    /// Returns the number of bytes if the request was done to its end.
    ///
    /// # Errors
    /// The reason for stopping.
    pub fn complete(self) -> Result<u64, Stop> {
        self.stop.map_or(Ok(self.bytes), Err)
    }
}

/// The reason why a request stopped.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stop {
    /// A part was done. A request for the rest returns the reason (`EAGAIN`).
    #[error("a part of the pages was filled: repeat the request for the rest")]
    Partial,
    /// The address space is being changed: an event other than a page fault is unread, or the
    /// thread that caused it has not continued yet (`EAGAIN`).
    #[error("the mappings are being changed: read the events and repeat the request")]
    Changing,
    /// The first page of the rest is not missing (`EEXIST`).
    #[error("the page is present already: continue after it")]
    Present,
    /// The pages are not in one registered mapping, or the source of a move is missing
    /// (`ENOENT`).
    #[error(
        "the pages are not in one registered mapping, or the pages to move are missing: divide \
         the range where its mappings end, and register memory again that was moved or mapped again"
    )]
    NotRegistered,
    /// The process that has the memory has ended (`ESRCH`).
    #[error("the process that has the memory has ended")]
    Exited,
    /// Another error, such as `EINVAL` for a range that is not of whole pages, or `ENOMEM`.
    #[error("the kernel refused the request: {}", io::Error::from_raw_os_error(*.0))]
    Other(
        /// The number of the error.
        i32,
    ),
}

impl Stop {
    /// Returns the number of the kernel's error.
    #[must_use]
    pub fn raw_os_error(self) -> i32 {
        match self {
            Self::Partial | Self::Changing => Errno::EAGAIN as i32,
            Self::Present => Errno::EEXIST as i32,
            Self::NotRegistered => Errno::ENOENT as i32,
            Self::Exited => Errno::ESRCH as i32,
            Self::Other(errno) => errno,
        }
    }

    pub(crate) fn of(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN => Self::Changing,
            Errno::EEXIST => Self::Present,
            Errno::ENOENT => Self::NotRegistered,
            Errno::ESRCH => Self::Exited,
            errno => Self::Other(errno as i32),
        }
    }
}

impl From<Stop> for io::Error {
    fn from(stop: Stop) -> Self {
        Self::from_raw_os_error(stop.raw_os_error())
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    const AGAIN: Errno = Errno::EAGAIN;

    #[rstest]
    #[case::all(Ok(()), 8192, 8192, None)]
    #[case::part(Err(AGAIN), 4096, 4096, Some(Stop::Partial))]
    #[case::changing(Err(AGAIN), -i64::from(AGAIN as i32), 0, Some(Stop::Changing))]
    #[case::changing_in_older_kernels(Err(AGAIN), 0, 0, Some(Stop::Changing))]
    #[case::present(Err(Errno::EEXIST), -17, 0, Some(Stop::Present))]
    #[case::not_registered(Err(Errno::ENOENT), -2, 0, Some(Stop::NotRegistered))]
    #[case::exited(Err(Errno::ESRCH), 0, 0, Some(Stop::Exited))]
    #[case::other(Err(Errno::ENOMEM), -12, 0, Some(Stop::Other(Errno::ENOMEM as i32)))]
    fn each_answer_has_its_outcome(
        #[case] answer: nix::Result<()>,
        #[case] done: i64,
        #[case] bytes: u64,
        #[case] stop: Option<Stop>,
    ) {
        let filled = Filled::new(8192, answer, done);
        assert_eq!(filled, Filled { bytes, stop });
        assert_eq!(filled.complete(), stop.map_or(Ok(8192), Err));
        if let (Err(errno), Some(stop)) = (answer, stop) {
            assert_eq!(stop.raw_os_error(), errno as i32);
            assert_eq!(io::Error::from(stop).raw_os_error(), Some(errno as i32));
        }
    }
}
