//! Memory as mapped by a VMM, and its state in the kernel.

#![allow(unsafe_code)]

use std::io::{self, Read};
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, AsRawFd};
use std::ptr::NonNull;

use lazy_restore::{LazyError, LazyRam, LazyRamOptions};
use memory_image::Chain;
use nix::errno::Errno;
use nix::libc;
use nix::sys::mman::{self, MapFlags, ProtFlags};

const PAGE: usize = 4096;
const READ_WRITE: ProtFlags = ProtFlags::PROT_READ.union(ProtFlags::PROT_WRITE);

/// The regions of a guest: address and length of each.
pub struct Regions(pub Vec<(*mut u8, usize)>);

impl Regions {
    /// Maps private anonymous memory.
    pub fn new(lengths: &[u64]) -> Self {
        Self::with(lengths, MapFlags::MAP_PRIVATE)
    }

    pub fn with(lengths: &[u64], flags: MapFlags) -> Self {
        let map = |len: &u64| {
            let len = *len as usize;
            let length = NonZeroUsize::new(len).unwrap();
            // SAFETY: a new mapping, at an address that the kernel picks.
            let start = unsafe { mman::mmap_anonymous(None, length, READ_WRITE, flags) };
            (start.unwrap().as_ptr().cast(), len)
        };
        Self(lengths.iter().map(map).collect())
    }

    pub fn of_file(file: impl AsFd, len: u64, flags: MapFlags) -> Self {
        let length = NonZeroUsize::new(len as usize).unwrap();
        // SAFETY: as for `with`.
        let start = unsafe { mman::mmap(None, length, READ_WRITE, flags, file, 0) };
        Self(vec![(start.unwrap().as_ptr().cast(), len as usize)])
    }

    pub fn adopt(&self, options: LazyRamOptions, chain: Chain) -> Result<LazyRam, LazyError> {
        // SAFETY: the memory is unmapped after the `LazyRam` is dropped. Only system calls and
        // `read_at` read it.
        unsafe { options.adopt(chain, self.0.iter().copied()) }
    }

    pub fn address(&self, offset: u64) -> *mut u8 {
        let mut offset = offset as usize;
        for (start, len) in &self.0 {
            if offset < *len {
                return start.wrapping_add(offset);
            }
            offset -= len;
        }
        panic!("past the regions")
    }

    pub fn page(&self, offset: u64) -> io::Result<Vec<u8>> {
        page_at(self.address(offset))
    }
}

impl Drop for Regions {
    fn drop(&mut self) {
        for (start, len) in &self.0 {
            // SAFETY: mapped by this type, and no longer filled.
            unsafe { mman::munmap(NonNull::new(*start).unwrap().cast(), *len) }.unwrap();
        }
    }
}

/// Reads a page through a pipe, so that an unreadable page is an error and not a signal.
pub fn page_at(address: *const u8) -> io::Result<Vec<u8>> {
    let (mut read, write) = io::pipe()?;
    // SAFETY: the kernel reads the page, and reports an error if it cannot.
    let written = unsafe { libc::write(write.as_raw_fd(), address.cast(), PAGE) };
    Errno::result(written)?;
    drop(write);
    let mut bytes = Vec::new();
    read.read_to_end(&mut bytes)?;
    Ok(bytes)
}

pub fn assert_unreadable(page: io::Result<Vec<u8>>) {
    assert_eq!(page.unwrap_err().raw_os_error(), Some(libc::EFAULT));
}

/// Calls `madvise` on pages whose content may be lost.
pub fn advise(address: *mut u8, len: u64, advice: libc::c_int) -> nix::Result<()> {
    // SAFETY: the tests expect the loss of content.
    Errno::result(unsafe { libc::madvise(address.cast(), len as usize, advice) }).map(drop)
}

/// Returns the flags of a mapping: VmFlags in proc_pid_smaps(5).
pub fn flags(address: usize) -> Vec<String> {
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut lines = smaps.lines();
    let holds = |line: &&str| {
        let range = line.split_whitespace().next();
        let range = range.and_then(|range| range.split_once('-'));
        range.is_some_and(|(start, end)| {
            let number = |text| usize::from_str_radix(text, 16).unwrap_or(0);
            (number(start)..number(end)).contains(&address)
        })
    };
    lines.find(holds).unwrap();
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:"));
    flags
        .unwrap()
        .split_whitespace()
        .map(str::to_owned)
        .collect()
}
