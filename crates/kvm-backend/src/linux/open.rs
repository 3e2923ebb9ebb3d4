//! `/dev/kvm`, and what to do where it does not open.

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
/// [`OpenKvmError`] tells what the host lacks: the module, the permission, or a KVM of the stable interface.
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

/// Opens the KVM device at `device`, for a sandbox that has it elsewhere.
///
/// # Errors
/// As [`open_kvm`].
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

/// Creates a virtual machine of the host's default type, whatever interrupts the call.
///
/// `KVM_CREATE_VM` ends with `EINTR` where the kernel has work for the calling thread: a signal, or, without any signal, the end of a request
/// that it had given to io_uring. A thread that has just saved a guest and creates the next one meets that now and then. QEMU asks again for the same reason.
///
/// # Errors
/// Whatever `KVM_CREATE_VM` says, other than `EINTR`.
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

/// The KVM device can't be used.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum OpenKvmError {
    /// There is no such device.
    #[error(
        "there is no {}: load the kvm_intel or kvm_amd module, switch virtualization on in the firmware, \
         or, in a virtual machine, ask its host for nested virtualization", .device.display()
    )]
    Missing {
        /// The device asked for.
        device: PathBuf,
        /// What `open(2)` said.
        #[source]
        source: io::Error,
    },
    /// The device is there, and this user may not open it for reading and writing.
    #[error(
        "{} may not be opened for reading and writing: add the user to the device's group, usually `kvm`, \
         or pass the device into the container", .device.display()
    )]
    NotPermitted {
        /// The device asked for.
        device: PathBuf,
        /// What `open(2)` said.
        #[source]
        source: io::Error,
    },
    /// It opened, and is no KVM, or one from before Linux 2.6.22.
    #[error("{} does not speak KVM's interface 12: it says {version}", .device.display())]
    NotKvm {
        /// The device asked for.
        device: PathBuf,
        /// The interface version it gave; -1 where it is no KVM at all.
        version: i32,
    },
    /// Anything else.
    #[error("{} can't be opened", .device.display())]
    Io {
        /// The device asked for.
        device: PathBuf,
        /// What `open(2)` said.
        #[source]
        source: io::Error,
    },
}

impl OpenKvmError {
    fn from_io(device: &Path, source: io::Error) -> Self {
        let device = device.into();
        match source.kind() {
            io::ErrorKind::NotFound => Self::Missing { device, source },
            // A device node with no driver behind it says ENXIO or ENODEV.
            _ if matches!(source.raw_os_error(), Some(6 | 19)) => Self::Missing { device, source },
            io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
                Self::NotPermitted { device, source }
            }
            _ => Self::Io { device, source },
        }
    }
}
