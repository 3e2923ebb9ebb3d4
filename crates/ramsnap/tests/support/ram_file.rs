//! Files that hold the RAM of a guest.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::support::RAM;

/// RAM in a memfd of this process, and its path.
pub(crate) fn memfd(len: u64) -> (File, String) {
    let fd: OwnedFd = memfd_create("ram", MFdFlags::MFD_CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(len).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    (file, path)
}

pub(crate) fn bytes(file: &File) -> Vec<u8> {
    let mut bytes = vec![0; RAM as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Creates a file as large as the RAM.
pub(crate) fn create(path: &Path) -> File {
    let options = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path);
    let file = options.unwrap();
    file.set_len(RAM).unwrap();
    file
}
