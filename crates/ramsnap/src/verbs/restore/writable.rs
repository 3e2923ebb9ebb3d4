//! Whether a file can be written, asked without a change to it.

use std::fs::File;
use std::path::Path;

use nix::errno::Errno;
#[cfg(target_os = "linux")]
use nix::fcntl::{FcntlArg, fcntl};
#[cfg(target_os = "linux")]
use nix::libc;
use nix::sys::resource::{Resource, getrlimit};

use crate::failure::Failure;

/// Refuses a file of `size` bytes that the system never lets this process write in full: one with
/// a seal, or one larger than files may be.
#[cfg_attr(not(target_os = "linux"), expect(unused_variables))]
pub(super) fn check(path: &Path, file: &File, size: u64) -> Result<(), Failure> {
    let unwritable = |errno: Errno| Failure::TargetNotWritable {
        path: path.to_owned(),
        source: errno.into(),
    };
    // Files in memory have seals. Those on hugetlbfs are mapped, which a seal forbids, too.
    #[cfg(target_os = "linux")]
    if let Ok(seals) = fcntl(file, FcntlArg::F_GET_SEALS)
        && seals & (libc::F_SEAL_WRITE | libc::F_SEAL_FUTURE_WRITE) != 0
    {
        return Err(unwritable(Errno::EPERM));
    }
    match getrlimit(Resource::RLIMIT_FSIZE) {
        Ok((most, _)) if most < size => Err(unwritable(Errno::EFBIG)),
        _ => Ok(()),
    }
}
