//! Errors of opening a userfaultfd and of registering memory.

use std::io;
use std::ops::Range;

use nix::errno::Errno;
use thiserror::Error;

use crate::flags::{Features, Modes};

/// Errors of [opening a userfaultfd](crate::UserfaultfdOptions::open).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The kernel was built without userfaultfd.
    #[error("this kernel has no userfaultfd: use a kernel that is built with CONFIG_USERFAULTFD")]
    Unsupported,
    /// The process may use neither the system call nor the device.
    #[error(
        "userfaultfd is not permitted: the system call failed ({call}), and so did \
         /dev/userfaultfd ({device}): let the process open /dev/userfaultfd (Linux 6.1), give it \
         CAP_SYS_PTRACE, or set the sysctl vm.unprivileged_userfaultfd to 1"
    )]
    NotPermitted {
        /// The error of the system call.
        call: io::Error,
        /// The error of `/dev/userfaultfd`.
        device: io::Error,
    },
    /// The kernel returned no descriptor for another reason, such as too many open files.
    #[error("failed to open a userfaultfd: {0}")]
    Open(#[source] io::Error),
    /// The kernel lacks required features.
    #[error("this kernel lacks the userfaultfd features {missing:?}: use a newer kernel")]
    Features {
        /// The required features that the kernel lacks.
        missing: Features,
    },
    /// The process may not receive fork events.
    #[error("userfaultfd events of forks are not permitted: give the process CAP_SYS_PTRACE")]
    ForkNotPermitted,
    /// The kernel refused the features for another reason.
    #[error("failed to agree with the kernel on the userfaultfd features {features:?}: {source}")]
    Negotiate {
        /// The requested features.
        features: Features,
        /// The error of the operating system.
        source: io::Error,
    },
}

impl OpenError {
    /// Returns the error for a refused system call and a failure of the device.
    pub(crate) fn refused(call: Errno, device: io::Error) -> Self {
        if call == Errno::ENOSYS && device.kind() == io::ErrorKind::NotFound {
            return Self::Unsupported;
        }
        let call = call.into();
        Self::NotPermitted { call, device }
    }
}

/// Errors of [adopting a descriptor](crate::UserfaultfdOptions::adopt).
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AdoptError {
    /// The descriptor is neither a userfaultfd nor `/dev/userfaultfd`.
    #[error(
        "the descriptor is neither a userfaultfd nor /dev/userfaultfd: pass /dev/userfaultfd, \
         opened by a process that may open it"
    )]
    NotUserfaultfd,
    /// No userfaultfd can be opened by the device, or it lacks features.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The userfaultfd is that of another address space.
    #[error(
        "the userfaultfd receives the faults of another process, the one that opened it: pass \
         /dev/userfaultfd instead, or open the userfaultfd in this process before it gives up its \
         privileges"
    )]
    OtherProcess,
    /// The features of the userfaultfd were requested without some that are required.
    #[error(
        "the features of the userfaultfd were requested without {missing:?}: request them too, or \
         pass the descriptor before any are requested"
    )]
    Features {
        /// The features that it lacks.
        missing: Features,
    },
    /// The userfaultfd handles only faults of the process's own instructions.
    #[error(
        "the userfaultfd does not receive faults that the kernel takes, in system calls or for \
         vCPUs: open it without UFFD_USER_MODE_ONLY"
    )]
    UserModeOnly,
    /// Memory is registered with the userfaultfd, or another process reads its events.
    #[error("the userfaultfd is in use ({0}): pass one that nothing else uses")]
    InUse(
        /// What uses it.
        &'static str,
    ),
    /// It is not known whether the userfaultfd can be used.
    #[error(
        "failed to examine the userfaultfd: mount /proc, or pass /dev/userfaultfd, which needs no \
         examination: {0}"
    )]
    Unchecked(#[source] io::Error),
}

/// The error of [registering memory](crate::Userfaultfd::register).
#[derive(Debug, Error)]
#[error(
    "failed to register {:#x} bytes at {:#x} with userfaultfd for {modes:?}: {}: {source}",
    range.end.saturating_sub(range.start), range.start, remedy(source)
)]
pub struct RegisterError {
    /// The addresses.
    pub range: Range<u64>,
    /// The kinds of faults.
    pub modes: Modes,
    /// The error of the operating system.
    pub source: io::Error,
}

fn remedy(source: &io::Error) -> &'static str {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::EBUSY) => {
            "another userfaultfd has it: unregister it there, or register it once only"
        }
        Some(Errno::EINVAL) => {
            "give whole pages of mapped memory of a kind that supports these modes, and request \
             the features for this kind"
        }
        Some(Errno::EPERM) => "its file was opened for reading only: open it for writing",
        _ => "check that the memory is mapped and that the host has free memory",
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    #[test]
    fn refusals_distinguish_missing_from_forbidden() {
        let device = |kind: io::ErrorKind| io::Error::from(kind);
        let missing = OpenError::refused(Errno::ENOSYS, device(io::ErrorKind::NotFound));
        assert!(matches!(missing, OpenError::Unsupported), "{missing:?}");
        for (call, kind) in [
            (Errno::EPERM, io::ErrorKind::NotFound),
            (Errno::EPERM, io::ErrorKind::PermissionDenied),
            (Errno::ENOSYS, io::ErrorKind::PermissionDenied),
        ] {
            let error = OpenError::refused(call, device(kind));
            assert!(matches!(error, OpenError::NotPermitted { .. }), "{error:?}");
            let text = error.to_string();
            assert!(text.contains(&io::Error::from(call).to_string()), "{text}");
            assert!(text.contains(&device(kind).to_string()), "{text}");
            for remedy in [
                "/dev/userfaultfd",
                "CAP_SYS_PTRACE",
                "unprivileged_userfaultfd",
            ] {
                assert!(text.contains(remedy), "{text}");
            }
        }
    }

    #[rstest]
    #[case::busy(Errno::EBUSY, "another userfaultfd")]
    #[case::invalid(Errno::EINVAL, "whole pages")]
    #[case::read_only(Errno::EPERM, "for writing")]
    #[case::other(Errno::ENOMEM, "free memory")]
    fn register_errors_name_memory_modes_and_remedy(#[case] errno: Errno, #[case] remedy: &str) {
        let error = RegisterError {
            range: 0x1000..0x3000,
            modes: Modes::MISSING,
            source: errno.into(),
        };
        let text = error.to_string();
        for part in ["0x2000 bytes at 0x1000", "MISSING", remedy] {
            assert!(text.contains(part), "{text}");
        }
    }
}
