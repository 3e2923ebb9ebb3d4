//! Linux system interfaces of the detection of pages that were never written. Where the kernel
//! provides no information, every page may have been written.

mod file;
mod huge_pages;
mod pagemap;
mod populate;
mod userfaultfd;

use nix::unistd::{SysconfVar, sysconf};

pub(crate) use file::{data, data_of, open};
pub(crate) use pagemap::Scan;
pub(crate) use populate::fault_in;
pub(crate) use userfaultfd::Userfaultfd;

fn page_size() -> u64 {
    match sysconf(SysconfVar::PAGE_SIZE) {
        Ok(Some(size)) => size as u64,
        other => unreachable!("POSIX defines PAGE_SIZE on every system: {other:?}"),
    }
}
