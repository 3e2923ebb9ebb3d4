//! What a rename did, whatever it said.

use std::io;

use nix::errno::Errno;

/// Why a file did not move.
#[derive(Debug)]
pub(crate) enum PublishError {
    /// It did not, for certain.
    NotPublished(io::Error),
    /// It may have: neither the rename nor a look at its outcome succeeded.
    Unknown { rename: io::Error, look: io::Error },
}

impl PublishError {
    /// What the system said of the rename itself.
    pub(crate) fn of_rename(self) -> io::Error {
        match self {
            Self::NotPublished(error) | Self::Unknown { rename: error, .. } => error,
        }
    }
}

/// Makes a `call` that is to move a file, and after any error finds out whether it did.
///
/// Over NFS the answer to a rename that happened may be lost, and the request sent again then fails with `ENOENT` or
/// `EEXIST`; an interrupted rename may have happened or not. So the destination is looked at (`is_there`), and
/// where that fails too, the origin (`is_here`).
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

/// Whether `error` means that the file system does not know the call: to rename without replacing.
pub(crate) fn has_no_such_call(error: &io::Error) -> bool {
    matches!(
        Errno::from_raw(error.raw_os_error().unwrap_or(0)),
        Errno::EINVAL | Errno::ENOSYS | Errno::ENOTSUP
    )
}

/// Whether `error`, of `link(2)`, means that the file system has no hard links.
pub(crate) fn has_no_links(error: &io::Error) -> bool {
    has_no_such_call(error) || error.raw_os_error() == Some(Errno::EPERM as i32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;
    use std::cell::Cell;

    /// An NFS client that says one thing and a server that did another.
    #[rstest]
    #[case::lost_reply(Errno::ENOENT, Ok(true), false, "there")]
    #[case::lost_reply_to_a_link(Errno::EEXIST, Ok(true), true, "there")]
    #[case::stale_but_done(Errno::ESTALE, Ok(true), false, "there")]
    #[case::not_done(Errno::EIO, Ok(false), true, "not")]
    #[case::destination_mute_origin_not(Errno::EIO, Err(Errno::EIO), true, "not")]
    #[case::all_mute(Errno::EIO, Err(Errno::ESTALE), false, "unknown")]
    fn after_a_failed_rename_the_file_system_is_asked_what_happened(
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
    fn an_interrupted_rename_is_made_again_only_if_it_did_not_happen(
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
    fn a_file_system_that_lacks_a_call_is_told_from_one_that_fails(
        #[case] errno: Errno,
        #[case] no_such_call: bool,
        #[case] no_links: bool,
    ) {
        let error = io::Error::from(errno);
        assert_eq!(has_no_such_call(&error), no_such_call);
        assert_eq!(has_no_links(&error), no_links);
    }
}
