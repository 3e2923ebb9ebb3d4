//! The mappings of a process, and the search for a guest's RAM among them.

mod error;
mod pages;

use std::cmp::Reverse;
use std::ops::Range;
use std::process;

use page_reader::{MappingsError, ProcessRegion};

pub use error::FindRegionError;

/// The mappings of a process at the time of the call.
///
/// The regions of a guest's RAM are found by name if the VMM names them (a memfd, a file), by
/// address if the VMM reports it, or else guessed by size. [`ProcessMemory`](crate::ProcessMemory)
/// reads them.
///
/// # Examples
/// ```
/// use page_reader::PageReader;
/// use process_memory::{ProcessMaps, ProcessMemory};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let pid = std::process::id();
/// let maps = ProcessMaps::of(pid)?;
/// let stack = maps.named("[stack]")?;
/// assert!(stack.permissions.read && stack.permissions.write);
///
/// let memory = ProcessMemory::open(pid, [(stack.addresses.start, stack.size())])?;
/// let mut word = [0; 8];
/// memory.read_at(stack.size() - 8, &mut word)?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct ProcessMaps {
    pid: u32,
    /// As listed, ascending by address.
    lines: Vec<ProcessRegion>,
    /// Joined lines, ascending by address.
    regions: Vec<ProcessRegion>,
}

/// The maximum number of candidates in an error.
const MAX_LISTED: usize = 8;

impl ProcessMaps {
    /// Returns the mappings of process `pid`.
    ///
    /// # Errors
    /// Returns an error if the process has ended, may not be examined, or if the list has an
    /// unknown format.
    pub fn of(pid: u32) -> Result<Self, MappingsError> {
        Ok(Self::new(pid, ProcessRegion::of(pid)?))
    }

    /// Returns the mappings of the calling process.
    ///
    /// # Errors
    /// Returns the errors of [`of`](Self::of).
    pub fn of_this_process() -> Result<Self, MappingsError> {
        Ok(Self::new(process::id(), ProcessRegion::of_this_process()?))
    }

    fn new(pid: u32, listed: Vec<ProcessRegion>) -> Self {
        let mut regions = Vec::<ProcessRegion>::new();
        for line in &listed {
            match regions.last_mut() {
                Some(last) if is_continued_by(last, line) => {
                    last.addresses.end = line.addresses.end;
                }
                _ => regions.push(line.clone()),
            }
        }
        Self {
            pid,
            lines: listed,
            regions,
        }
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Returns all regions, ascending by address.
    ///
    /// A region is a line of `/proc/<pid>/maps`, or several adjacent lines with consecutive parts
    /// of one file: the kernel splits a mapping when a part of it is treated differently. Anonymous
    /// memory is not joined.
    #[must_use]
    pub fn regions(&self) -> &[ProcessRegion] {
        &self.regions
    }

    /// Returns the lines of `/proc/<pid>/maps` that overlap `range`, not joined, ascending by
    /// address.
    ///
    /// `/proc/<pid>/map_files` has an entry for each line with a file, and none for a region of
    /// several lines.
    #[must_use]
    pub fn lines_in(&self, range: &Range<u64>) -> &[ProcessRegion] {
        if range.is_empty() {
            return &[];
        }
        let lines = &self.lines[..];
        let first = lines.partition_point(|line| line.addresses.end <= range.start);
        let end = lines.partition_point(|line| line.addresses.start < range.end);
        &lines[first..end]
    }

    /// Returns the region that contains `address`.
    #[must_use]
    pub fn at(&self, address: u64) -> Option<&ProcessRegion> {
        let index = self
            .regions
            .partition_point(|region| region.addresses.end <= address);
        self.regions
            .get(index)
            .filter(|region| region.addresses.contains(&address))
    }

    /// Returns the addresses of the region that contains `address`, together with the adjacent
    /// regions that may be parts of the same memory.
    ///
    /// The kernel splits a mapping when a part of it gets other permissions or advice. A VMM that
    /// tracks writes by `mprotect(2)` splits its RAM this way. Adjacent regions count if they are
    /// consecutive parts of one file, or both anonymous with one name. Their permissions may
    /// differ. Anonymous memory that cannot be read counts only if it has pages, which were written
    /// before: the guard page of a stack has none.
    #[must_use]
    pub fn around(&self, address: u64) -> Option<Range<u64>> {
        let index = self
            .regions
            .partition_point(|region| region.addresses.end <= address);
        let found = self.regions.get(index)?;
        if !found.addresses.contains(&address) {
            return None;
        }
        let (before, after) = self.regions.split_at(index);
        let mut first = found;
        for region in before.iter().rev() {
            if !self.may_be_one(region, first) {
                break;
            }
            first = region;
        }
        let mut last = found;
        for region in &after[1..] {
            if !self.may_be_one(last, region) {
                break;
            }
            last = region;
        }
        Some(first.addresses.start..last.addresses.end)
    }

    /// Returns `true` if `next` is adjacent to `region` and may be the next part of its memory.
    fn may_be_one(&self, region: &ProcessRegion, next: &ProcessRegion) -> bool {
        let is_ram = |region: &ProcessRegion| {
            region.inode != 0
                || region.permissions.read
                || pages::has_pages(self.pid, &region.addresses)
        };
        is_continued(region, next) && is_ram(region) && is_ram(next)
    }

    /// Returns the regions with this name, ascending by address. If there are none, returns those
    /// whose name contains it.
    ///
    /// ` (deleted)` at the end of a region's name is optional in `name`: every memfd has it. A
    /// guest with a gap in its RAM may have a region on each side of the gap, both of one file.
    /// Their [`offset`](ProcessRegion::offset) determines their order.
    #[must_use]
    pub fn all_named(&self, name: impl AsRef<[u8]>) -> Vec<&ProcessRegion> {
        let name = name.as_ref();
        let named = |is: fn(&[u8], &[u8]) -> bool| -> Vec<_> {
            let regions = self.regions.iter();
            regions.filter(|region| is(&region.name, name)).collect()
        };
        let exactly =
            named(|has, name| has == name || has.strip_suffix(b" (deleted)") == Some(name));
        if exactly.is_empty() && !name.is_empty() {
            named(|has, name| has.windows(name.len()).any(|part| part == name))
        } else {
            exactly
        }
    }

    /// Returns the only region with this name, or whose name contains it, as in
    /// [`all_named`](Self::all_named).
    ///
    /// # Errors
    /// Returns an error if there is no such region or several. The error lists the alternatives.
    pub fn named(&self, name: impl AsRef<[u8]>) -> Result<&ProcessRegion, FindRegionError> {
        let name = name.as_ref();
        let found = self.all_named(name);
        let pid = self.pid;
        let printable = || String::from_utf8_lossy(name).into_owned();
        let owned = |regions: &[&ProcessRegion]| regions.iter().copied().cloned().collect();
        match found[..] {
            [one] => Ok(one),
            [] => {
                let mut regions = self.candidates();
                regions.truncate(MAX_LISTED);
                Err(FindRegionError::NotFound {
                    pid,
                    name: printable(),
                    regions: owned(&regions),
                })
            }
            _ => Err(FindRegionError::Ambiguous {
                pid,
                name: printable(),
                regions: owned(&found),
            }),
        }
    }

    /// Returns the regions that may be a guest's RAM: readable and writable memory, the largest
    /// first.
    ///
    /// The first region is a good guess for a VMM with one guest whose RAM is contiguous. Ask the
    /// user to confirm it. Mappings of devices and other special files (`anon_inode:`) are
    /// excluded.
    #[must_use]
    pub fn candidates(&self) -> Vec<&ProcessRegion> {
        let may_be_ram = |region: &&ProcessRegion| {
            region.permissions.read
                && region.permissions.write
                && !region.name.starts_with(b"anon_inode:")
        };
        let mut candidates: Vec<_> = self.regions.iter().filter(may_be_ram).collect();
        candidates.sort_by_key(|region| Reverse(region.size()));
        candidates
    }
}

/// Returns `true` if `next` is adjacent to `region` and maps the next part of the same file
/// in the same way.
fn is_continued_by(region: &ProcessRegion, next: &ProcessRegion) -> bool {
    region.inode != 0 && region.permissions == next.permissions && is_continued(region, next)
}

/// Returns `true` if `next` is adjacent to `region` and of the same kind.
fn is_continued(region: &ProcessRegion, next: &ProcessRegion) -> bool {
    let of_one_file = |region: &ProcessRegion| (region.device, region.inode);
    region.addresses.end == next.addresses.start
        && of_one_file(region) == of_one_file(next)
        && region.name == next.name
        && region.permissions.shared == next.permissions.shared
        && (region.inode == 0 || region.offset.checked_add(region.size()) == Some(next.offset))
}

#[cfg(test)]
mod tests;
