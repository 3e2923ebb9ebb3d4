//! Swapping.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::mem;
use std::os::unix::ffi::OsStrExt;

use nix::libc;
use tempfile::TempDir;

use crate::mapping::PAGE;

/// Binds this thread to its current processor.
///
/// `MADV_PAGEOUT` swaps out the new pages of the processor that calls it, and keeps those of other
/// processors in memory.
pub fn stay_on_this_processor() {
    // SAFETY: the set is a local variable of integers, which is read during the call.
    unsafe {
        let mut set: libc::cpu_set_t = mem::zeroed();
        libc::CPU_SET(libc::sched_getcpu().cast_unsigned() as usize, &mut set);
        let result = libc::sched_setaffinity(0, size_of_val(&set), &raw const set);
        assert_eq!(result, 0);
    }
}

/// An enabled swap file.
#[derive(Debug)]
pub struct Swap {
    path: CString,
    _dir: TempDir,
}

impl Swap {
    /// Enables a swap file of `len` bytes, or prints that `test` is not run and returns `None` if
    /// the file system does not support swap files.
    pub fn on(len: usize, test: &str) -> Option<Self> {
        let swap = Self::in_temp_dir(len);
        if swap.is_none() {
            let why = "the directory for temporary files is on a file system without swap files";
            test_machine::not_run(test, why);
        }
        swap
    }

    fn in_temp_dir(len: usize) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("swap");
        let mut file = vec![0; len];
        // A swap header: version and last page after the boot block, the magic at the end of the
        // page.
        file[1024..1028].copy_from_slice(&1_u32.to_ne_bytes());
        file[1028..1032].copy_from_slice(&((len / PAGE - 1) as u32).to_ne_bytes());
        file[PAGE - 10..PAGE].copy_from_slice(b"SWAPSPACE2");
        fs::write(&path, &file).unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        let path = CString::new(path.as_os_str().as_bytes()).unwrap();
        // SAFETY: a C string.
        let on = unsafe { libc::swapon(path.as_ptr(), 0) } == 0;
        // Made only where it is in use: its drop ends that.
        on.then(|| Self { path, _dir: dir })
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        // SAFETY: a C string.
        let off = unsafe { libc::swapoff(self.path.as_ptr()) };
        assert_eq!(off, 0, "{}", io::Error::last_os_error());
    }
}
