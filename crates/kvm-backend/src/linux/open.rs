//! Opens `/dev/kvm`, and explains why it can't be opened.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use kvm_bindings::KVM_API_VERSION;
use kvm_ioctls::{Kvm, VmFd};
use thiserror::Error;

/// Opens `/dev/kvm`.
///
/// # Errors
/// Returns [`OpenKvmError`], which names what the host lacks: the module, the permission, or a KVM
/// with the stable interface.
///
/// # Examples
/// ```no_run
/// let kvm = kvm_backend::open_kvm()?;
/// let vm = kvm_backend::create_vm(&kvm)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn open_kvm() -> Result<Kvm, OpenKvmError> {
    open_kvm_at(Path::new("/dev/kvm"))
}

/// Opens the KVM device at `device`, for a sandbox with the device at another path.
///
/// # Errors
/// Returns the errors of [`open_kvm`].
pub fn open_kvm_at(device: &Path) -> Result<Kvm, OpenKvmError> {
    let failed = |source: io::Error| OpenKvmError::from_io(device, source);
    let path = CString::new(device.as_os_str().as_bytes()).map_err(|error| failed(error.into()))?;
    let kvm = Kvm::new_with_path(path).map_err(|error| failed(error.into()))?;
    match kvm.get_api_version() {
        version if version == KVM_API_VERSION as i32 => Ok(kvm),
        version => Err(OpenKvmError::NotKvm {
            device: device.into(),
            version,
        }),
    }
}

/// Creates a virtual machine of the host's default type, and retries when the call is interrupted.
///
/// `KVM_CREATE_VM` fails with `EINTR` when the kernel has work for the calling thread: a signal, or
/// the completion of an io_uring request. A thread that has just saved a guest and creates the next
/// one may encounter the latter. QEMU retries for the same reason.
///
/// # Errors
/// Returns any error of `KVM_CREATE_VM` other than `EINTR`.
///
/// # Examples
/// ```no_run
/// let vm = kvm_backend::create_vm(&kvm_backend::open_kvm()?)?;
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn create_vm(kvm: &Kvm) -> io::Result<VmFd> {
    loop {
        match kvm.create_vm().map_err(io::Error::from) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}

/// An error of opening the KVM device.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenKvmError {
    /// The device does not exist.
    #[error(
        "{} does not exist: load the kvm_intel or kvm_amd module, switch virtualization on in the \
         firmware, or, in a virtual machine, enable nested virtualization on its host: {source}",
        .device.display()
    )]
    Missing {
        /// The path of the device.
        device: PathBuf,
        /// The error of `open(2)`.
        #[source]
        source: io::Error,
    },
    /// The device exists, but this user may not open it for reading and writing.
    #[error(
        "no permission to open {} for reading and writing: add the user to the device's group, \
         usually `kvm`, or pass the device into the container: {source}",
        .device.display()
    )]
    NotPermitted {
        /// The path of the device.
        device: PathBuf,
        /// The error of `open(2)`.
        #[source]
        source: io::Error,
    },
    /// The device is not KVM, or KVM is older than Linux 2.6.22.
    #[error(
        "{} has version {version} of the KVM interface, not 12: name the KVM device, \
         or use a newer kernel",
        .device.display()
    )]
    NotKvm {
        /// The path of the device.
        device: PathBuf,
        /// The interface version of the device; -1 if it is not KVM.
        version: i32,
    },
    /// The device can't be opened for another reason.
    #[error("failed to open {}: {source}", .device.display())]
    Io {
        /// The path of the device.
        device: PathBuf,
        /// The error of `open(2)`.
        #[source]
        source: io::Error,
    },
}

impl OpenKvmError {
    fn from_io(device: &Path, source: io::Error) -> Self {
        let device = device.into();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { device, source },
            // Opening a device node without a driver fails with ENXIO or ENODEV.
            _ if matches!(source.raw_os_error(), Some(6 | 19)) => Self::Missing { device, source },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotPermitted { device, source }
            }
            _ => Self::Io { device, source },
        }
    }
}
