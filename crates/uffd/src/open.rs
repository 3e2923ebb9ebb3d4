//! How a userfaultfd is opened.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use linux_raw_sys::general::{UFFD_API, UFFD_USER_MODE_ONLY, uffdio_api};
use nix::errno::Errno;
use nix::libc;

use crate::error::OpenError;
use crate::flags::Features;
use crate::options::UserfaultfdOptions;
use crate::sys;
use crate::userfaultfd::Userfaultfd;

impl UserfaultfdOptions {
    /// Opens a userfaultfd for the memory of this process, by the system call or, if that is not
    /// permitted, by `/dev/userfaultfd`. The descriptor is non-blocking and is closed on `exec`.
    ///
    /// # Errors
    /// - [`OpenError::NotPermitted`] if the process may use neither
    /// - [`OpenError::Unsupported`] if the kernel has neither
    /// - [`OpenError::Features`] or [`OpenError::ForkNotPermitted`] if a required feature is not
    ///   available
    /// - [`OpenError::Open`] or [`OpenError::Negotiate`] for other errors
    pub fn open(&self) -> Result<Userfaultfd, OpenError> {
        self.open_by(|| self.descriptor())
    }

    /// Opens descriptors by `descriptor` until the kernel grants the features.
    pub(crate) fn open_by(
        &self,
        descriptor: impl Fn() -> Result<OwnedFd, OpenError>,
    ) -> Result<Userfaultfd, OpenError> {
        let mut features = self.required | self.optional;
        loop {
            let fault = descriptor()?;
            let errno = match negotiate(&fault, features) {
                Ok(_) => return Ok(Userfaultfd::new(fault, Some(features))),
                Err(errno) => errno,
            };
            let available = match errno {
                // The refused descriptor has no features yet, and can be asked for them.
                Errno::EINVAL => negotiate(&fault, Features::empty()).unwrap_or(features),
                Errno::EPERM => features - Features::EVENT_FORK,
                _ => features,
            };
            let missing = self.required - available;
            if missing == Features::EVENT_FORK && errno == Errno::EPERM {
                return Err(OpenError::ForkNotPermitted);
            }
            if !missing.is_empty() {
                return Err(OpenError::Features { missing });
            }
            let reduced = features & available;
            if reduced == features {
                let source = errno.into();
                return Err(OpenError::Negotiate { features, source });
            }
            features = reduced;
        }
    }

    /// Returns the features that the kernel has.
    ///
    /// # Errors
    /// Returns the errors of [`open`](Self::open), except for missing features.
    pub fn supported(&self) -> Result<Features, OpenError> {
        let features = Features::empty();
        let supported = negotiate(&self.descriptor()?, features);
        supported.map_err(|errno| OpenError::Negotiate {
            features,
            source: errno.into(),
        })
    }

    /// Returns the flags for a new descriptor.
    pub(crate) fn flags(&self) -> i32 {
        let user_mode_only = match self.user_mode_only {
            true => UFFD_USER_MODE_ONLY.cast_signed(),
            false => 0,
        };
        libc::O_CLOEXEC | libc::O_NONBLOCK | user_mode_only
    }

    fn descriptor(&self) -> Result<OwnedFd, OpenError> {
        let flags = self.flags();
        match sys::open(flags) {
            Ok(fault) => Ok(fault),
            Err(call @ (Errno::EPERM | Errno::EACCES | Errno::ENOSYS)) => {
                from_device(flags).map_err(|device| OpenError::refused(call, device))
            }
            Err(errno) => Err(OpenError::Open(errno.into())),
        }
    }
}

/// Opens the device, which requires file permissions, where the system call requires a privilege.
fn from_device(flags: i32) -> io::Result<OwnedFd> {
    let device = File::options()
        .read(true)
        .write(true)
        .open("/dev/userfaultfd")?;
    Ok(sys::open_by_device(device, flags)?)
}

/// Requests features, and returns all that the kernel has.
pub(crate) fn negotiate(fault: &OwnedFd, features: Features) -> nix::Result<Features> {
    let mut api = uffdio_api {
        api: UFFD_API.into(),
        features: features.bits(),
        ioctls: 0,
    };
    sys::api(fault, &mut api)?;
    Ok(Features::from_bits_retain(api.features))
}
