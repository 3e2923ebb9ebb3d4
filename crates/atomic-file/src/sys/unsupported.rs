//! Calls that a file system may not support.

use std::io;

use nix::errno::Errno;

/// Calls `weaker` if `first` failed because the file system does not support the call, and only
/// then.
///
/// `F_FULLFSYNC` and `F_BARRIERFSYNC` fail with `ENOTTY` on exFAT, `ENOTSUP` on SMB, `EINVAL` or
/// `ENOTTY` on FUSE. `EIO` or `ENOSPC` mean that data was lost, and a second, weaker call might
/// report success over the loss.
pub(super) fn fall_back_if_unsupported(
    first: io::Result<()>,
    weaker: impl FnOnce() -> io::Result<()>,
) -> io::Result<()> {
    match first {
        Err(error)
            if matches!(
                Errno::from_raw(error.raw_os_error().unwrap_or(0)),
                Errno::ENOTTY | Errno::ENOTSUP | Errno::EINVAL
            ) =>
        {
            weaker()
        }
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case::not_a_terminal(Errno::ENOTTY, true)]
    #[case::not_supported(Errno::ENOTSUP, true)]
    #[case::invalid(Errno::EINVAL, true)]
    #[case::lost_data(Errno::EIO, false)]
    #[case::no_space(Errno::ENOSPC, false)]
    #[case::quota(Errno::EDQUOT, false)]
    #[case::stale(Errno::ESTALE, false)]
    #[case::not_permitted(Errno::EPERM, false)]
    fn a_sync_falls_back_only_if_unsupported(#[case] errno: Errno, #[case] falls_back: bool) {
        let result = fall_back_if_unsupported(Err(errno.into()), || Ok(()));
        assert_eq!(result.is_ok(), falls_back);
        if let Err(error) = result {
            assert_eq!(
                error.raw_os_error(),
                Some(errno as i32),
                "the first error is returned"
            );
        }
    }
}
