//! Which memory of a process has pages.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::unistd::{SysconfVar, sysconf};

/// The number of pages whose entries are read at once.
const AT_ONCE: u64 = 8192;
/// The length of an entry in bytes.
const ENTRY: u64 = 8;
/// The bits of an entry whose page is in memory, or swapped out.
const PRESENT_OR_SWAPPED: u64 = 0b11 << 62;

/// Returns whether any page of these addresses is in memory or swapped out. Returns `false` if the
/// kernel does not say.
pub(super) fn has_pages(pid: u32, addresses: &Range<u64>) -> bool {
    let page = sysconf(SysconfVar::PAGE_SIZE).ok().flatten();
    let page = page.and_then(|page| u64::try_from(page).ok());
    let file = File::open(format!("/proc/{pid}/pagemap")).ok();
    let (Some(page), Some(file)) = (page, file) else {
        return false;
    };
    let (mut at, end) = (addresses.start / page, addresses.end / page);
    let mut entries = vec![0; (AT_ONCE.min(end.saturating_sub(at)) * ENTRY) as usize];
    while at < end {
        let count = AT_ONCE.min(end - at);
        let entries = &mut entries[..(count * ENTRY) as usize];
        if file.read_exact_at(entries, at * ENTRY).is_err() {
            return false;
        }
        let (entries, _) = entries.as_chunks::<{ ENTRY as usize }>();
        let has_page = |entry: &[u8; 8]| u64::from_ne_bytes(*entry) & PRESENT_OR_SWAPPED != 0;
        if entries.iter().any(has_page) {
            return true;
        }
        at += count;
    }
    false
}
