//! File handles: they identify a file in its file system for all time.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

/// The handle of a file in the file system that stores it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct StoredHandle {
    kind: libc::c_int,
    bytes: Vec<u8>,
}

/// Returns the handle of an open file; `None` if it is not known which file is stored. `layered`
/// states whether it is on overlayfs.
pub(crate) fn stored_handle(file: &File, layered: bool) -> Option<StoredHandle> {
    of_stored(handle(file.as_raw_fd(), c"", libc::AT_EMPTY_PATH)?, layered)
}

/// Returns the same for the file at `path`.
pub(crate) fn stored_handle_at(path: &Path, layered: bool) -> Option<StoredHandle> {
    let path = CString::new(path.as_os_str().as_bytes()).ok()?;
    of_stored(
        handle(libc::AT_FDCWD, &path, libc::AT_SYMLINK_FOLLOW)?,
        layered,
    )
}

fn of_stored(handle: StoredHandle, layered: bool) -> Option<StoredHandle> {
    match layered {
        true => in_upper_layer(&handle),
        false => Some(handle),
    }
}

/// Returns the handle in the upper layer, from that of a file on overlayfs which was created there.
///
/// For another file, overlayfs reports the handle in the lower layer, also after it moved the file
/// up. `fs/overlayfs/overlayfs.h` of Linux 6.6: three bytes of padding, and `struct ovl_fb`. Its
/// format does not change, because overlayfs also stores it in its layers.
fn in_upper_layer(handle: &StoredHandle) -> Option<StoredHandle> {
    /// `OVL_FILEID_V1`.
    const KIND: libc::c_int = 0xf8;
    const PADDING: usize = 3;
    const VERSION: u8 = 0;
    const MAGIC: u8 = 0xfb;
    /// `OVL_FH_FLAG_PATH_UPPER`.
    const IN_UPPER_LAYER: u8 = 1 << 2;
    const UUID: usize = 16;
    let (&[version, magic, length, flags, kind], rest) =
        handle.bytes.get(PADDING..)?.split_first_chunk()?;
    let is_known = handle.kind == KIND && (version, magic) == (VERSION, MAGIC);
    if !is_known || flags & IN_UPPER_LAYER == 0 {
        return None;
    }
    let length = usize::from(length).checked_sub(5 + UUID)?;
    Some(StoredHandle {
        kind: kind.into(),
        bytes: rest.get(UUID..)?.get(..length)?.to_vec(),
    })
}

/// Returns `None` if the file system has no handles, or the kernel is older than Linux 6.5.
fn handle(dir: libc::c_int, path: &CStr, flags: libc::c_int) -> Option<StoredHandle> {
    /// `MAX_HANDLE_SZ` of Linux's `include/linux/exportfs.h`.
    const MAX_LEN: usize = 128;
    /// `AT_HANDLE_FID` of Linux's `include/uapi/linux/fcntl.h`: a handle to compare only, which
    /// overlayfs has without being exported.
    const TO_COMPARE: libc::c_int = 0x200;
    /// `struct file_handle` of Linux's `include/linux/fs.h`.
    #[repr(C)]
    struct Handle {
        length: libc::c_uint,
        kind: libc::c_int,
        bytes: [u8; MAX_LEN],
    }
    let mut handle = Handle {
        length: MAX_LEN as libc::c_uint,
        kind: 0,
        bytes: [0; MAX_LEN],
    };
    let mut mount: libc::c_int = 0;
    loop {
        // Called by number, because not every libc that Rust supports on Linux wraps it.
        // SAFETY: name_to_handle_at(2) reads the path, which is NUL-terminated, and takes a
        // descriptor that the caller keeps open. It writes to `mount` and to `handle`, and at most
        // `length` bytes to its `bytes`.
        let result = Errno::result(unsafe {
            libc::syscall(
                libc::SYS_name_to_handle_at,
                dir,
                path.as_ptr(),
                &raw mut handle,
                &raw mut mount,
                flags | TO_COMPARE,
            )
        });
        match result {
            Ok(_) => break,
            Err(Errno::EINTR) => {}
            Err(_) => return None,
        }
    }
    let length = usize::try_from(handle.length).ok()?;
    Some(StoredHandle {
        kind: handle.kind,
        bytes: handle.bytes.get(..length)?.to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Linux 6.18 reports it: a file that was created on an overlay of tmpfs.
    fn reported(flags: u8) -> StoredHandle {
        let mut bytes = vec![0, 0, 0, 0, 0xfb, 33, flags, 1];
        bytes.extend([7; 16]);
        bytes.extend([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]);
        StoredHandle { kind: 0xf8, bytes }
    }

    #[test]
    fn the_handle_in_the_upper_layer_is_read() {
        let stored = StoredHandle {
            kind: 1,
            bytes: (1..=12).collect(),
        };
        assert_eq!(in_upper_layer(&reported(4)), Some(stored));
        assert_eq!(in_upper_layer(&reported(0)), None, "in a lower layer");
    }

    #[test]
    fn a_handle_of_another_format_is_ignored() {
        let with = |change: fn(&mut StoredHandle)| {
            let mut handle = reported(4);
            change(&mut handle);
            in_upper_layer(&handle)
        };
        assert_eq!(with(|handle| handle.kind = 1), None);
        assert_eq!(with(|handle| handle.bytes[3] = 1), None, "version");
        assert_eq!(with(|handle| handle.bytes[4] = 0), None, "magic");
        assert_eq!(with(|handle| handle.bytes[5] = 20), None, "too short");
        assert_eq!(with(|handle| handle.bytes.truncate(30)), None, "cut");
        assert_eq!(with(|handle| handle.bytes.truncate(5)), None, "cut");
    }
}
