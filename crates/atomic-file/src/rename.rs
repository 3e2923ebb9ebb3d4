//! Determines whether a failed rename took effect.

use std::io;

use nix::errno::Errno;

/// An error of a rename.
#[derive(Debug)]
pub(crate) enum PublishError {
    /// The rename did not take effect.
    NotPublished(io::Error),
    /// The rename may have taken effect: both it and the inspection of its outcome failed.
    Unknown { rename: io::Error, look: io::Error },
}

impl PublishError {
    /// Returns the error of the rename itself.
    pub(crate) fn of_rename(self) -> io::Error {
        match self {
            Self::NotPublished(error) | Self::Unknown { rename: error, .. } => error,
        }
    }
}

/// Makes a `call` that renames a file, and after any error determines whether it took effect.
///
/// Over NFS, the reply to a rename that took effect may be lost. The repeated request then fails
/// with `ENOENT` or `EEXIST`. An interrupted rename may have taken effect or not. So the
/// destination is inspected (`is_there`), and if that fails too, the source (`is_here`).
pub(crate) fn confirm_rename(
    call: impl Fn() -> nix::Result<()>,
    is_there: impl Fn() -> io::Result<bool>,
    is_here: impl Fn() -> bool,
) -> Result<(), PublishError> {
    loop {
        let Err(errno) = call() else {
            return Ok(());
        };
        match is_there() {
            Ok(true) => return Ok(()),
            Ok(false) if errno == Errno::EINTR => {}
            Ok(false) => return Err(PublishError::NotPublished(errno.into())),
            Err(_) if is_here() => return Err(PublishError::NotPublished(errno.into())),
            Err(look) => {
                return Err(PublishError::Unknown {
                    rename: errno.into(),
                    look,
                });
            }
        }
    }
}

/// Returns whether `error` means that the file system does not support a rename without replacing.
pub(crate) fn has_no_such_call(error: &io::Error) -> bool {
    matches!(
        Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        Errno::EINVAL | Errno::ENOSYS | Errno::ENOTSUP
    )
}

/// Returns whether `error` of `link(2)` means that the file system has no hard links.
pub(crate) fn has_no_links(error: &io::Error) -> bool {
    has_no_such_call(error) || error.raw_os_error() == Some(Errno::EPERM as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::cell::Cell;

    /// Each case is an error of an NFS client, and the actual state on its server.
    #[rstest]
    #[case::lost_reply(Errno::ENOENT, Ok(true), false, "there")]
    #[case::lost_reply_to_a_link(Errno::EEXIST, Ok(true), true, "there")]
    #[case::stale_but_done(Errno::ESTALE, Ok(true), false, "there")]
    #[case::not_done(Errno::EIO, Ok(false), true, "not")]
    #[case::destination_unreadable(Errno::EIO, Err(Errno::EIO), true, "not")]
    #[case::both_unreadable(Errno::EIO, Err(Errno::ESTALE), false, "unknown")]
    fn a_failed_rename_is_verified_on_the_file_system(
        #[case] said: Errno,
        #[case] there: Result<bool, Errno>,
        #[case] here: bool,
        #[case] outcome: &str,
    ) {
        let result = confirm_rename(|| Err(said), || there.map_err(Into::into), || here);
        let got = match result {
            Ok(()) => "there",
            Err(PublishError::NotPublished(error)) => {
                assert_eq!(error.raw_os_error(), Some(said as i32));
                "not"
            }
            Err(PublishError::Unknown { rename, .. }) => {
                assert_eq!(rename.raw_os_error(), Some(said as i32));
                "unknown"
            }
        };
        assert_eq!(got, outcome);
    }

    #[rstest]
    #[case::not_done(false, 2)]
    #[case::done(true, 1)]
    fn an_interrupted_rename_is_repeated_only_if_not_done(
        #[case] happened: bool,
        #[case] calls: u32,
    ) {
        let made = Cell::new(0);
        let call = || {
            made.set(made.get() + 1);
            if made.get() == 1 {
                Err(Errno::EINTR)
            } else {
                Ok(())
            }
        };
        assert!(confirm_rename(call, || Ok(happened), || !happened).is_ok());
        assert_eq!(made.get(), calls);
    }

    #[rstest]
    #[case(Errno::EINVAL, true, true)]
    #[case(Errno::ENOSYS, true, true)]
    #[case(Errno::ENOTSUP, true, true)]
    #[case(Errno::EPERM, false, true)]
    #[case(Errno::EIO, false, false)]
    fn unsupported_calls_are_distinguished_from_failures(
        #[case] errno: Errno,
        #[case] no_such_call: bool,
        #[case] no_links: bool,
    ) {
        let error = io::Error::from(errno);
        assert_eq!(has_no_such_call(&error), no_such_call);
        assert_eq!(has_no_links(&error), no_links);
    }
}
